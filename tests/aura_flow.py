"""A family from outside the package, as a user would write it: AuraFlow. And a tiny pipeline of it."""

import torch
from tiny import vae
from tiny_transformers import T5_WIDTH, _t5

from diffpo.models import Family


class AuraFlow(Family):
    pipelines = ("AuraFlowPipeline",)
    network_class = "AuraFlowTransformer2DModel"
    encoders, tokenizers = ("text_encoder",), ("tokenizer",)
    repeated_blocks = ("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock")
    feature_blocks = "joint_transformer_blocks"

    def predict(self, network, x_t, t, cond):
        text = cond["prompt_embeds"].to(self.dtype)
        return network(x_t.to(self.dtype), text, self.network_time(t) / self.train_timesteps).sample

    @torch.no_grad()
    def encode_text(self, captions):
        texts = [caption or "" for caption in captions]
        device = self.pipe.vae.device
        return {"prompt_embeds": self.pipe.encode_prompt(texts, None, False, device=device)[0]}

    def meta_cond(self, network, n):
        return {"prompt_embeds": torch.empty(n, 256, network.config.joint_attention_dim, device="meta")}


class Bare(AuraFlow):
    """The same without the facts that may be left out."""

    repeated_blocks, feature_blocks = (), None


class Unfinished(Family):
    pipelines = ("AuraFlowPipeline",)
    network_class = "AuraFlowTransformer2DModel"


def make(folder, seed=0):
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    _, tokenizer = _t5()
    text = {"vocab_size": len(tokenizer), "d_model": T5_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    pipe = AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=2,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vae(),
        text_encoder=UMT5EncoderModel(UMT5Config(**text)),
        tokenizer=tokenizer,
    )
    pipe.save_pretrained(folder)
    return folder
