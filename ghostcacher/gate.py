"""Whether a stored prefix is worth loading: never longer than computing it would take, as far as was measured.

A fetch from a store takes its latency and its bytes over its bandwidth, a prefill a time that grows with its tokens.
Both are straight lines through what was seen lately, kept by whoever does the work: a tier its own, a model its own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FADING = 0.9
"""What an observation still weighs after the next one."""

RETRY_SECONDS = 15.0
"""What was measured of a tier counts for so long: one that was too slow is tried again then."""

GRACE_SECONDS = 0.05
"""Loading may be estimated to take so much longer than computing: less is not worth a wrong estimate."""

GRACE_SHARE = 0.25
"""But no longer than this share of computing: a GPU prefills a thousand tokens in less than `GRACE_SECONDS`."""

LEAST_WAIT_SECONDS = 0.5
"""No fetch is given up earlier, however quickly its tokens are computed."""

REACH = 8.0
"""A line says nothing of amounts so much larger than those it was drawn through."""

OUTLIER = 5.0
"""A prefill so much slower than expected was something else: a pause of the user's between two steps."""

_LEAST_VARIANCE = 1e-9


class Line:
    """Seconds as ``a + b * amount``, with neither below 0, through observations that fade. Safe to share."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._latest = -math.inf
        self._most = self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """One observation."""
        with self._lock:
            self._latest = self._clock()
            self._most = max(amount, self._most * FADING)
            for name, value in (("_weight", 1.0), ("_x", amount), ("_y", seconds), ("_xx", amount * amount),
                                ("_xy", amount * seconds)):  # fmt: skip
                setattr(self, name, getattr(self, name) * FADING + value)

    def add_usual(self, amount: float, seconds: float) -> None:
        """As `add`, unless it took many times as long as the line says."""
        expected = self.seconds(amount)
        if expected is None or seconds <= OUTLIER * expected:
            self.add(amount, seconds)

    def seconds(self, amount: float, within_seconds: float = math.inf) -> float | None:
        """What the line says of ``amount``.

        None if the latest observation is not ``within_seconds`` of now, or none was of nearly so much.
        """
        with self._lock:
            is_old = self._clock() - self._latest >= within_seconds
            if is_old or not self._weight or amount > REACH * self._most:
                return None
            x, y = self._x / self._weight, self._y / self._weight
            variance = self._xx / self._weight - x * x
            covariance = self._xy / self._weight - x * y
        through_zero = y / x if x > 0 else 0.0
        is_flat = variance <= _LEAST_VARIANCE * max(1.0, x * x)
        slope = through_zero if is_flat else min(max(0.0, covariance / variance), through_zero)
        return max(0.0, y + slope * (amount - x))


@dataclass(frozen=True, slots=True)
class Leg:
    """Blocks that one tier would serve: up to which token, how many bytes, in what time (None: unknown)."""

    tier: str
    end_tokens: int
    size_bytes: int
    seconds: float | None


def worth_tokens(legs: Sequence[Leg], prompt_tokens: int, prefill: Line) -> int:
    """How many leading tokens to load so that loading them and computing the rest takes the least time.

    ``legs`` follow one another. What was never measured is taken to be worth its time: it is measured by being used.
    """
    cold = prefill.seconds(prompt_tokens)
    if cold is None:
        return legs[-1].end_tokens if legs else 0
    grace_seconds = min(GRACE_SECONDS, GRACE_SHARE * cold)
    best_tokens, best_seconds, loading = 0, cold, 0.0
    for leg in legs:
        loading += leg.seconds or 0.0
        rest = prefill.seconds(prompt_tokens - leg.end_tokens) or 0.0
        if loading + rest <= best_seconds + (0.0 if best_tokens else grace_seconds):
            best_tokens, best_seconds = leg.end_tokens, loading + rest
    return best_tokens
