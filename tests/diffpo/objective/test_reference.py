import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model, ReferenceSettings
from diffpo.models.identity import base_identity
from diffpo.objective import reference
from diffpo.problems.policy import Policy
from diffpo.train import checkpoint
from diffpo.weights import lora, lora_file, trained

MOVING = ("ema", "sync", "accelerated", "fast_slow")


def settings(policy: str, **options) -> ReferenceSettings:
    return ReferenceSettings(policy=policy, **options)


def policy_on(path, seed: int = 0):
    """A tiny model with a policy that is not the base: its B factors are random."""
    family = models.load(Model(path=str(path)))
    unet = family.load_network()
    parameters = lora.add_lora(unet, Lora(rank=4), family.lora_targets)
    move(parameters, seed)
    return family, unet, parameters


@torch.no_grad()
def move(parameters, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def output(family, unet, cond_seed: int = 0):
    draw = torch.Generator().manual_seed(cond_seed)
    cond = {
        "prompt_embeds": torch.randn(2, 7, 32, generator=draw),
        "pooled_prompt_embeds": torch.randn(2, 16, generator=draw),
        "time_ids": torch.full((2, 6), 16.0),
    }
    x_t = torch.randn(2, 4, 8, 8, generator=draw)
    return family.predict(unet, x_t, torch.tensor([100, 700]), cond)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.mark.parametrize("policy", ["adapter_off", "none"])
def test_the_still_references_are_the_base_bit_for_bit(tiny_sdxl, policy):
    family = models.load(Model(path=str(tiny_sdxl)))
    base = output(family, family.load_network())
    family, unet, parameters = policy_on(tiny_sdxl)
    made = reference.make(settings(policy), Policy(family, unet))
    with made.on() as reference_policy:
        module = reference_policy.network
        inside = output(family, module)
    assert torch.equal(inside, base) and not inside.requires_grad
    made.after_update(1)
    assert made.free == (policy == "none") and made.state() == {}
    assert not torch.allclose(output(family, unet), base, atol=1e-4)
    assert all(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("policy", MOVING)
def test_a_moving_reference_starts_as_the_policy_and_leaves_it_as_it_was(tiny_sdxl, policy, tmp_path):
    family, unet, parameters = policy_on(tiny_sdxl)
    alone = output(family, unet)
    state = lora.lora_state(unet)
    lora.save_lora(tmp_path / "alone", unet, "unet", {})
    base = base_identity(unet)
    made = reference.make(settings(policy), Policy(family, unet))
    with made.on() as reference_policy:
        module = reference_policy.network
        assert torch.equal(output(family, module), alone)  # so that u is exactly 0
        with trained.of(unet).switched(None):
            assert not torch.allclose(output(family, unet), alone, atol=1e-4)
        assert torch.equal(output(family, module), alone)
    # the optimiser, DDP and the files see nothing of the second adapter
    assert [id(p) for p in unet.parameters() if p.requires_grad] == [id(p) for p in parameters]
    assert lora.lora_state(unet).keys() == state.keys() and base_identity(unet) == base
    lora.save_lora(tmp_path / "with", unet, "unet", {})
    assert (tmp_path / "with").read_bytes() == (tmp_path / "alone").read_bytes()
    assert all(p.dtype == torch.float32 for n, p in unet.named_parameters() if "lora_" in n)
    # a policy that moves leaves the reference behind, and gradients reach the policy alone
    move(parameters, 1)
    with made.on() as reference_policy:
        module = reference_policy.network
        assert torch.equal(output(family, module), alone)
    output(family, unet).square().sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert all(p.grad is None for n, p in unet.named_parameters() if f".{lora.REFERENCE}." in n)


def test_the_context_puts_back_what_it_found_also_after_an_error(tiny_sdxl):
    family, unet, parameters = policy_on(tiny_sdxl)
    made = reference.make(settings("ema"), Policy(family, unet))
    unet.disable_adapters()
    parameters[0].requires_grad_(False)
    frozen = [parameter.requires_grad for parameter in parameters]
    with pytest.raises(KeyError), made.on():
        raise KeyError
    assert [parameter.requires_grad for parameter in parameters] == frozen
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    assert layers and all(layer.disable_adapters and layer.active_adapters == ["default"] for layer in layers)


@pytest.mark.parametrize("policy", MOVING)
def test_three_steps_of_each_rule_are_those_of_its_definition(tiny_sdxl, policy):
    """The recursions in float64, on one long vector of all weights."""
    family, unet, parameters = policy_on(tiny_sdxl)
    made = reference.make(settings(policy, every=2, decay=0.75, strength=0.5), Policy(family, unet))
    theta = flat(parameters)
    expected, before = theta.clone(), theta.clone()
    for step in range(1, 7):
        move(parameters, 10 + step)
        theta = flat(parameters)
        made.after_update(step)
        if step % 2 == 0:
            if policy == "ema":
                expected = 0.75 * expected + 0.25 * theta
            elif policy == "sync":
                expected = theta
            elif policy == "accelerated":
                expected, before = 1.5 * theta - 0.5 * before, theta
                theta = expected
            else:
                expected, before = expected + 0.25 * (theta - before), theta
        torch.testing.assert_close(flat(made.weights.values()), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(flat(parameters), theta, rtol=0, atol=1e-6)


def test_an_average_of_factors_misses_that_of_the_products_by_its_second_order_term(tiny_sdxl):
    family, unet, parameters = policy_on(tiny_sdxl)
    made = reference.make(settings("ema", decay=0.7), Policy(family, unet))
    name = next(name for name in made.weights if name.endswith("lora_A.weight"))
    policy = dict(unet.named_parameters())

    def factors(adapter):
        names = [name.replace("lora_A", f"lora_{factor}.{adapter}") for factor in "AB"]
        return [policy[each].detach().double().clone() for each in names]

    a, b = factors("reference")
    move(parameters, 3)
    a_new, b_new = factors("default")
    made.after_update(1)
    a_mean, b_mean = factors("reference")
    products = 0.7 * b @ a + 0.3 * b_new @ a_new
    gap = 0.7 * 0.3 * (b_new - b) @ (a_new - a)
    assert gap.abs().max() > 1e-4
    torch.testing.assert_close(b_mean @ a_mean, products - gap, rtol=0, atol=1e-7)


@pytest.mark.parametrize("policy", MOVING)
def test_a_resumed_reference_goes_on_bit_for_bit(tiny_sdxl, policy, tmp_path):
    family, unet, parameters = policy_on(tiny_sdxl)
    made = reference.make(settings(policy), Policy(family, unet))
    for step in (1, 2):
        move(parameters, step)
        made.after_update(step)
    about = {"base": {}, "data_hash": "", "pairs_per_update": 1}
    state = {"reference": made.state()}
    checkpoint.save(
        tmp_path, 2, lambda part: lora.save_lora(part / lora_file.FILE_NAME, unet, "unet", about), state, about, 1
    )
    folder, _ = checkpoint.latest(tmp_path)

    _, again, others = policy_on(tiny_sdxl, seed=5)
    resumed = reference.make(settings(policy), Policy(family, again))
    weights, _ = lora_file.read_lora(folder)
    lora.set_lora_state(again, {name.split(".", 1)[1]: value for name, value in weights.items()})
    resumed.load(checkpoint.read_state(folder)["reference"])
    for theirs, each in ((parameters, made), (others, resumed)):
        move(theirs, 3)
        each.after_update(3)
    assert torch.equal(output(family, unet), output(family, again))
    with made.on(), resumed.on():
        assert torch.equal(output(family, unet), output(family, again))
    assert made.state().keys() == resumed.state().keys()
    assert all(torch.equal(value, resumed.state()[name]) for name, value in made.state().items())


def test_the_state_of_another_reference_is_refused(tiny_sdxl):
    family, unet, _ = policy_on(tiny_sdxl)
    made = reference.make(settings("accelerated"), Policy(family, unet))
    state = made.state()
    with pytest.raises(DiffpoError, match=r"objective\.reference\.policy"):
        reference.Reference(made.policy).load(state)
    with pytest.raises(DiffpoError, match=r"objective\.reference\.policy=accelerated .*before\."):
        made.load({name: value for name, value in state.items() if name.startswith("reference.")})
    name = next(iter(state))
    with pytest.raises(DiffpoError, match=name):
        made.load({**state, name: state[name][:1]})
