import pytest
from on_policy import PROMPTS, Brightness, StepBrightness, shake


@pytest.fixture
def feed(tiny_sd, make_config, monkeypatch):
    """feed(name, worker, per_update, **rollout): an OnPolicy of a policy that is not the base, judged by
    brightness, or the feed of judged pairs."""
    from diffpo import models
    from diffpo.common.worker import ALONE
    from diffpo.config import Lora, Model, ObjectiveSettings
    from diffpo.objective import reference
    from diffpo.problems.policy import Policy
    from diffpo.rollout.feed import OnPolicy
    from diffpo.rollout.labelled import Labelled
    from diffpo.rollout.prompts import PromptConditions
    from diffpo.rollout.round import ImageRounds, PoolRounds, SelfPlayRounds
    from diffpo.weights import lora

    monkeypatch.setattr("diffpo.scorers.judge.scorers.load", lambda spec, device: Brightness())
    monkeypatch.setattr("diffpo.rollout.round.load_step_scorer", lambda spec, family, unet: StepBrightness())
    family = models.load(Model(path=str(tiny_sd)))
    family.load_encoders()
    data = make_config(tiny_sd).data
    conditions = PromptConditions(PROMPTS, data, family)
    family.free_encoders(keep_vae=True)

    def make(name="d3po", worker=ALONE, per_update=4, objective=None, batches=None, **rollout):
        unet = family.load_network()
        parameters = lora.add_lora(unet, Lora(rank=4), family.lora_targets)
        shake(parameters, 0)
        scorer = {"step_scorer": "shapes.total"} if name == "spo" else {"scorers": ["shapes.total"]}
        choice = {"prompts": 3, "steps": 4, "guidance": 2.0, **scorer, **rollout}
        settings = ObjectiveSettings(name=name, rollout=choice, **(objective or {}))
        policy = Policy(family, unet)
        if settings.rollout.labels is not None:
            return Labelled(settings.rollout.labels, settings.rollout, conditions, policy, 5)
        made = reference.make(settings.reference, policy)
        if settings.rollout.sampler == "behaviour":
            made = reference.Behaviour(settings.behaviour, policy, settings.rollout.updates)
        if settings.source == "self_play":
            return OnPolicy(SelfPlayRounds(settings, batches, policy, made, 5), worker, per_update)
        kind = PoolRounds if settings.source == "pool" else ImageRounds
        return OnPolicy(kind(settings, conditions, policy, made, 5), worker, per_update)

    return make


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A random CLIPModel of 16 px with tokenizer and image processor."""
    from step_scorers import make_clip

    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def make_scorer_config(tmp_path, tmp_path_factory):
    """make(model, "a.b=c", ...): a ScorerConfig with ten pairs in which the brighter image wins; two are ties."""
    from step_scorers import brightness_rows
    from tiny import write_parquet

    from diffpo.config import ScorerConfig, load_config

    data = write_parquet(tmp_path / "pairs.parquet", brightness_rows(10, ties=2))

    def make(model, *overrides):
        recipe = tmp_path / "scorer.yaml"
        recipe.write_text(
            f"model: {{path: {model}}}\n"
            f"data: {{train: {data}, validation: {data}, resolution: 16, ties: soft, "
            f"cache: {tmp_path_factory.getbasetemp() / 'cache'}}}\n"
            "scorer: {kind: latent}\n"
            "train: {steps: 4, batch_size: 4, lr: 1e-2, checkpoint_every: 2}\n"
            f"output: {tmp_path / 'scorer'}\n"
        )
        return load_config(recipe, overrides, ScorerConfig)

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_sd, tiny_sdxl):
    """tiny_folder(name): the tiny pipeline of a family, made once."""
    from exports import MAKE
    from tiny_transformers import make_alpha

    make = {**MAKE, "pixart_alpha": make_alpha}
    made = {"sd": tiny_sd, "sdxl": tiny_sdxl}

    def get(name):
        if name not in made:
            made[name] = make[name](tmp_path_factory.mktemp("families") / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def editor(tmp_path_factory):
    """editor(name): the tiny pipeline of a model that edits pictures, made once."""
    import tiny_flows
    import tiny_qwen
    from tiny_transformers import make_kontext

    make = {"kontext": make_kontext, "flux2_klein": tiny_flows.make_flux2_klein, "flux2": tiny_flows.make_flux2}
    make |= {"qwen_edit": tiny_qwen.make_qwen_image_edit, "qwen_edit_plus": tiny_qwen.make_qwen_image_edit_plus}
    make["qwen_image21"] = tiny_qwen.make_qwen_image21
    make["longcat_edit"] = tiny_qwen.make_longcat_edit
    made = {}

    def get(name):
        if name not in made:
            made[name] = make[name](tmp_path_factory.mktemp("editors") / name)
        return made[name]

    return get


@pytest.fixture
def trained(tiny_folder, tmp_path):
    """trained(name, ...): the folder of a run whose LoRA is not zero, and the network with it."""
    from exports import train

    return lambda name, **options: (tmp_path / "run", train(tiny_folder(name), tmp_path / "run", **options))
