"""What texts show of a model's state: how it varies, and how much what the model says depends on each channel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.probe import QuietCache, Shape
from ghostcacher.blocks import TensorGroup
from ghostcacher.codecs.grouping import SINK_TOKENS, turn_of

DRAWS = 3
LEAST = 1e-12
"""No weight, spread or divergence counts as less: none of them is divided by 0, or has no logarithm."""

_EVEN_SHARE = 0.1
_WHOLE_WIDTH = 512


@dataclass(slots=True)
class Sums:
    """Of one group: sum of state, of its products part by part, of squared gradients, and of how many tokens.

    Layers of one group may hold unequally many: windows beside full attention.
    """

    group: TensorGroup
    parts: int
    state: torch.Tensor
    products: torch.Tensor
    squares: torch.Tensor
    tokens: torch.Tensor
    draws: torch.Tensor

    @classmethod
    def of(cls, group: TensorGroup) -> Sums:
        """Of nothing yet."""
        layers, heads, _, channels = group.shape(1)
        parts = 1 if heads * channels <= _WHOLE_WIDTH else heads
        width = heads * channels // parts
        per_channel = torch.zeros((layers, heads * channels), dtype=torch.float64, device="cpu")
        products = torch.zeros((layers, parts, width, width), dtype=torch.float64, device="cpu")
        counts = torch.zeros((layers, 1), dtype=torch.float64, device="cpu")
        return cls(group, parts, per_channel, products, per_channel.clone(), counts, counts.clone())

    def add_state(self, place: int, state: torch.Tensor) -> None:
        """State ``[tokens, n]`` of the layer at ``place``."""
        self.state[place] += state.sum(0).cpu()
        by_part = state.view(len(state), self.parts, -1).transpose(0, 1)
        self.products[place] += (by_part.transpose(1, 2) @ by_part).cpu()
        self.tokens[place] += len(state)

    def add_gradient(self, place: int, gradient: torch.Tensor, scored: int) -> None:
        """Gradients ``[tokens, n]`` of the log-probability of ``scored`` tokens."""
        self.squares[place] += gradient.square().sum(0).cpu() / scored
        self.draws[place] += len(gradient)

    def learned(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, basis and spread of a `Table`, at a step of its own."""
        tokens = self.tokens.clamp(min=1)
        mean = self.state / tokens
        by_part = mean.view(len(mean), self.parts, -1)
        covariance = self.products / tokens[..., None, None] - by_part[..., :, None] * by_part[..., None, :]
        weights = self.squares / self.draws.clamp(min=1)
        # A channel whose gradients were never seen is not free: a tenth of every weight is the layer's mean.
        even = weights.mean(dim=1, keepdim=True).clamp(min=LEAST)
        roots = ((1 - _EVEN_SHARE) * weights + _EVEN_SHARE * even).sqrt().view_as(by_part)
        spreads, vectors = torch.linalg.eigh(roots[..., :, None] * covariance * roots[..., None, :])
        basis, spreads = (vectors / roots[..., :, None]).flip(-1), spreads.flip(-1).clamp(min=0).sqrt()
        return mean.float(), basis, spreads.reshape_as(mean)


def observe(
    module: Any, shape: Shape, sums: dict[str, Sums], text: torch.Tensor, prefix_tokens: int, *, seed: int
) -> None:
    """Add what one text shows."""
    cache = QuietCache(config=module.config)
    with torch.no_grad():
        _run(module, text[:, :prefix_tokens], cache)
    places = [
        (held, place, cache.layers[layer]) for held in sums.values() for place, layer in enumerate(held.group.layers)
    ]
    leaves = []
    for held, _, layer in places:
        leaf = getattr(layer, held.group.spec.name).detach().requires_grad_()
        setattr(layer, held.group.spec.name, leaf)
        leaves.append(leaf)
    # Linear layers write their state in place, into what gradients need.
    with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
        scores = _run(module, text[:, prefix_tokens:], cache)[0].float().log_softmax(-1)
        for gradients in _gradients(scores, leaves, seed):
            for (held, place, _), gradient in zip(places, gradients, strict=True):
                held.add_gradient(place, _flat(held.group, shape, gradient, prefix_tokens), len(scores))
    for (held, place, _), leaf in zip(places, leaves, strict=True):
        held.add_state(place, _flat(held.group, shape, leaf.detach(), prefix_tokens))


def _gradients(scores: torch.Tensor, leaves: list[torch.Tensor], seed: int) -> Iterator[list[torch.Tensor]]:
    """Of the log-probability of tokens drawn from ``scores`` ``[tokens, vocabulary]``, `DRAWS` times."""
    generator = torch.Generator().manual_seed(seed)
    for draw in range(DRAWS):
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(scores.device)
        total = scores.gather(-1, drawn).sum()
        found = torch.autograd.grad(total, leaves, retain_graph=draw + 1 < DRAWS, allow_unused=True)
        yield [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, found, strict=True)
        ]


def _flat(group: TensorGroup, shape: Shape, held: torch.Tensor, tokens: int) -> torch.Tensor:
    """``held`` ``[1, heads, tokens, channels]``, the prefix's last tokens, as ``[tokens, n]`` before rope, no sinks."""
    start = tokens - held.shape[2]
    state = held[0].double().cpu()
    if turn := turn_of(group, shape.layout.rotation, start, held.shape[2]):
        state = turn.back(state.float()).double()
    return state.transpose(0, 1).flatten(1)[max(0, SINK_TOKENS - start) :]


def _run(module: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits ``[1, tokens, vocabulary]`` of ``ids`` after what ``cache`` holds."""
    reader, begin = CallReader(module), int(cache.get_seq_length())
    given = {reader.cache_name: cache, "use_cache": True, "return_dict": True}
    if reader.takes_positions:
        given["position_ids"] = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
    logits: torch.Tensor = module(ids, **given).logits
    return logits


@contextlib.contextmanager
def frozen(module: Any) -> Iterator[None]:
    """No gradients of weights, and no dropout."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    parts = [part for part in module.modules() if part.training]
    for weight in trained:
        weight.requires_grad = False
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad = True
        for part in parts:
            part.training = True
