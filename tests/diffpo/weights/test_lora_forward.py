"""LoRA layers as training computes them, against float64 and against peft's own."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffpo.config import Lora
from diffpo.weights import lora_forward
from diffpo.weights.adapter import LoraWeights
from diffpo.weights.lora import add_lora

PAIRS, TOKENS, WIDTH = 3, 5, 32


class Attending(torch.nn.Module):
    """x (n, 7, WIDTH) and a text (n, TOKENS, WIDTH), with two layers of each."""

    def __init__(self):
        super().__init__()
        for name in ("to_q", "to_k", "to_v", "to_out"):
            setattr(self, name, torch.nn.Linear(WIDTH, WIDTH, bias=name == "to_out"))
        self.rows = []
        self.to_k.register_forward_hook(lambda _layer, given, _out: self.rows.append(len(given[0])))  # of the base

    def forward(self, x, text):
        inner = self.to_q(x).sin() @ self.to_k(text).transpose(1, 2) @ self.to_v(text)
        return self.to_out(inner) + inner


def network(dtype=torch.float32):
    torch.manual_seed(0)
    found = Attending().requires_grad_(False).to(dtype)
    weights = add_lora(found, Lora(rank=4, alpha=6.0), ["to_q", "to_k", "to_v", "to_out"])
    for each in weights:
        torch.nn.init.normal_(each, std=0.3)
    return found, weights


def inputs(alike=True):
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(PAIRS if alike else 2 * PAIRS, TOKENS, WIDTH, generator=draw)
    x = torch.randn(2 * PAIRS, 7, WIDTH, generator=draw)
    return x, text.repeat(2, 1, 1) if alike else text


def exact(weights, found, x, text):
    """Output and gradients in float64 with W + (alpha / rank) B A in place of each layer."""
    factors = [each.detach().double().requires_grad_() for each in weights]
    layers = [getattr(found, name).base_layer for name in ("to_q", "to_k", "to_v", "to_out")]
    q, k, v, out = (
        layer.weight.detach().double() + 1.5 * b @ a
        for layer, a, b in zip(layers, factors[::2], factors[1::2], strict=True)
    )
    inner = (x.double() @ q.T).sin() @ (text.double() @ k.T).transpose(1, 2) @ (text.double() @ v.T)
    output = inner @ out.T + layers[3].bias.detach().double() + inner
    return output.detach(), torch.autograd.grad(output.square().mean(), factors)


def passes(found, weights, x, text, recomputed=False):
    """The reference's output, the policy's, and the policy's gradients."""
    with lora_forward.shared(found, [text], 2):
        with LoraWeights(found).switched(None) as base:
            before = base(x, text)
        output = checkpoint(found, x, text, use_reentrant=False) if recomputed else found(x, text)
        return before, output, torch.autograd.grad(output.float().square().mean(), weights)


def gap(one, other):
    pairs = zip(one, other, strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("alike", [True, False])
def test_outputs_and_gradients_are_the_closed_form_and_shared_texts_are_computed_once(alike, recomputed):
    found, weights = network()
    x, text = inputs(alike)
    lora_forward.install(found)
    before, output, gradients = passes(found, weights, x, text, recomputed)
    base, _ = exact([torch.zeros_like(each) for each in weights], found, x, text)
    wanted, wanted_gradients = exact(weights, found, x, text)
    assert gap([before, output.detach()], [base, wanted]) < 1e-6 and gap(gradients, wanted_gradients) < 1e-6
    assert found.rows == [PAIRS if alike else 2 * PAIRS]  # by the reference; the policy adds its LoRA to that
    assert gap([found(x, text).detach()], [wanted]) < 1e-6 and len(found.rows) == 1  # nothing is kept after the update


def test_half_precision_is_no_coarser_than_pefts():
    errors = []
    for fast in (False, True):
        found, weights = network(torch.bfloat16)
        x, text = inputs()
        if fast:
            lora_forward.install(found)
        wanted, wanted_gradients = exact(weights, found, x.bfloat16(), text.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            _, output, gradients = passes(found, weights, x.bfloat16(), text.bfloat16())
        assert all(each.dtype == torch.float32 for each in gradients)
        errors.append((gap([output.detach()], [wanted]), gap(gradients, wanted_gradients)))
    peft, own = errors
    assert own[0] < 1.1 * peft[0] and own[1] < 1.1 * peft[1]
