"""The quantized caches of transformers itself, measured as `evaluate` measures codecs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from transformers import QuantizedCache

from ghostcacher.errors import MissingExtraError
from ghostcacher.research.evaluate import Measure, quality
from ghostcacher.research.replay import Replay

GROUP = 64
_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}


def evaluate_quantized_cache(
    backend: Literal["quanto", "hqq"], bits: int, replays: Sequence[Replay], **options: Any
) -> Measure:
    """`QuantizedCache` with groups of 64 on prefixes that were computed before; ``options`` go to it.

    Its bits are counted as width plus an fp16 scale and zero of each group. It stores nothing and is not timed.

    Raises:
        MissingExtraError: the backend's package is not installed.
    """
    scores = []
    for replay in replays:
        try:
            cache = QuantizedCache(
                backend, replay.module.config, nbits=bits, q_group_size=GROUP, residual_length=1, **options
            )
            scores.append(quality(replay, replay.through(cache)))
        except ImportError as error:
            raise MissingExtraError(_PACKAGES[backend], "research", f"QuantizedCache({backend!r})") from error
    kls, top1s, changes = zip(*scores, strict=True)
    named = ", ".join([f"transformers {backend} int{bits}", *(f"{name} {value}" for name, value in options.items())])
    return Measure(
        named, bits + 2 * 16 / GROUP, 0.0, statistics.fmean(kls), min(kls), max(kls), statistics.fmean(top1s),
        statistics.fmean(changes), math.nan, math.nan,
    )  # fmt: skip
