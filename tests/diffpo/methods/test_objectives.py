"""Presets: valid, free of repetition and of torch, and their betas converted as the papers' own formulas demand."""

import math
import re
import subprocess
import sys

import paper_index
import pytest
import torch

from diffpo import links, methods
from diffpo.common.errors import DiffpoError
from diffpo.config import ObjectiveSettings, Section, load_config
from diffpo.data.judgement import Judgement
from diffpo.objective.reward import Outcome, group_losses, implicit_reward

ALL = methods.names()
DOUBLE = torch.float64


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# ------------------------------------------------------------------------------------------------ all presets


@pytest.mark.parametrize("name", ALL)
def test_a_preset_is_valid_and_repeats_no_default(name):
    paper_index.settings(name)  # which validates it
    _differs_from_defaults(methods.load(name).settings, ObjectiveSettings)


def _differs_from_defaults(settings, model: type[Section]):
    for key, value in settings.items():
        default = model.model_fields[key].default
        if isinstance(default, Section):
            assert value, f"{key} is empty"
            _differs_from_defaults(value, type(default))
        elif key == "link_options":
            defaults = links.options(settings.get("link", "sigmoid"))
            assert all(option != defaults[name] for name, option in value.items()), value
        else:
            assert value != default, f"{key} repeats the default {default}"


@pytest.mark.parametrize("name", ALL)
def test_a_preset_says_where_it_is_from(name):
    preset = methods.load(name)
    assert preset.title and preset.equation and (preset.published or preset.notes)
    assert paper_index.special(name)
    if name not in ("cdpo", "dspo"):  # a note on the author's page; a proceedings paper
        assert re.search(r"\b\d{4}, arXiv \d{4}\.\d{5}\b", preset.paper)


def test_no_two_presets_are_the_same_objective_unless_the_data_differ():
    by_settings = {}
    for name in ALL:
        by_settings.setdefault(str(methods.load(name).settings), []).append(name)
    assert [names for names in by_settings.values() if len(names) > 1] == [["dcpo", "diffusion_dpo"]]


def test_every_link_has_a_preset():
    used = {paper_index.settings(name).link for name in ALL}
    # the released code of DSPO, DDPO without clip, NFT without adaptive weights: named in these presets' notes
    assert set(links.names()) - used == {"squared_sigmoid", "importance", "nft"}


def test_presets_and_the_validation_of_a_config_do_without_torch():
    code = "import sys, paper_index as p; [p.settings(n) for n in p.methods.names()]; print('torch' in sys.modules)"
    env_path = [path for path in sys.path if path]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {env_path!r}; {code}"], capture_output=True, text=True
    )
    assert run.stdout.strip() == "False", run.stderr


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(DiffpoError, match="did you mean d3po"):
        methods.load("d3p")


def test_the_index_is_up_to_date():
    assert paper_index.PAGE.read_text(encoding="utf-8") == paper_index.page(), "run python scripts/paper_index.py"


@pytest.mark.parametrize("name", ALL)
def test_the_loss_of_a_preset_falls_when_the_better_image_is_solved_better(name):
    """At policy = reference: the gradient of the loss by the better images' error is positive. That is what a method is
    for; the ones whose published loss does otherwise are named."""
    settings = paper_index.settings(name)
    members = {"pair": 2, "single": 1, "list": 3}[links.kind(settings.link)]
    n = 4
    error = rand(members * n).mul(0.1).add(0.05).requires_grad_()
    base = torch.zeros_like(error) if settings.reference.policy == "none" else error.detach().clone()
    reward = links.divergences.transform(
        settings.divergence, implicit_reward(error, base, settings.beta), settings.divergence_alpha
    )
    held = error.detach()  # the behaviour policy's too
    still, one = torch.zeros_like(held), torch.ones_like(held)
    more = {"log_ratio": (settings.beta / 2) * (held - error), "behaviour_error": held, "behaviour_drift": still}
    more |= {"behaviour_kl": still, "step_weight": one, "step_std": one, "x_0_scale": one, "target": still[None]}
    more |= {"prediction": error.sqrt()[None], "behaviour_prediction": held.sqrt()[None], "reference_reward": still}
    outcome = Outcome(
        error=error,
        reference_error=base,
        drift=torch.zeros_like(error),
        reward=reward,
        judgement=Judgement(
            torch.ones(n, dtype=DOUBLE),
            members,
            torch.linspace(1, 0, members, dtype=DOUBLE)[:, None].expand(members, n) if members > 1 else None,
            torch.linspace(1, -1, members, dtype=DOUBLE)[:, None].expand(members, n),
        ),
        more=more,
    )
    losses = group_losses(outcome, settings, torch.zeros((), dtype=DOUBLE))
    assert losses.shape == (n,) and losses.isfinite().all()
    gradient = torch.autograd.grad(losses.sum(), error)[0].unflatten(0, (members, n))
    if name == "apo_down":  # sigma(r_chosen) - sigma(u): both slopes are 1/4 there, and cancel
        assert gradient[0].abs().max() < 1e-9 * settings.beta
    else:
        assert (gradient[0] > 0).all()
    if members > 1 and name not in ("dspo", "sft", "plackett_luce", "rankdpo"):
        assert (gradient[-1] < 0).all()


# ------------------------------------------------------------------------------------------------ conversions of beta


@pytest.mark.parametrize(("name", "published"), [("d3po", 0.1), ("spo", 10.0), ("lpo", 500.0), ("pso", 50.0)])
def test_beta_of_log_ratio_methods(name, published):
    """published * (log p_policy - log p_ref), means over the dimensions, of a Gaussian step x_next = c pred + rest."""
    c, s = -0.37, 0.21
    rest, policy, reference, x_next = (torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(4))
    rest, policy, reference, x_next = (each.double() for each in (rest, policy, reference, x_next))
    log_p = [torch.distributions.Normal(rest + c * each, s).log_prob(x_next).mean() for each in (policy, reference)]
    target, k = (x_next - rest) / c, c**2 / (2 * s**2)
    errors = [k * (each - target).square().mean() for each in (policy, reference)]
    settings = paper_index.settings(name)
    assert settings.clip == 0.1
    torch.testing.assert_close(implicit_reward(*errors, settings.beta), published * (log_p[0] - log_p[1]))


def test_beta_of_papers_without_the_half():
    error, reference = rand(5), rand(5, seed=1)
    for name, published in {"diffusion_kto": 1000, "diffusion_dpo": 2500}.items():  # 2500: the diffusers example
        beta = paper_index.settings(name).beta
        torch.testing.assert_close(implicit_reward(error, reference, beta), published * (reference - error))


def test_hinge_is_diffusion_dros():
    m = 1e-3
    margin = torch.linspace(-2e-3, 2e-3, 9, dtype=DOUBLE)  # d_expert - d_policy
    u = implicit_reward(torch.zeros(9, dtype=DOUBLE), margin, paper_index.settings("hinge").beta)
    torch.testing.assert_close(m * links.get("hinge")(u, torch.zeros(9, dtype=DOUBLE)), (m - margin).clamp(min=0))


def test_mapos_margin_is_that_of_its_beta_for_small_errors():
    settings = paper_index.settings("mapo")
    chosen, rejected = (torch.tensor([e], dtype=DOUBLE, requires_grad=True) for e in (0.010, 0.011))
    loss = links.get("mapo")(chosen, rejected) - chosen  # without its fine-tuning term
    u = (settings.beta / 2) * (rejected - chosen)
    free = -0.1 * torch.nn.functional.logsigmoid(u)
    slopes = [torch.autograd.grad(each.sum(), rejected)[0] for each in (loss, free)]
    torch.testing.assert_close(*slopes, rtol=0.02, atol=0)


def test_smpos_temperature_is_the_published_normalisation_of_pickscore():
    low, high = 0.11543526500463486, 0.28201571106910706  # cosines; the scorer here returns 100 times them
    a, b = 0.231, 0.209
    p = math.exp((a - low) / (high - low)) / sum(math.exp((each - low) / (high - low)) for each in (a, b))
    q = 1 / (1 + math.exp(-100 * (a - b) / paper_index.settings("smpo").link_options["temperature"]))
    assert q == pytest.approx(p, rel=1e-5)
    assert links.options("smpo")["scale"] == 10


def test_f_dpo_starts_like_diffusion_dpo():
    reward = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    slope = torch.autograd.grad(links.divergences.transform("js", reward, 0.5), reward)[0]
    assert slope * paper_index.settings("f_dpo").beta == pytest.approx(paper_index.settings("diffusion_dpo").beta)


def test_rpos_weight_is_a_fifth_of_dpos_pull():
    settings = paper_index.settings("rpo")
    error = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(implicit_reward(error, torch.zeros((), dtype=DOUBLE), settings.beta))
    assert settings.sft == pytest.approx(torch.autograd.grad(loss, error)[0].item() / 5)


# ------------------------------------------------------------------------------------------------ published settings

PUBLISHED = {
    "inpo": {"beta": 5000, "inversion.steps": 10, "inversion.eta": 0.1, "reference.policy": "adapter_off"},
    "d3po": {"rollout.steps": 20, "rollout.eta": 1, "rollout.guidance": 5, "rollout.samples": 2},
    "spo": {"rollout.pool": 4, "rollout.start": 4, "rollout.threshold": 0.3, "rollout.steps": 20},
    "lpo": {"rollout.pool": 4, "rollout.start": 0, "rollout.guidance": 5},
    "pso": {"rollout.steps": 4, "rollout.transitions": 3, "rollout.guidance": 1, "rollout.same_noise": False},
    "sdpo": {"winner_safeguard": 0.6, "beta": 5000},
    "exo": {"beta": 2000},
    "tr_dpo": {"reference.decay": 1 - 0.6, "reference.every": 512},
    "diffusion_nft": {"rollout.samples": 24, "rollout.eta": 0, "behaviour.policy": "ema", "kl": 1e-4, "link_weight": 5},
    "flow_grpo": {"kl": 0.04, "link_options.clip": 1e-4, "rollout.step_options.amount": 0.7, "rollout.steps": 10},
    "ddpo": {"rollout.steps": 50, "rollout.eta": 1, "link_options.clip": 1e-4, "rollout.guidance": 5},
    "mix_grpo": {"rollout.window": 4, "rollout.window_rounds": 25, "rollout.steps": 25},
    "dpop": {"link_options.weight": 50},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_resolved_settings_are_the_published_ones(name):
    dumped = paper_index.settings(name).model_dump()
    for key, value in PUBLISHED[name].items():
        found = dumped
        for part in key.split("."):
            found = found[part]
        assert found == pytest.approx(value) if isinstance(value, float) else found == value, key


@pytest.mark.parametrize(
    ("recipe", "beta", "lr", "groups", "steps", "rank"),
    [
        ("sd15_d3po", 0.2, 3e-5, 20, 400 * 20, 4),  # 400 rounds of 20 pairs, an update for each pair's 20 steps
        ("sdxl_d3po", 0.2, 1e-5, 20, 400 * 20, 64),
        ("sd15_spo", 20, 6e-5, 10 * 4, 10 * 4000 // 40 * 8, 4),
        ("sdxl_spo", 20, 1e-5, 2 * 2 * 4, 10 * 4000 // 8 * 4, 64),
        ("sd15_inpo", 2000, 1e-8 * 1024, 1024, 400, 8),
        ("sdxl_inpo", 5000, 1e-8 * 1024, 1024, 400, 8),
    ],
)
def test_recipes_have_the_published_hyper_parameters(recipe, beta, lr, groups, steps, rank):
    config = load_config(paper_index.PAGE.parents[1] / "configs" / f"{recipe}.yaml")
    train = config.train
    assert (config.objective.beta, train.lr) == (pytest.approx(beta), pytest.approx(lr))
    assert (train.batch_size * train.accumulation, train.steps, config.lora.rank) == (groups, steps, rank)


@pytest.mark.parametrize("recipe", ["d3po_shapes", "spo_shapes", "sd15_d3po", "sdxl_d3po", "sd15_spo", "sdxl_spo"])
def test_recipes_end_with_a_whole_round(recipe):
    config = load_config(paper_index.PAGE.parents[1] / "configs" / f"{recipe}.yaml")
    assert config.train.steps % config.objective.rollout.updates == 0
