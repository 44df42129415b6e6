"""``calibrate``: the tables of `kvt` for one model, from some texts.

How much the next token's distribution moves when the cache does is, for small changes, half their square weighted by
the Fisher information: the mean square of the gradients of the log-probability of tokens drawn from the model
(Kunstner et al., arXiv 1905.12558, say what it is and what it is not). Its diagonal, averaged over the prefix, weights
the channels of all layers in one unit; the eigenvectors of the weighted covariance are the basis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from ghostcacher.adapters.base import base_module
from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.probe import QuietCache, Shape, input_device
from ghostcacher.blocks import TensorGroup
from ghostcacher.codecs.base import Piece
from ghostcacher.codecs.entropy import require
from ghostcacher.codecs.grouping import GROUP_TOKENS, SINK_TOKENS, coded_tokens, turn_of
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.tables import Table, Tables
from ghostcacher.errors import ConfigurationError, UnsupportedModelError
from ghostcacher.hooks import hooks_of
from ghostcacher.research.evaluate import PREFIX_TOKENS, SCORED_TOKENS, evaluate
from ghostcacher.research.replay import Replay

DRAWS = 3
CURVE_STEPS = (0.12, 0.25, 0.5, 1.0)
CURVE_TEXTS = 2
_EVEN_SHARE = 0.1
_WHOLE_WIDTH = 512
_LEAST = 1e-12

Progress = Callable[[str], None]


class Calibration(NamedTuple):
    """``tables``, and the id of the model's ``weights`` under which a store keeps them."""

    tables: Tables
    weights: str


def calibrate(
    model: Any, texts: Sequence[torch.Tensor], *, prefix_tokens: int = PREFIX_TOKENS,
    scored_tokens: int = SCORED_TOKENS, progress: Progress = lambda _: None,
) -> Calibration:  # fmt: skip
    """Learn tables from ``texts``, token ids ``[1, at least prefix_tokens + scored_tokens]`` each.

    Six texts of different kinds are enough. Runs the model forwards and backwards over each, and measures the curve
    on the first two. ``progress`` is told of each step, `steps_of` many. Changes neither model nor random state. What
    it gives is for ``store.shelf.put(tables, weights)``.

    Raises:
        ConfigurationError: no text, or one that is too short.
        MissingExtraError: there is no zstd, which the curve is measured with.
        UnsupportedModelError: nothing of the model's cache can be coded, or its state is not reused at all.
    """
    require()
    length = prefix_tokens + scored_tokens
    if not texts or any(text.shape[0] != 1 or text.shape[1] < length for text in texts):
        raise ConfigurationError(f"calibration needs texts of at least {length} tokens each, as [1, tokens]")
    module = base_module(model)
    shape = _shape_of(module)
    groups = [group for group in shape.layout.groups if coded_tokens(group, Piece(0, GROUP_TOKENS))]
    if not groups:
        raise UnsupportedModelError(f"{module.config.model_type}: no keys or values that kvt codes")
    sums = {group.name: _Sums.of(group) for group in groups}
    with _frozen(module):
        for number, text in enumerate(texts):
            _observe(module, shape, sums, text[:, :length].to(input_device(module)), prefix_tokens, seed=number)
            progress("gradients")
    tables = _learned(sums, shape, module.config.model_type)
    replays = [Replay.of(model, text[:, :length], prefix_tokens, prefix_tokens) for text in texts[:CURVE_TEXTS]]
    curve = []
    for step in CURVE_STEPS:
        curve.append((step, max(_LEAST, evaluate(model, KvtCodec(step, tables), replays, is_timed=False).kl)))
        progress("curve")
    return Calibration(replace(tables, curve=_rising(curve)), shape.layout.weights)


def steps_of(texts: int) -> int:
    """How often `calibrate` tells of progress."""
    return texts + len(CURVE_STEPS)


@dataclass(slots=True)
class _Sums:
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
    def of(cls, group: TensorGroup) -> _Sums:
        layers, heads, _, channels = group.shape(1)
        parts = 1 if heads * channels <= _WHOLE_WIDTH else heads
        width = heads * channels // parts
        per_channel = torch.zeros((layers, heads * channels), dtype=torch.float64)
        products = torch.zeros((layers, parts, width, width), dtype=torch.float64)
        counts = torch.zeros((layers, 1), dtype=torch.float64)
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
        even = weights.mean(dim=1, keepdim=True).clamp(min=_LEAST)
        roots = ((1 - _EVEN_SHARE) * weights + _EVEN_SHARE * even).sqrt().view_as(by_part)
        spreads, vectors = torch.linalg.eigh(roots[..., :, None] * covariance * roots[..., None, :])
        basis, spreads = (vectors / roots[..., :, None]).flip(-1), spreads.flip(-1).clamp(min=0).sqrt()
        return mean.float(), basis, spreads.reshape_as(mean)


def _observe(
    module: Any, shape: Shape, sums: dict[str, _Sums], text: torch.Tensor, prefix_tokens: int, *, seed: int
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


def _learned(sums: dict[str, _Sums], shape: Shape, model_type: str) -> Tables:
    """All tables in one unit: step 1 is the geometric mean of the layers' spreads."""
    found = {name: held.learned() for name, held in sums.items()}
    spreads = torch.cat([spread.square().mean(dim=1).sqrt() for _, _, spread in found.values()])
    unit = float(spreads.clamp(min=_LEAST).log().mean().exp())
    groups = {
        name: Table.of(mean, basis * unit, (spread / unit).float()) for name, (mean, basis, spread) in found.items()
    }
    return Tables(groups, shape.layout.rotation, (), model_type)


def _rising(curve: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """``curve`` with each KL above the one before: on few tokens, fine steps may measure as noise."""
    rising: list[tuple[float, float]] = []
    for step, kl in curve:
        rising.append((step, max(kl, rising[-1][1] * (1 + 1e-3)) if rising else kl))
    return tuple(rising)


def _shape_of(module: Any) -> Shape:
    hooks = hooks_of(module)
    hooks.prepare()
    if hooks.adapter.shape is None or hooks.adapter.refusal:
        raise UnsupportedModelError(hooks.adapter.refusal or "the model's cache layout is not known")
    hooks.adapter.weigh(module)
    return hooks.adapter.shape


def _run(module: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits ``[1, tokens, vocabulary]`` of ``ids`` after what ``cache`` holds."""
    reader, begin = CallReader(module), int(cache.get_seq_length())
    given = {reader.cache_name: cache, "use_cache": True, "return_dict": True}
    if reader.takes_positions:
        given["position_ids"] = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
    logits: torch.Tensor = module(ids, **given).logits
    return logits


@contextlib.contextmanager
def _frozen(module: Any) -> Iterator[None]:
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
