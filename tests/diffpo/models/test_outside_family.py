"""A family from outside the package (tests/aura_flow.py) through everything that a family is used for."""

import diffusers
import methods
import pytest
import torch
from aura_flow import AuraFlow, make
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo import models
from diffpo.commands import check
from diffpo.common.errors import DiffpoError
from diffpo.config import Model
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.export import export
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning
from diffpo.scorers.step.latent import LatentScorer
from diffpo.train import distributed
from diffpo.train.loop import train
from diffpo.weights import lora, lora_apply

CLASS = "aura_flow:AuraFlow"
SIDE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("outside") / "aura")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The folder of a finished run of two updates."""
    from diffpo.config import load_config

    place = tmp_path_factory.mktemp("run")
    data = methods.write_data(place)
    (place / "recipe.yaml").write_text(
        f"model: {{path: {folder}, family: '{CLASS}'}}\n"
        f"data: {{train: {data['pairs']}, resolution: {SIDE}, cache: {place / 'cache'}}}\n"
        "lora: {rank: 4}\n"
        "objective: {name: diffusion_dpo, beta: 500}\n"
        "train: {steps: 2, batch_size: 2, lr: 1e-2, checkpoint_every: 1}\n"
        f"output: {place / 'run'}\n"
    )
    train(load_config(place / "recipe.yaml", []))
    return place / "run"


def family_of(folder, family=CLASS, **options):
    return models.load(Model(path=str(folder), family=family, **options), resolution=SIDE)


def loaded(folder, captions):
    family = family_of(folder)
    family.load_encoders()
    return family, family.condition(family.encode_text(captions), torch.full((len(captions), 6), float(SIDE)))


def settings(run, **overrides):
    """The run's own config, with another output and other overrides."""
    from diffpo.config import load_config

    return load_config(run / "config.yaml", [f"{key}={value}" for key, value in overrides.items()])


def test_a_step_of_the_pipeline_is_a_step_with_our_conditions(folder):
    pipe = models.load_pipeline(str(folder), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    noise, _ = generate.initial_noise((4, 8, 8), 3, 0)
    options = AuraFlow.painting(pipe, ["a cat"], None, noise[None], 3.0)
    expected = pipe(**options, num_inference_steps=1, output_type="pt").images
    family, cond = loaded(folder, ["a cat", None])
    prompted, empty = ({name: value[i : i + 1] for name, value in cond.items()} for i in (0, 1))
    t = torch.tensor([family.train_timesteps - 1])
    with torch.no_grad():
        out = Policy(family, family.load_network()).output(noise[None], t, Conditioning(prompted, empty, 3.0))
    found = (family.decode(family.to_x_0(out, noise[None], t)) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_run_resumes_to_the_same_lora_and_the_pipeline_computes_with_it(folder, run, tmp_path):
    rows = metrics_of(run)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and rows[0]["grad_norm"] > 0
    halves = settings(run, output=tmp_path / "halves")
    train(halves.model_copy(update={"train": halves.train.model_copy(update={"steps": 1})}))
    again = train(halves)
    straight = run / again.name
    assert again.read_bytes() == straight.read_bytes()

    family, cond = loaded(folder, ["a cat"])
    pipes = [models.load_pipeline(str(folder), device="cpu") for _ in range(3)]
    lora_apply.load_lora(pipes[0], run)
    pipes[1].load_lora_weights(str(run), weight_name=straight.name)  # diffusers' own loader
    x_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        ours, theirs, base = (family.predict(pipe.transformer, x_t, t, cond) for pipe in pipes)
    torch.testing.assert_close(ours, theirs)
    assert (ours - base).abs().max() > 1e-5


def test_both_arms_are_generated(folder, run, tmp_path):
    made = Generation(str(folder), family=CLASS, lora=run, steps=2, height=SIDE, width=SIDE, device="cpu")
    rows = generate.run(made.arms(), list(methods.CAPTIONS), tmp_path / "out")
    assert len({row["sha256"] for row in rows}) == 4 and {row["arm"] for row in rows} == {"base", "tuned"}


def test_check_counts_what_is_trained_and_the_memory(folder, run, tmp_path, capsys):
    check.check(settings(run, output=tmp_path / "new"))
    said = capsys.readouterr().out
    network = family_of(folder).load_network()
    total = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(value.numel() for value in load_file(run / "pytorch_lora_weights.safetensors").values())
    assert f"{total:,} parameters" in said and f"{trained:,} trainable" in said and "activations " in said


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_that_is_not_known_is_said_to_be(folder, run, tmp_path, capsys, checkpointing):
    options = {"model.family": "aura_flow:Bare", "train.gradient_checkpointing": str(checkpointing).lower()}
    check.check(settings(run, output=tmp_path / "new", **options))
    said = capsys.readouterr().out
    assert ("Bare.repeated_blocks" in said) == checkpointing


def test_gradient_checkpointing_changes_no_number(run, tmp_path):
    again = train(settings(run, output=tmp_path / "again", **{"train.gradient_checkpointing": "true"}))
    expected, found = (load_file(folder / again.name) for folder in (run, again.parent))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_blocks_are_compiled_if_they_are_known(folder):
    family, cond = loaded(folder, ["a cat"])
    network, compiled = family.load_network(), []
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([500])

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = family.predict(network, x_t, t, cond)
        distributed.compile_blocks(family, network, backend=backend)
        torch.testing.assert_close(family.predict(network, x_t, t, cond), expected)
    assert len(compiled) >= 2  # the two kinds of blocks
    with pytest.raises(DiffpoError, match=r"train.compile=true .*Bare\.repeated_blocks"):
        distributed.compile_blocks(family_of(folder, "aura_flow:Bare"), network)


def test_features_have_gradients_and_rate_latents(folder):
    family, cond = loaded(folder, ["a cat", "a dog"])
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 800])
    half = family.load_network()
    family.cut(half)
    x = x_t.clone().requires_grad_()
    family.features(half, x, t, cond).sum().backward()
    assert x.grad.abs().max() > 0 and len(half.joint_transformer_blocks) == 1
    scorer = LatentScorer.fresh(family, family.load_network(), x_t, t, cond, seed=0)
    assert scorer.score(x_t, x_t, t, ["a cat", "a dog"], cond).shape == (2,)


@pytest.mark.parametrize("use", ["stages", "cut"])
def test_features_that_are_not_known_are_refused(folder, use):
    family = family_of(folder, "aura_flow:Bare")
    with pytest.raises(DiffpoError, match=r"Bare\.feature_blocks"):
        getattr(family, use)(family.load_network())


def test_users_and_sharding_are_refused_where_they_are_not_known(folder, run, tmp_path):
    from types import SimpleNamespace

    family = family_of(folder)
    with pytest.raises(DiffpoError, match=r"objective.users .*AuraFlow .*text_width"):
        models.text_width(family.load_network())
    plugin = SimpleNamespace(fsdp_version=2, activation_checkpointing=False, cpu_offload=None)
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value="FSDP"), state=SimpleNamespace(fsdp_plugin=plugin)
    )
    with pytest.raises(DiffpoError, match=r"AuraFlowTransformer2DModel.* fsdp2"):
        distributed.check(settings(run, output=tmp_path / "new"), family, accelerator)


def test_export(folder, run, tmp_path):
    def exported(to):
        return export.run(export.Export(run, to, str(folder), tmp_path / to, family=CLASS))

    copy = exported("diffusers")
    name = "pytorch_lora_weights.safetensors"
    assert (copy / name).read_bytes() == (run / name).read_bytes()
    merged = diffusers.AuraFlowPipeline.from_pretrained(exported("merged"))
    pipe = models.load_pipeline(str(folder), device="cpu")
    lora_apply.load_lora(pipe, run)
    family, cond = loaded(folder, ["a cat"])
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        one, other = (family.predict(network, x_t, t, cond) for network in (lora.network_of(pipe), merged.transformer))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for to in ("kohya", "single"):
        with pytest.raises(DiffpoError, match="AuraFlowPipeline"):
            exported(to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize(
    ("family", "said"),
    [
        (None, ["AuraFlowPipeline", "model.family"]),
        ("no_such_module:A", ["no_such_module"]),
        ("aura_flow:AuraFlw", ["aura_flow.py", "AuraFlow"]),
        ("aura_flow:make", ["aura_flow:make", "Family"]),
        ("aura_flow:Unfinished", ["Unfinished", "encode_text", "meta_cond", "predict"]),
        ("diffpo.models.dit:DiT", ["AuraFlowPipeline", "DiTPipeline"]),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(folder, family, said):
    with pytest.raises(DiffpoError) as error:
        family_of(folder, family)
    assert all(word in str(error.value) for word in said), error.value
