"""Every model family against diffusers' own pipelines, and every kind of objective on every family."""

import json

import diffusers
import methods
import pytest
import tiny_transformers as tiny
import torch
from PIL import Image, ImageChops

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.models.identity import base_identity
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning
from diffpo.weights import lora, lora_apply, lora_file

MAKE = {
    "sd3": tiny.make_sd3,
    "sd35": tiny.make_sd35,
    "pixart_sigma": tiny.make_pixart,
    "pixart_alpha": tiny.make_alpha,
    "flux": tiny.make_flux,
    "dit": lambda folder: tiny.make_dit(folder, names=methods.CAPTIONS),
}
SIDE = 16  # pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name): the tiny pipeline of a family, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKE[name](tmp_path_factory.mktemp("families") / name)
        return made[name]

    return get


def family_of(path, **options):
    return models.load(Model(path=str(path), **options), resolution=SIDE)


def conditions(family, captions):
    family.load_encoders()
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * len(captions), dtype=torch.float32)
    return family.condition(family.encode_text(captions), sizes)


def one_step(pipe):
    """A scheduler whose only step, from the noisiest timestep, returns the estimate of x_0."""
    if "shift" in pipe.scheduler.config:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        rescale_betas_zero_snr=False,
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["sd", "sd_v", "sdxl", *MAKE])
def test_a_step_of_the_pipeline_is_a_step_with_our_conditions(request, folder, name, guidance):
    """The pipeline's picture after one step from pure noise is our network call, made x_0, decoded: text and its
    absence, sizes, timesteps, guidance, packing and the VAE's scaling are the pipeline's."""
    path = request.getfixturevalue(f"tiny_{name}") if name in ("sd", "sd_v", "sdxl") else folder(name)
    family = family_of(path, guidance=guidance)
    pipe = models.load_pipeline(str(path), device="cpu")
    pipe.scheduler = one_step(pipe)
    pipe.set_progress_bar_config(disable=True)
    noise, _ = generate.initial_noise((4, 8, 8), 3, 0)
    caption = "goldfish" if name == "dit" else "a cat"
    options = type(family).painting(pipe, [caption], None, noise[None], guidance)
    drawn = {} if "latents" in options else {"generator": [generate.noise_generator(3, 0)]}
    expected = pipe(**options, **drawn, num_inference_steps=1, output_type="pt").images

    prompted, empty = (conditions(family, [text]) for text in (caption, None))
    network, t = family.load_network(), torch.tensor([family.train_timesteps - 1])
    free = None if guidance == 1 or name == "flux" else empty
    with torch.no_grad():
        out = Policy(family, network).output(noise[None], t, Conditioning(prompted, free, guidance))
    found = (family.decode(family.to_x_0(out, noise[None], t)) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", ["sd", "sdxl", *MAKE])
def test_the_blocks_that_a_family_names_are_those_that_diffusers_computes_again(request, folder, name):
    family = family_of(request.getfixturevalue(f"tiny_{name}") if name in ("sd", "sdxl") else folder(name))
    network, seen = family.load_network().train(), set()

    def again(block, *inputs):
        seen.add(type(block).__name__)
        return block(*inputs)

    network.enable_gradient_checkpointing(again)
    cond = conditions(family, ["1" if name == "dit" else "a cat"])
    family.predict(network, torch.zeros(1, 4, 8, 8), torch.tensor([500]), cond)
    assert seen == set(family.checkpointed_blocks()) and set(family.repeated_blocks) <= seen


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_flow_is_the_schedulers_own(folder, name):
    family = family_of(folder(name))
    assert family.prediction == "flow"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder(name), subfolder="scheduler")
    if name == "flux":  # the pipeline's shift at 16 px: mu for its 16 tokens
        mu = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
        scheduler.set_timesteps(1000, mu=mu, sigmas=torch.arange(1000, 0, -1).numpy() / 1000)
        sigmas, timesteps = scheduler.sigmas[:-1].flip(0), scheduler.timesteps.flip(0)
    else:
        sigmas, timesteps = scheduler.sigmas.flip(0), scheduler.timesteps.flip(0)
    t = torch.arange(1000)
    torch.testing.assert_close(family.alpha_sigma(t)[1].flatten(), sigmas.float())
    torch.testing.assert_close(family.network_time(t), timesteps.float(), rtol=1e-5, atol=1e-3)
    x_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    few = torch.tensor([0, 400, 999])
    x_t, target = family.add_noise(x_0, noise, few), family.target(x_0, noise, few)
    torch.testing.assert_close(family.to_x_0(target, x_t, few), x_0, rtol=1e-4, atol=1e-5)
    # the velocity: d x_t / d sigma
    alpha, sigma = family.alpha_sigma(few)
    torch.testing.assert_close(
        (1 - sigma - 1e-3) * x_0 + (sigma + 1e-3) * noise, x_t + 1e-3 * target, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(alpha + sigma, torch.ones(3, 1, 1, 1))


@pytest.mark.parametrize("name", list(MAKE))
def test_a_lora_comes_back_through_the_pipeline(folder, tmp_path, name):
    """Saved, loaded into a fresh pipeline (by its own loader where it has one), and called: the same output."""
    family = family_of(folder(name))
    network = family.load_network()
    base = base_identity(network, name)
    parameters = lora.add_lora(network, Lora(rank=2, alpha=3), family.lora_targets)
    draw = torch.Generator().manual_seed(0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    lora.save_lora(tmp_path / lora_file.FILE_NAME, network, family.component, {"base": base})
    pipe = models.load_pipeline(str(folder(name)), device="cpu")
    lora_apply.load_lora(pipe, tmp_path)
    cond = conditions(family, ["1" if name == "dit" else "a cat"] * 2)
    x_t, t = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([50, 700])
    with torch.no_grad():
        ours, theirs = (family.predict(each, x_t, t, cond) for each in (network, pipe.transformer))
        without = family.predict(family.load_network(), x_t, t, cond)
    assert (ours - without).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("name", list(MAKE))
def test_both_arms_are_painted_from_the_same_noise(folder, tmp_path, name):
    """`generate` on every family: a LoRA that changes nothing paints the base's pictures; a batch is its members."""
    family = family_of(folder(name))
    network = family.load_network()
    base = base_identity(network, name)
    lora.add_lora(network, Lora(rank=2), family.lora_targets)
    lora.save_lora(tmp_path / lora_file.FILE_NAME, network, family.component, {"base": base})
    prompts = [methods.CAPTIONS[0], methods.CAPTIONS[1]]
    size = {} if name == "dit" else {"height": SIDE, "width": SIDE}  # FLUX and PixArt-alpha would take 128 latents
    options = {"lora": tmp_path / lora_file.FILE_NAME, "steps": 2, "guidance": 2.0, "device": "cpu", **size}
    rows = generate.run(Generation(folder(name), batch_size=2, **options).arms(), prompts, tmp_path / "out")
    shots = {arm: [row["sha256"] for row in rows if row["arm"] == arm] for arm in ("base", "tuned")}
    assert shots["base"] == shots["tuned"] and len(set(shots["base"])) == 2
    alone = generate.run(Generation(folder(name), batch_size=1, **options).arms(), prompts[:1], tmp_path / "alone")
    with (
        Image.open(tmp_path / "out" / rows[0]["file"]) as one,
        Image.open(tmp_path / "alone" / alone[0]["file"]) as other,
    ):
        assert one.size == (SIDE, SIDE)
        difference = ImageChops.difference(one, other)
    assert max(high for _, high in difference.getextrema()) <= 2  # a batch rounds otherwise


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("flux", {"negative_prompt": "bad"}, "FLUX takes no negative prompt"),
        ("dit", {"negative_prompt": "bad"}, "takes no negative prompt"),
        ("dit", {"height": 32, "width": 32}, "images of its own size only"),
    ],
)
def test_what_a_pipeline_cannot_do_is_said(folder, tmp_path, name, options, said):
    with pytest.raises(DiffpoError, match=said):
        generate.run(Generation(folder(name), steps=1, device="cpu", **options).arms(), [methods.CAPTIONS[0]], tmp_path)


@pytest.mark.parametrize("name", list(MAKE))
def test_a_size_that_is_no_whole_number_of_tokens_is_refused(folder, name):
    with pytest.raises(DiffpoError, match=r"data.resolution=18 .* multiple of 4 px"):
        models.load(Model(path=str(folder(name))), resolution=18)


def test_a_caption_that_is_no_class_is_named(folder, tmp_path):
    with pytest.raises(DiffpoError, match=r"'a dog'.*1000 classes"):
        generate.run(Generation(folder("dit"), steps=1, device="cpu").arms(), ["a dog"], tmp_path)


# transformer/config.json of the released models where it differs from the class's defaults; their published number of
# parameters; width and number of the layers that a LoRA adapts
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
DUAL = {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}
REAL = {
    "sd3-medium": ("sd3", SD3, 2_028_328_000, 1536, 24 * 8 - 1),  # the last block has no way out for text
    "sd3.5-medium": ("sd3", SD3 | DUAL, 2_243_171_520, 1536, 24 * 8 - 1 + 13 * 4),
    "pixart-alpha": ("pixart_alpha", {"caption_channels": 4096}, 611_349_152, 1152, 28 * 8),
    "flux": ("flux", {"guidance_embeds": True}, 11_901_408_320, 3072, 19 * 8 + 38 * 3),
    "dit-xl": ("dit", {"sample_size": 32, "out_channels": 8}, 749_826_464, 1152, 28 * 4),
}


@pytest.mark.parametrize("released", list(REAL))
def test_the_lora_of_a_released_model_has_its_closed_form_size(folder, tmp_path, released):
    name, settings, total, width, layers = REAL[released]
    for part in ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text((folder(name) / part).read_text())
    (tmp_path / "transformer").mkdir()
    pipeline = json.loads((tmp_path / "model_index.json").read_text())["_class_name"]
    config = {"_class_name": models.built_in()[pipeline].network_class, **settings}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    family = family_of(tmp_path)
    network = family.meta_network()
    assert sum(parameter.numel() for parameter in network.parameters()) == total
    parameters = lora.add_lora(network.requires_grad_(False), Lora(rank=8), family.lora_targets)
    assert sum(parameter.numel() for parameter in parameters) == 8 * 2 * width * layers
    with torch.no_grad():
        x_t, t, cond = family.meta_inputs(network, 2, 1024 // 4)  # the tiny VAE's factor is 2, the real one's 8
        assert family.predict(network, x_t, t, cond).shape == x_t.shape


# one of each kind: source of the regression, grouping, reference, error, users
KINDS = (
    "diffusion_dpo",
    "diffusion_kto",
    "rankdpo",
    "dcpo",
    "mapo",
    "inpo",
    "ncp_dpo",
    "d3po",
    "spo",
    "pso",
    "online_dpo",
    "diffusion_nft",
    "ddo",
    "tr_dpo",
    "ofs_dpo",
    "ppd",
)


@pytest.fixture
def few_tokens(monkeypatch, tmp_path_factory):
    """few_tokens(path): captions of 24 tokens, where the pipelines pad to 77, 300 or 512; the option of their cache."""

    def cut(path):
        kind = type(family_of(path))
        encode = kind.encode_text

        def encode_text(self, captions):
            sequences = {"prompt_embeds", "prompt_attention_mask"}
            return {key: v[:, :24] if key in sequences else v for key, v in encode(self, captions).items()}

        monkeypatch.setattr(kind, "encode_text", encode_text)
        return f"data.cache={tmp_path_factory.getbasetemp() / 'cache of 24 tokens'}"

    return cut


@pytest.mark.parametrize(
    ("name", "method"),
    # two pairs of models share a family's class: the second of them trains one offline and one on-policy method
    [(name, method) for name in MAKE for method in (("inpo", "spo") if name in ("sd35", "pixart_alpha") else KINDS)],
)
def test_every_kind_of_objective_trains_every_family(folder, few_tokens, make_config, tmp_path, name, method):
    data, cache = methods.write_data(tmp_path), few_tokens(folder(name))
    if method == "ppd" and name in ("pixart_sigma", "dit"):
        with pytest.raises(DiffpoError, match=r"set objective\.users=false"):
            methods.run(method, folder(name), make_config, data, cache)
        return
    methods.run(method, folder(name), make_config, data, cache)
