"""Random pipelines of the real classes, a few kB each, and a record of what their network is told."""

import diffusers
import torch

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LATENT = (1, 4, 8, 8)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        **options,
    ).eval()


def vae(**options):
    torch.manual_seed(1)
    kwargs = {"block_out_channels": (8,), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 8, **options}
    return diffusers.AutoencoderKL(**kwargs).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(scheduler, kind="StableDiffusionPipeline"):
    none = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    cls = getattr(diffusers, kind)
    return quiet(cls(unet=unet(), vae=vae(), scheduler=scheduler, requires_safety_checker=False, **none))


def sdxl(scheduler, kind="StableDiffusionXLPipeline"):
    net = unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32)
    none = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    return quiet(getattr(diffusers, kind)(vae=vae(), unet=net, scheduler=scheduler, **none))


def sd3(scheduler, kind="StableDiffusion3Pipeline"):
    torch.manual_seed(0)
    channels = 16 if "Inpaint" in kind else 4  # that pipeline insists
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=channels,
    ).eval()
    names = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    parts = {"vae": vae(shift_factor=0.0, latent_channels=channels), "transformer": transformer, "scheduler": scheduler}
    return quiet(getattr(diffusers, kind)(**parts, **dict.fromkeys(names)))


def dit(scheduler):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
    ).eval()
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.3)
    return quiet(diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=scheduler))


def pixart(scheduler):
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    ).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    none = {"tokenizer": None, "text_encoder": None}
    return quiet(diffusers.PixArtAlphaPipeline(vae=vae(), transformer=transformer, scheduler=scheduler, **none))


def inputs(pipe, seed=2):
    """What each pipeline needs in place of a prompt; no guidance, latents out."""
    embeds = torch.randn(1, 3, 8, generator=gen(seed))
    given = {"guidance_scale": 1.0, "output_type": "latent", "prompt_embeds": embeds}
    name = type(pipe).__name__
    if name.startswith(("StableDiffusionXL", "StableDiffusion3")):
        given["pooled_prompt_embeds"] = torch.randn(1, 8, generator=gen(seed + 1))
    if name.startswith("PixArt"):
        given |= {"prompt_attention_mask": torch.ones(1, 3), "use_resolution_binning": False}
        given |= {"negative_prompt": None, "height": 8, "width": 8}
    if name.startswith("DiT"):
        given = {"class_labels": [1], "guidance_scale": 1.0, "output_type": "np"}
    return given


def told(network):
    """The labels that the network will be told, collected in the returned list."""
    seen = []

    def note(module, args, kwargs):
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen.append(float(torch.as_tensor(t).flatten()[0]))

    network.register_forward_pre_hook(note, with_kwargs=True)
    return seen
