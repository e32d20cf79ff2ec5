"""Where a condition vector (a user's taste, the weights of several rewards) enters the network.

A small network turns the vector into a few tokens. A UNet attends to them by decoupled cross-attention, as IP-Adapter
does (Ye et al. 2023, arXiv 2308.06721) and PPD after it: each cross-attention layer gets keys and values of the tokens
of its own, and its output is the sum of both attentions, with the queries and the output projection of the layer. The
values start at 0, so the policy starts exactly as the reference. In a network with joint attention the tokens are added
to the last positions of the text embedding, which are padding in all but the longest prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import models

TOKENS, HIDDEN, WIDTH = 4, 128, 64


class UserTokens(torch.nn.Module):
    """Vectors (n, F) -> tokens (n, TOKENS, width).

    Attributes:
        scale: what a vector is divided by, (F,).
        keys, values: of each cross-attention layer; none in a network with joint attention.
        user: the vector (F,) for calls without the keyword ``user`` (generation), or None.
        silent: nothing is added (the reference).
        now: the tokens of the call at hand, for the layers.
    """

    def __init__(self, scale: Tensor, width: int, inner: list[tuple[int, int]], prototypes: int = 0) -> None:
        """``width``: of the text embedding. ``inner``: of each cross-attention layer, as keys and as values.
        ``prototypes``: tokens are mixtures of so many sets of tokens, with weights that add up to 1 (PAL); 0: free."""
        super().__init__()
        self.register_buffer("scale", scale.detach().clone().float())
        self.hidden = torch.nn.Linear(len(scale), HIDDEN)
        self.width = WIDTH if inner else width
        self.mixture = torch.nn.Linear(HIDDEN, prototypes) if prototypes else None
        self.tokens = torch.nn.Linear(prototypes or HIDDEN, TOKENS * self.width, bias=not prototypes)
        self.keys = torch.nn.ModuleList(torch.nn.Linear(WIDTH, each, bias=False) for each, _ in inner)
        self.values = torch.nn.ModuleList(torch.nn.Linear(WIDTH, each, bias=False) for _, each in inner)
        for last in self.values or [self.tokens]:
            for parameter in last.parameters():
                torch.nn.init.zeros_(parameter)
        self.user: Tensor | None = None
        self.silent = False
        self.now: Tensor | None = None

    def forward(self, user: Tensor) -> Tensor:
        hidden = F.silu(self.hidden(user.float() / self.scale))
        if self.mixture is not None:
            hidden = self.mixture(hidden).softmax(1)
        return self.tokens(hidden).unflatten(1, (TOKENS, -1))


def attach(network: torch.nn.Module, scale: Tensor, seed: int = 0, prototypes: int = 0) -> UserTokens:
    """Give ``network`` a fresh `UserTokens` as its submodule ``user_tokens``; it then takes the keyword ``user``.

    Being a submodule, it trains under the same DDP wrapper. Attach after `identity.base_identity` has been taken.
    """
    width, layers = models.text_width(network), cross_attentions(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = [(_rows(each.to_k), _rows(each.to_v)) for each in layers]
        module = UserTokens(scale, width, inner, prototypes)
    network.user_tokens = module.to(network.device)
    network.register_forward_pre_hook(_take, with_kwargs=True)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(_Attend(module, number), with_kwargs=True)
    return network.user_tokens


def cross_attentions(network: torch.nn.Module) -> list[Any]:
    """The layers that attend to the text alone, in the network's order; none in a network with joint attention."""
    return [module for name, module in network.named_modules() if name.endswith(".attn2")]


def _rows(linear: Any) -> int:
    return linear.out_features


def _take(network: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: takes ``user`` (n, F) out of the keywords and makes its tokens."""
    module, text = network.user_tokens, kwargs["encoder_hidden_states"]
    user = kwargs.pop("user", None)
    if user is None and module.user is not None:
        user = module.user.to(text.device).expand(len(text), -1)  # both halves of guidance
    module.now = None
    if user is None or module.silent:
        return args, kwargs
    tokens = module(user)
    if module.keys:
        module.now = tokens
        return args, kwargs
    kwargs["encoder_hidden_states"] = torch.cat([text[:, :-TOKENS], text[:, -TOKENS:] + tokens.to(text.dtype)], 1)
    return args, kwargs


class _Attend:
    """Forward hook of the cross-attention layer ``number``: adds the attention to the tokens of the call at hand.

    The tokens are kept until the next call, because gradient checkpointing runs the layer again in the backward pass.
    """

    def __init__(self, module: UserTokens, number: int) -> None:
        self.module, self.number = module, number

    def __call__(self, layer: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if self.module.now is None:
            return output
        tokens = self.module.now
        hidden = args[0] if args else kwargs["hidden_states"]
        projections = self.module.keys[self.number], self.module.values[self.number]
        query, key, value = (
            each.unflatten(2, (layer.heads, -1)).transpose(1, 2)
            for each in (layer.to_q(hidden), *(project(tokens).to(hidden.dtype) for project in projections))
        )
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        projected = layer.to_out[0](found)
        if layer.to_out[0].bias is not None:
            projected = projected - layer.to_out[0].bias.to(projected.dtype)
        return output + projected


@contextlib.contextmanager
def painting_for(network: torch.nn.Module, user: Tensor | None) -> Iterator[None]:
    """A context in which every call of ``network`` is conditioned on the vector ``user`` (F,), e.g. a pipeline's: in
    both halves of guidance. In the conditional half alone, guidance multiplies the taste and washes pictures out."""
    module = network.user_tokens
    before, module.user = module.user, user
    try:
        yield
    finally:
        module.user = before
