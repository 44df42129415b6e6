"""``calibrate``: the tables of `kvt` for one model, from some texts.

How much the next token's distribution moves when the cache does is, for small changes, half their square weighted by
the Fisher information: the mean square of the gradients of the log-probability of tokens drawn from the model
(Kunstner et al., arXiv 1905.12558, say what it is and what it is not). Its diagonal, averaged over the prefix, weights
the channels of all layers in one unit; the eigenvectors of the weighted covariance are the basis.

What other codecs cost on the model is measured beside it: ``stats`` of a store says it of its tiers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ghostcacher.adapters.base import base_module
from ghostcacher.adapters.probe import Shape, input_device
from ghostcacher.codecs.base import Piece, TensorCodec
from ghostcacher.codecs.entropy import require
from ghostcacher.codecs.grouping import GROUP_TOKENS, coded_tokens
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.quality import QualityCodec
from ghostcacher.codecs.registry import codec_named, record_of
from ghostcacher.codecs.spoken import spoken
from ghostcacher.codecs.tables import Table, Tables
from ghostcacher.errors import BlockError, ConfigurationError, UnsupportedModelError
from ghostcacher.hooks import hooks_of
from ghostcacher.research.evaluate import PREFIX_TOKENS, SCORED_TOKENS, evaluate
from ghostcacher.research.observing import LEAST, Sums, frozen, observe
from ghostcacher.research.replay import Replay

CURVE_STEPS = (0.12, 0.25, 0.5, 1.0)
CURVE_TEXTS = 2
COMPARED = ("bf16", "int8", "int4", "ec(0.12)", "ec(0.25)", "ec(0.5)", "ec(1)")
"""What is measured beside `kvt`, unless told otherwise: `ec` at as many steps as it takes to go between them."""

BLOCK_TOKENS = 128

Progress = Callable[[str], None]


class Calibration(NamedTuple):
    """``tables``, and the id of the model's ``weights`` under which a store keeps them."""

    tables: Tables
    weights: str


def calibrate(
    model: Any, texts: Sequence[torch.Tensor], *, prefix_tokens: int = PREFIX_TOKENS,
    scored_tokens: int = SCORED_TOKENS, codecs: Sequence[str] = COMPARED, progress: Progress = lambda _: None,
) -> Calibration:  # fmt: skip
    """Learn tables from ``texts``, token ids ``[1, at least prefix_tokens + scored_tokens]`` each.

    Six texts of different kinds are enough. Runs the model forwards and backwards over each, and measures the curve
    and what ``codecs`` cost on the first two, in blocks of 128 tokens. One that refuses the model's state,
    or ruins it, is left out.
    ``progress`` is told of each step, `steps_of` many. Changes neither model nor random state. What it gives is for
    ``store.shelf.put(tables, weights)``.

    Raises:
        ConfigurationError: no text, or one that is too short; an unknown codec, or one that needs tables itself.
        MissingExtraError: there is no zstd, which the curve is measured with, or a codec's package is not there.
        UnsupportedModelError: nothing of the model's cache can be coded, or its state is not reused at all; its logits
            are not finite.
    """
    require()
    compared = [_comparable(name) for name in codecs]
    length = prefix_tokens + scored_tokens
    if not texts or any(text.shape[0] != 1 or text.shape[1] < length for text in texts):
        raise ConfigurationError(f"calibration needs texts of at least {length} tokens each, as [1, tokens]")
    module = base_module(model)
    shape = _shape_of(module)
    groups = [group for group in shape.layout.groups if coded_tokens(group, Piece(0, GROUP_TOKENS))]
    if not groups:
        raise UnsupportedModelError(f"{module.config.model_type}: no keys or values that kvt codes")
    sums = {group.name: Sums.of(group) for group in groups}
    with frozen(module):
        for number, text in enumerate(texts):
            observe(module, shape, sums, text[:, :length].to(input_device(module)), prefix_tokens, seed=number)
            progress("gradients")
    tables = _learned(sums, shape, module.config.model_type)
    block_tokens = prefix_tokens if prefix_tokens % BLOCK_TOKENS else BLOCK_TOKENS
    replays = [Replay.of(model, text[:, :length], prefix_tokens, block_tokens) for text in texts[:CURVE_TEXTS]]
    curve = _curve(model, tables, replays, progress)
    costs = _costs(model, compared, replays, progress)
    return Calibration(replace(tables, curve=curve, costs=costs), shape.layout.weights)


def steps_of(texts: int, codecs: Sequence[str] = COMPARED) -> int:
    """How often `calibrate` tells of progress."""
    return texts + len(CURVE_STEPS) + len(codecs)


def _comparable(name: str) -> TensorCodec:
    """The codec of that name, if it can be measured without tables."""
    codec: TensorCodec = codec_named(name)
    if codec.name in {KvtCodec.name, QualityCodec.name}:
        raise ConfigurationError(f"codec={name!r} cannot be measured beside kvt: it is made of what is learned here")
    return codec


def _curve(
    model: Any, tables: Tables, replays: Sequence[Replay], progress: Progress
) -> tuple[tuple[float, float], ...]:  # fmt: skip
    """Steps and KL, each above the one before: on few tokens, fine steps may measure as noise."""
    rising: list[tuple[float, float]] = []
    for step in CURVE_STEPS:
        kl = _kl(model, KvtCodec(step, tables), replays)
        if not math.isfinite(kl):
            raise UnsupportedModelError(f"the model's logits give a KL of {kl}: nothing can be measured on it")
        rising.append((step, max(kl, rising[-1][1] * (1 + 1e-3)) if rising else kl))
        progress("curve")
    return tuple(rising)


def _costs(
    model: Any, codecs: Sequence[TensorCodec], replays: Sequence[Replay], progress: Progress
) -> dict[str, float]:  # fmt: skip
    """KL by spoken name."""
    costs = dict[str, float]()
    for codec in codecs:
        with contextlib.suppress(BlockError):
            kl = _kl(model, codec, replays)
            if math.isfinite(kl):
                costs[spoken(record_of(codec))] = kl
        progress("codecs")
    return costs


def _kl(model: Any, codec: TensorCodec, replays: Sequence[Replay]) -> float:
    """What ``codec`` costs, in nats a token; never 0, which has no logarithm."""
    kl = evaluate(model, codec, replays, is_timed=False).kl
    return kl if math.isnan(kl) else max(LEAST, kl)


def _learned(sums: dict[str, Sums], shape: Shape, model_type: str) -> Tables:
    """All tables in one unit: step 1 is the geometric mean of the layers' spreads."""
    found = {name: held.learned() for name, held in sums.items()}
    spreads = torch.cat([spread.square().mean(dim=1).sqrt() for _, _, spread in found.values()])
    unit = float(spreads.clamp(min=LEAST).log().mean().exp())
    groups = {
        name: Table.of(mean, basis * unit, (spread / unit).float()) for name, (mean, basis, spread) in found.items()
    }
    return Tables(groups, shape.layout.rotation, (), model_type)


def _shape_of(module: Any) -> Shape:
    hooks = hooks_of(module)
    hooks.prepare()
    if hooks.adapter.shape is None or hooks.adapter.refusal:
        raise UnsupportedModelError(hooks.adapter.refusal or "the model's cache layout is not known")
    hooks.adapter.weigh(module)
    return hooks.adapter.shape
