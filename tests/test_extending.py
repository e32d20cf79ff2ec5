"""docs/extending.md: each example is written out as its file and used where the page says it is named."""

import json
import re
import sys

import aura_flow
import methods
import pytest
import torch
import yaml
from docs_pages import blocks
from tiny import metrics_of

import samplers
from diffpo import links, scorers
from diffpo.config import ObjectiveSettings
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.train.loop import train
from diffpo.weights import lora_file

BLOCKS = blocks("docs/extending.md")
FILES = {
    found[1]: block.text
    for block in BLOCKS
    if (found := re.match(r"# (\w+\.(?:py|yaml))\n", block.text)) and block.language in ("python", "yaml")
}
KINDS = {"my_links.py", "my_methods.py", "my_method.yaml", "my_scorers.py", "my_families.py", "my_solvers.py"}


def named(text):
    """The settings of the config block that has ``text``."""
    (found,) = [block for block in BLOCKS if block.language == "yaml" and text in block.text and block.text[0] != "#"]
    return yaml.safe_load(found.text)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory with the page's files. It is not on sys.path, as under the installed command."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    links._link.cache_clear()
    yield folder
    links._link.cache_clear()
    for name in FILES:
        sys.modules.pop(name.partition(".")[0], None)


def overrides(settings, prefix=""):
    """`a.b=c` for each value of a config's sections."""
    for key, value in settings.items():
        if isinstance(value, dict) and key != "link_options":
            yield from overrides(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def test_each_example_is_short():
    assert set(FILES) == KINDS
    assert all(text.count("\n") < 40 for text in FILES.values())


def test_a_link_is_trained_with(here, tiny_sd, make_config):
    config = make_config(tiny_sd, "train.steps=2", *overrides(named("link: my_links:discopop")))
    train(config)
    first, second = metrics_of(config.output)
    # at u = 0 the gate is 1/2: half of DPO's log 2, half of e^0
    assert first["loss"] == pytest.approx((torch.tensor(2.0).log().item() + 1) / 2, rel=1e-6)
    assert second["loss"] != first["loss"]
    u = torch.tensor([-200.0, -0.3, 0.0, 0.3, 200.0], dtype=torch.float64, requires_grad=True)
    given = {"chosen": u, "rejected": 0 * u, "preference": torch.ones(5).double()}
    loss = links.losses("my_links:discopop", {"temperature": 0.1}, given)
    gate = torch.sigmoid(u / 0.1)
    by_the_paper = (1 - gate) * torch.nn.functional.softplus(-u) + gate * (-u.clamp(min=-50)).exp()
    torch.testing.assert_close(loss, by_the_paper)
    assert torch.autograd.grad(loss.sum(), u)[0].isfinite().all()


def test_a_preset_is_trained_with_as_a_file_and_in_a_module(here, tiny_sd, make_config):
    config = make_config(tiny_sd, "train.steps=2", *overrides(named("name: my_method.yaml")))
    assert (config.objective.link, config.objective.reference.policy) == ("my_links:discopop", "ema")
    train(config)
    assert lora_file.read_lora(config.output)[1]["objective"] == "my_method.yaml"
    assert "my_method.yaml" in (config.output / "README.md").read_text()
    module = ObjectiveSettings.model_validate({"name": "my_methods:DISCOPOP"})
    assert module.model_dump(exclude={"name"}) == ObjectiveSettings(name="my_method.yaml").model_dump(exclude={"name"})


def test_a_scorer_judges_in_training_and_alone(here, tiny_sd, make_config):
    from PIL import Image

    flat, edge = Image.new("RGB", (8, 8), "gray"), Image.new("RGB", (8, 8), "black")
    edge.paste("white", (4, 0, 8, 8))
    found = scorers.load("my_scorers:Sharpness.sharpness").score([flat, edge], ["a", "b"])["sharpness"]
    assert found.tolist() == [0, 255 / 7]
    settings = [*methods.ON_POLICY, *overrides(named("my_scorers:Sharpness"))]
    config = make_config(tiny_sd, "train.steps=2", "data.train=null", "data.prompts=shapes:train:4", *settings)
    train(config)
    assert metrics_of(config.output)[0]["rollout/score"] > 0


def test_a_family_is_trained_and_sampled(here, make_config, tmp_path):
    folder = aura_flow.make(tmp_path / "aura")
    family = named("family: my_families:AuraFlow")["model"]["family"]
    config = make_config(folder, f"model.family={family}", "train.steps=2")
    train(config)
    assert all(row["grad_norm"] > 0 for row in metrics_of(config.output))
    rows = generate.run(Generation(str(folder), family=family, steps=2).arms(), ["a cat"], tmp_path / "pictures")
    assert (tmp_path / "pictures" / rows[0]["file"]).is_file()


def error_of(solver, steps):
    """Of the exact flow to data N(0, 1/4), where the expected noise is sigma x / (alpha^2/4 + sigma^2)."""
    plan = samplers.build_plan(samplers.VPLinear(), solver, steps, end="t_end")
    variance = plan.alpha**2 / 4 + plan.sigma**2
    factors = iter(plan.sigma / variance)
    out = plan.run(lambda x, t: x * next(factors), torch.ones(1, 1, dtype=torch.float64))
    return abs(out.item() - (variance[-1] / variance[0]) ** 0.5)


def test_a_solver_has_its_order_and_samples_in_a_pipeline(here, tiny_sd, tmp_path):
    generation = Generation(str(tiny_sd), solver="my_solvers:ab2", steps=3)
    rows = generate.run(generation.arms(), ["a cat"], tmp_path / "pictures")
    assert rows[0]["solver"] == "my_solvers:ab2" and (tmp_path / "pictures" / rows[0]["file"]).is_file()
    assert 3.4 < error_of("my_solvers:ab2", 80) / error_of("my_solvers:ab2", 160) < 4.6  # of order 2: 4
