"""Every scorer with a tiny random network, and the published names and shapes of those that have files of their own."""

import open_clip
import torch
from tiny import clip_tokenizer

from diffpo.scorers import aesthetic, hps, imagereward, mps
from diffpo.scorers.clip import ClipScore
from diffpo.scorers.pickscore import PickScore

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 64, "encoder_hidden_size": 32}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"a red blue circle square two squares cat dog on of and".split(),
]


def blip_shapes(vision, text):
    """{name: shape} of the published ImageReward.pt, for settings of its two encoders."""
    d, hidden, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    tokens = (vision["image_size"] // patch) ** 2 + 1
    found = {"cls_token": (1, 1, d), "pos_embed": (1, tokens, d)}
    found |= layer("patch_embed.proj", d, 3, patch, patch) | norm("norm", d)
    for i in range(vision["num_hidden_layers"]):
        block = f"blocks.{i}."
        found |= norm(f"{block}norm1", d) | norm(f"{block}norm2", d)
        found |= layer(f"{block}attn.qkv", 3 * d, d) | layer(f"{block}attn.proj", d, d)
        found |= layer(f"{block}mlp.fc1", hidden, d) | layer(f"{block}mlp.fc2", d, hidden)
    named = {f"blip.visual_encoder.{key}": shape for key, shape in found.items()}
    w, hidden = text["hidden_size"], text["intermediate_size"]
    found = {"embeddings.word_embeddings.weight": (text["vocab_size"], w)}
    found |= {"embeddings.position_embeddings.weight": (text["max_position_embeddings"], w)}
    found |= norm("embeddings.LayerNorm", w)
    for i in range(text["num_hidden_layers"]):
        for attention, width in (("attention", w), ("crossattention", text["encoder_hidden_size"])):
            block = f"encoder.layer.{i}.{attention}."
            found |= layer(f"{block}self.query", w, w) | layer(f"{block}self.key", w, width)
            found |= layer(f"{block}self.value", w, width) | layer(f"{block}output.dense", w, w)
            found |= norm(f"{block}output.LayerNorm", w)
        block = f"encoder.layer.{i}."
        found |= layer(f"{block}intermediate.dense", hidden, w) | layer(f"{block}output.dense", w, hidden)
        found |= norm(f"{block}output.LayerNorm", w)
    named |= {f"blip.text_encoder.{key}": shape for key, shape in found.items()}
    widths = (w, 1024, 128, 64, 16, 1)
    for place, inner, outer in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        named |= layer(f"mlp.layers.{place}", outer, inner)
    return named


def cross_shapes(width, depth, heads, head_width):
    """{name: shape} of the part cross_model of MPS's published model."""
    inner, found = heads * head_width, {}
    for i in range(depth):
        block = f"cross_model.layers.{i}.0.fn."
        found |= norm(f"{block}norm", width) | {f"{block}to_q.weight": (inner, width)}
        found |= {f"{block}to_kv.weight": (2 * head_width, width), f"{block}to_out.weight": (width, inner)}
        found |= {f"{block}ff.0.weight": (8 * width, width), f"{block}ff.2.weight": (width, 4 * width)}
        block = f"cross_model.layers.{i}.1.fn."
        found |= norm(f"{block}norm", width) | {f"{block}rotary_emb.inv_freq": (head_width // 2,)}
        found |= {f"{block}fused_attn_ff_proj.weight": (inner + 2 * head_width + 8 * width, width)}
        found |= {f"{block}attn_out.weight": (width, inner), f"{block}ff_out.1.weight": (width, 4 * width)}
    return found


def layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_state(shapes, seed=0):
    """Tensors of these shapes, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        fan = torch.Size(shape[1:]).numel()
        found[name] = value / fan**0.5 if len(shape) > 1 and "embed" not in name else value * 0.3
        if "norm" in name.lower() and name.endswith("weight"):
            found[name] = found[name] + 1
    return found


def clip():
    """A random transformers CLIPModel of 16 px and 77 tokens, for the vocabulary of `tiny.clip_tokenizer`."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {**small, "image_size": 16, "patch_size": 8}
    text = {**small, **ids, "max_position_embeddings": 77}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()


def make(folder):
    """{name: scorer}, all with tiny random networks. ``folder`` is an empty one for files."""
    from transformers import BertTokenizer, CLIPImageProcessor, CLIPProcessor

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    model.visual.image_size = (32, 32)
    transform, tokenizer = open_clip.image_transform(32, is_train=False), open_clip.get_tokenizer("ViT-B-32")
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), clip_tokenizer())
    network = imagereward.Network(VISION, TEXT)
    network.load(random_state(blip_shapes(VISION, TEXT)))
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join([*WORDS, *(f"[unused{i}]" for i in range(40 - len(WORDS)))]))
    bert = BertTokenizer.from_pretrained(folder / "bert")
    layers, seeing = mps.Layers(12, 2, 2, 8), clip()
    published = random_state(cross_shapes(12, 2, 2, 8))
    mps.load_published(seeing, layers, published | {f"model.{key}": v for key, v in seeing.state_dict().items()})
    return {
        "pickscore": PickScore(clip(), processor),
        "hps": hps.HPS(model, tokenizer),
        "hps2.0": hps.HPS20(model, tokenizer),
        "imagereward": imagereward.ImageReward(network, bert),
        "mps": mps.MPS(seeing, layers, processor),
        "clip": ClipScore(model, transform, tokenizer),
        "aesthetic": aesthetic.Aesthetic(model, transform, aesthetic.head(24)),
    }
