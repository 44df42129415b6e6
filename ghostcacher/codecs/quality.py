"""``quality(kl)``: the user says what a prefix may cost, in nats a token; the codec is found for each prompt.

From coarse to fine: `kvt` at the step that the model's curve gives for the budget, at half of it, `int8`. The first
whose replay keeps the budget is taken (see `ghostcacher.tiers.certifying`). What cannot be replayed is stored exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ghostcacher.blocks import KVLayout
from ghostcacher.codecs.base import TensorCodec
from ghostcacher.codecs.ec import STEP_RANGE
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.tables import TablesSource
from ghostcacher.errors import ConfigurationError

KL_RANGE = (1e-6, 1.0)
MARGIN = 1.5
"""A replay of few tokens is an estimate: it must stay below the budget by this factor."""
_FINER = 0.5


@dataclass(frozen=True, slots=True)
class Rung:
    """One codec to try, and the KL that the model's curve says of it, if there is one."""

    codec: TensorCodec
    predicted: float | None


@dataclass(frozen=True, slots=True)
class QualityCodec:
    """At most ``kl`` nats a token, of what is certified; exact, whatever is not."""

    name: ClassVar[str] = "quality"
    lossy: ClassVar[bool] = True
    kl: float
    source: TablesSource | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, kl: float, source: TablesSource | None = None) -> QualityCodec:
        """The choice within ``kl``.

        Raises:
            ConfigurationError: ``kl`` is out of its range.
        """
        least, most = KL_RANGE
        if isinstance(kl, bool) or not isinstance(kl, int | float) or not least <= kl <= most:
            raise ConfigurationError(f"quality={kl!r}: nats a token, from {least:g} to {most:g}; 0.001 is about bf16")
        return cls(float(kl), source)

    def parameters(self) -> dict[str, Any]:
        """The budget."""
        return {"kl": self.kl}

    def for_layout(self, layout: KVLayout) -> TensorCodec:
        """What is stored without a certificate is stored exactly."""
        return RawCodec()

    def rungs(self, layout: KVLayout, kl: float) -> Iterator[Rung]:
        """Codecs for models of this layout that may cost ``kl``, the coarsest first."""
        tables = self.source.of_model(layout.weights) if self.source is not None else None
        if tables is not None and tables.curve:
            least, most = STEP_RANGE
            step = min(tables.step(kl / MARGIN), most)
            for c in (step, step * _FINER):
                if c >= least:
                    yield Rung(KvtCodec(c, tables), tables.kl(c))
        yield Rung(Int8Codec(), None)


def divergence(exact: torch.Tensor, coded: torch.Tensor) -> float:
    """Mean KL of ``coded`` from ``exact`` logits ``[tokens, vocabulary]``, in nats a token."""
    p, q = exact.double().log_softmax(-1), coded.double().log_softmax(-1)
    # Tokens that a model rules out have a logit of minus infinity, and cost nothing.
    return float(torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).mean())
