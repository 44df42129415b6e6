"""What codecs cost on one model, in nats a token, between the steps at which it was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ghostcacher.codecs.spoken import heard

STEEPEST = 8.0
"""A curve that was measured as noise may be flat: neither it nor its inverse is followed further than that."""


def between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The line through ``points`` at ``x``, in logarithms; beyond their ends it goes on as at them."""
    at = next((n for n, (known, _) in enumerate(points[1:-1], start=1) if x <= known), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    slope = math.log(y1 / y0) / math.log(x1 / x0)
    steepest = min(max(slope, -STEEPEST), STEEPEST)
    return float(y0 * (x / x0) ** steepest)


def cost_of(codec: str, costs: Mapping[str, float]) -> float | None:
    """What ``codec`` costs, by its spoken name, where others of its name were measured at other numbers.

    None if it was not measured, nor two others to go by.
    """
    if codec in costs:
        return costs[codec]
    try:
        (name, number), curves = heard(codec) or ("", ""), _curves(costs)
        found = between(sorted(curves[name].items()), float(number))
    except (LookupError, ValueError, ArithmeticError):
        return None
    return found if math.isfinite(found) else None


def checked_curve(points: Any) -> tuple[tuple[float, float], ...]:
    """Pairs of step and KL as a document has them; ValueError for what does not rise."""
    curve = tuple((float(c), float(kl)) for c, kl in points)
    rises = all(0 < a[0] < b[0] and 0 < a[1] < b[1] for a, b in pairwise(curve))
    if len(curve) == 1 or not rises:
        raise ValueError("a curve that does not rise")
    return curve


def checked_costs(found: Any) -> dict[str, float]:
    """KL by spoken name as a document has it; ValueError for what no KL is."""
    costs = {str(name): float(kl) for name, kl in dict(found).items()}
    if not all(0 < kl < math.inf for kl in costs.values()):
        raise ValueError("no divergence")
    return costs


def _curves(costs: Mapping[str, float]) -> dict[str, dict[float, float]]:
    """Steps and KL by codec, of those that have a step."""
    curves: dict[str, dict[float, float]] = {}
    for spoken, kl in costs.items():
        name, number = heard(spoken) or ("", "")
        if number:
            curves.setdefault(name, {})[float(number)] = kl
    return curves
