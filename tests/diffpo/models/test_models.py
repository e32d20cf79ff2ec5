import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from tiny import make_sdxl

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model, ObjectiveSettings
from diffpo.data.batches import Batches
from diffpo.data.groups import load_groups
from diffpo.data.judgement import Judgement
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.models.identity import base_identity
from diffpo.models.released import UNET_XL
from diffpo.objective.reference import Reference
from diffpo.objective.reward import Objective, score
from diffpo.problems.forward import Forward
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning, Regression
from diffpo.weights import lora, lora_apply, lora_file, trained

SD15 = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}


def family_of(path, precision="no"):
    return models.load(Model(path=str(path)), precision)


@pytest.mark.parametrize(
    ("base", "settings", "total", "adapted"),
    [("tiny_sdxl", UNET_XL, 2_567_463_684, 11_612_160), ("tiny_sd", SD15, 859_520_964, 1_594_368)],
)
def test_real_width_unet_gets_the_published_number_of_lora_parameters(
    request, tmp_path, base, settings, total, adapted
):
    """On the meta device, through the same code as `diffpo check`; totals are the published models'."""
    tiny = request.getfixturevalue(base)
    for part in ("model_index.json", "scheduler/scheduler_config.json"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text((tiny / part).read_text())
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(settings))
    family = family_of(tmp_path, "bf16")
    unet = family.meta_network()
    assert sum(p.numel() for p in unet.parameters()) == total
    parameters = lora.add_lora(unet, Lora(rank=8), family.lora_targets)
    assert sum(p.numel() for p in parameters) == adapted
    assert {p.dtype for p in parameters} == {torch.float32} and unet.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tiny_sdxl", "tiny_sd", "tiny_sd_v"])
def test_forward_process_and_target_agree_with_diffusers(request, name):
    path = request.getfixturevalue(name)
    family = family_of(path)
    scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    x_0, noise = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(family.add_noise(x_0, noise, t), scheduler.add_noise(x_0, noise, t))
    expected = scheduler.get_velocity(x_0, noise, t) if name.endswith("_v") else noise
    torch.testing.assert_close(family.target(x_0, noise, t), expected)


def test_text_embeddings_are_the_pipelines_own_and_none_is_its_unconditional(tiny_sdxl, tiny_sd):
    family = family_of(tiny_sdxl)
    family.load_encoders()
    rows = family.encode_text(["a cat", None])
    pipe = DiffusionPipeline.from_pretrained(tiny_sdxl)
    embeds, no_embeds, pooled, no_pooled = pipe.encode_prompt("a cat", do_classifier_free_guidance=True)
    torch.testing.assert_close(rows["prompt_embeds"], torch.cat([embeds, no_embeds]))
    torch.testing.assert_close(rows["pooled_prompt_embeds"], torch.cat([pooled, no_pooled]))
    assert no_embeds.abs().max() == 0  # force_zeros_for_empty_prompt
    plain = family_of(tiny_sd)
    plain.load_encoders()
    rows = plain.encode_text(["a cat", None])["prompt_embeds"]
    torch.testing.assert_close(rows[1:], plain.encode_text([""])["prompt_embeds"])
    assert not torch.equal(rows[0], rows[1])


def batches(path, config, family=None):
    family = family or family_of(path)
    family.load_encoders()
    return family, Batches(load_groups(config.data, config.data.train, "train"), config.data, family)


def test_both_images_of_a_pair_share_noise_timestep_crop_flip_and_dropout(tiny_sdxl, make_config, tmp_path):
    config = make_config(
        tiny_sdxl, "data.crop=random", "data.flip=true", "data.caption_dropout=0.5", "data.resolution=8"
    )
    family, source = batches(tiny_sdxl, config)
    batch = source.batch(list(range(8)), list(range(8)))
    regression = Forward(family)(batch)
    for value in (regression.t, regression.target, *regression.conditioning.cond.values()):
        torch.testing.assert_close(*value.chunk(2), rtol=0, atol=0)
    assert not torch.equal(*batch.x_0.chunk(2))
    dropped = (regression.conditioning.cond["pooled_prompt_embeds"][:8] == 0).all(1)
    assert 0 < dropped.sum() < 8
    assert len(set(regression.t.tolist())) > 4
    # a draw belongs to its position: another company in the batch changes nothing
    alone = Forward(family)(source.batch([3], [3]))
    torch.testing.assert_close(alone.x_t, regression.x_t[[3, 11]])
    assert alone.t[0] == regression.t[3]


def test_cached_latents_equal_uncached_ones_with_the_same_posterior_noise(tiny_sd, make_config):
    family, cached = batches(tiny_sd, make_config(tiny_sd))
    _, uncached = batches(tiny_sd, make_config(tiny_sd, "data.cache_latents=false"), family)
    assert cached.cached and not uncached.cached
    one, other = (source.batch([4, 0, 7], [10, 11, 12]) for source in (cached, uncached))
    torch.testing.assert_close(one.x_0, other.x_0)
    expected = family.pipe.vae.encode(pixel_batch(uncached, [4, 0, 7])).latent_dist
    drift = (one.x_0[:3] / family.vae_config["scaling_factor"] - expected.mean).std()
    assert drift == pytest.approx(expected.std.mean().item(), rel=0.3)  # sampled, not the mean


def pixel_batch(source, indices):
    from diffpo.data.transforms import pixels

    return torch.stack(
        [pixels(source.groups.images(i)[0], source._views(i, torch.Generator(), False)[0]) for i in indices]
    )


def test_reference_is_the_base_itself_and_swapping_the_images_negates_the_logit(tiny_sd):
    family = family_of(tiny_sd)
    unet = family.load_network()
    draw = torch.Generator().manual_seed(0)
    x_t, target = torch.randn(2, 4, 4, 8, 8, generator=draw)
    t, cond = torch.tensor([7, 600, 7, 600]), {"prompt_embeds": torch.randn(4, 16, 16, generator=draw)}
    with torch.no_grad():
        before = family.predict(unet, x_t, t, cond)
    parameters = lora.add_lora(unet, Lora(rank=2), family.lora_targets)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    with trained.of(unet).switched(None) as base:
        assert torch.equal(family.predict(base, x_t, t, cond), before)
    assert all(parameter.requires_grad for parameter in parameters)
    swap = [2, 3, 0, 1]
    cond_swapped = {name: value[swap] for name, value in cond.items()}
    settings = ObjectiveSettings(name="diffusion_dpo", beta=500)
    policy, judgement = Policy(family, unet), Judgement(torch.ones(2))
    objective = Objective(settings, Reference(policy), lambda t: torch.ones(len(t)))
    swapped = Regression(x_t[swap], t[swap], target[swap], Conditioning(cond_swapped), judgement)
    u = score(policy, objective, Regression(x_t, t, target, Conditioning(cond), judgement)).margin
    assert u.abs().min() > 1e-3
    torch.testing.assert_close(score(policy, objective, swapped).margin, -u)


def test_lora_initialisation_depends_on_the_seed_alone_and_disturbs_no_other_randomness(tiny_sd):
    states = []
    for seed in (0, 0, 1):
        unet = family_of(tiny_sd).load_network()
        torch.manual_seed(123)
        lora.add_lora(unet, Lora(rank=2), ("to_q",), seed)
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(123))
        states.append(torch.cat([value.flatten() for value in lora.lora_state(unet).values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_targets_that_fit_nothing_are_named(tiny_sd):
    with pytest.raises(DiffpoError, match=r"lora.targets \['to_x'\]|lora.targets {'to_x'}"):
        lora.add_lora(family_of(tiny_sd).load_network(), Lora(targets=["to_x"]), ())


@pytest.fixture
def adapted(tiny_sdxl, tmp_path):
    """A LoRA file with alpha != rank, and what the adapted network returns."""
    family = family_of(tiny_sdxl)
    unet = family.load_network()
    base = base_identity(unet, "the base")
    draw = torch.Generator().manual_seed(0)
    for parameter in lora.add_lora(unet, Lora(rank=4, alpha=16), family.lora_targets):
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    lora.save_lora(
        tmp_path / lora_file.FILE_NAME, unet, "unet", {"base": base, "objective": "diffusion_dpo", "beta": 5.0}
    )
    return tmp_path, unet


def test_equal_loras_are_equal_files(adapted):
    folder, unet = adapted
    weights, about = lora_file.read_lora(folder)
    contents = set()
    for i in range(8):  # safetensors orders a header's metadata anew each time
        lora.save_lora(folder / f"{i}.safetensors", unet, "unet", about)
        contents.add((folder / f"{i}.safetensors").read_bytes())
    assert contents == {(folder / lora_file.FILE_NAME).read_bytes()}
    assert {name: value.shape for name, value in weights.items()} == {
        f"unet.{name}": value.shape for name, value in lora.lora_state(unet).items()
    }


def test_diffusers_loads_the_file_with_the_right_alpha_and_it_says_what_it_is(adapted, tiny_sdxl):
    folder, unet = adapted
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipe.load_lora_weights(folder)
    cond = {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)}
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), torch.randn(2, 16, 32))
    with torch.no_grad():
        ours, theirs = (net(*inputs, added_cond_kwargs=cond).sample for net in (unet, pipe.unet))
        pipe.unet.disable_adapters()
        without = pipe.unet(*inputs, added_cond_kwargs=cond).sample
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    assert (ours - without).abs().max() > 0.01
    _, about = lora_file.read_lora(folder)
    assert (about["objective"], about["beta"], about["base"]["name"]) == ("diffusion_dpo", 5.0, "the base")


def test_load_lora_takes_the_same_base_in_any_precision_and_refuses_another(adapted, tiny_sdxl, tmp_path):
    folder, _ = adapted
    for dtype in ("float32", "bfloat16", "float16"):
        pipe = models.load_pipeline(str(tiny_sdxl), dtype, "cpu")
        lora_apply.load_lora(pipe, folder)
        assert pipe.get_active_adapters()
    other = models.load_pipeline(str(make_sdxl(tmp_path / "other", seed=1)), device="cpu")
    with pytest.raises(DiffpoError, match=r"trained on another base model: the base"):
        lora_apply.load_lora(other, folder)
    assert not other.get_active_adapters()


def test_lora_files_that_are_missing_or_damaged(adapted, tiny_sdxl, tmp_path):
    folder, _ = adapted
    pipe = models.load_pipeline(str(tiny_sdxl), device="cpu")
    with pytest.raises(DiffpoError, match="no LoRA at"):
        lora_apply.load_lora(pipe, tmp_path / "nowhere")
    whole = (folder / lora_file.FILE_NAME).read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DiffpoError, match=r"cannot read the LoRA .*torn.safetensors"):
        lora_apply.load_lora(pipe, folder / "torn.safetensors")


def test_models_that_cannot_be_had(tmp_path, tiny_sd):
    with pytest.raises(
        DiffpoError, match=r"cannot load the model 'nobody/model'.*hf download nobody/model.*model.path"
    ):
        family_of("nobody/model")
    with pytest.raises(DiffpoError, match=r"cannot load the model 'nobody/model'.*hf download"):
        models.load_pipeline("nobody/model")
    with pytest.raises(DiffpoError, match=str(tmp_path)):
        family_of(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WuerstchenPriorPipeline"}')
    with pytest.raises(DiffpoError, match=r"WuerstchenPriorPipeline.*StableDiffusionPipeline.*model\.family"):
        family_of(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", "{}", "7"])
def test_a_damaged_model_index_is_named(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(DiffpoError, match=r"model_index\.json does not describe a diffusers pipeline"):
        models.load(Model(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["DDPMWuerstchenScheduler", "EDMEulerScheduler", "KarrasVeScheduler"])
def test_a_scheduler_of_another_noise_is_refused_before_training(tiny_sd, tmp_path, name):
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd, copy)
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(DiffpoError, match=name):
        models.load(Model(path=str(copy)))


def test_what_a_solver_cannot_do_is_one_message(tiny_sd, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_schedule": "squaredcos_cap_v2"}))
    with pytest.raises(DiffpoError, match="prediction"):
        generate.run(Generation(copy, steps=2, guidance=1.0).arms(), ["a cat"], tmp_path / "out")
