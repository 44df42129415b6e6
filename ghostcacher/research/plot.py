"""Bits against KL as an SVG: no plotting library, one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from ghostcacher.research.evaluate import Measure

_WIDTH, _HEIGHT, _MARGIN = 760, 460, 60
_LEAST_KL = 1e-8


def draw(measures: Sequence[Measure]) -> str:
    """The frontier as a line (no other codec has fewer bits at that KL), every codec as a point with its name."""
    shown = [measure for measure in measures if measure.kl > _LEAST_KL]
    if not shown:
        shown = list(measures)
    most_bits = max(measure.bits for measure in shown) * 1.08
    low = math.floor(min(math.log10(max(measure.kl, _LEAST_KL)) for measure in shown))
    high = math.ceil(max(math.log10(max(measure.kl, _LEAST_KL)) for measure in shown))

    def place(measure: Measure) -> tuple[float, float]:
        depth = (math.log10(max(measure.kl, _LEAST_KL)) - low) / max(1, high - low)
        x = _MARGIN + measure.bits / most_bits * (_WIDTH - 2 * _MARGIN)
        return x, _HEIGHT - _MARGIN - depth * (_HEIGHT - 2 * _MARGIN)

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, _frontier(shown)))
    parts = [*_axes(most_bits, low, high), f'<polyline points="{line}" fill="none" stroke="#888"/>']
    for measure in shown:
        x, y = place(measure)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{y - 5:.1f}">{escape(measure.codec)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
    return "\n".join([head + 'font-size="12">', *parts, "</svg>", ""])


def _frontier(measures: Sequence[Measure]) -> list[Measure]:
    best: list[Measure] = []
    for measure in sorted(measures, key=lambda each: (each.bits, each.kl)):
        if not best or measure.kl < best[-1].kl:
            best.append(measure)
    return best


def _axes(most_bits: float, low: int, high: int) -> list[str]:
    floor, right, top = _HEIGHT - _MARGIN, _WIDTH - _MARGIN, _MARGIN
    parts = [
        f'<path d="M{_MARGIN} {top}V{floor}H{right}" fill="none" stroke="black"/>',
        f'<text x="{right - 60}" y="{floor + 40}">bits a value</text>',
        f'<text x="{_MARGIN - 50}" y="{top - 20}">KL, nats a token</text>',
    ]
    for bits in range(0, int(most_bits) + 1, 2):
        x = _MARGIN + bits / most_bits * (right - _MARGIN)
        parts.append(f'<text x="{x:.1f}" y="{floor + 18}">{bits}</text>')
    for power in range(low, high + 1):
        y = floor - (power - low) / max(1, high - low) * (floor - top)
        parts.append(f'<text x="8" y="{y + 4:.1f}">1e{power}</text>')
    return parts
