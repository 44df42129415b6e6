"""``sweep``: many codecs on the same texts, as a table and a plot."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ghostcacher.codecs.base import TensorCodec
from ghostcacher.research.evaluate import PREFIX_TOKENS, SCORED_TOKENS, Measure, evaluate
from ghostcacher.research.plot import draw
from ghostcacher.research.replay import Replay

LADDER = (
    "raw", "raw.z", "bf16", "int8", "int4", "ec(0.06)", "ec(0.12)", "ec(0.25)", "ec(0.35)", "ec(0.5)", "ec(0.7)",
    "ec(1.0)", "ec(1.4)", "ec(2.0)",
)  # fmt: skip
"""The codecs of this version, from exact to 1.2 bits a value."""


def sweep(
    model: Any, texts: Sequence[torch.Tensor], codecs: Sequence[str | TensorCodec] = LADDER, *,
    table: str | os.PathLike[str] | None = None, plot: str | os.PathLike[str] | None = None,
    prefix_tokens: int = PREFIX_TOKENS, scored_tokens: int = SCORED_TOKENS, block_tokens: int = 128,
    is_timed: bool = True,
) -> list[Measure]:  # fmt: skip
    """`evaluate` every codec on the same prefixes, which are computed once.

    ``is_timed`` as in `evaluate`. Writes ``table`` as CSV and ``plot`` as SVG (bits against KL) where they are given.
    Shows a progress bar on a terminal.

    Raises:
        What `evaluate` raises.
    """
    replays = [
        Replay.of(model, text[:, : prefix_tokens + scored_tokens], prefix_tokens, block_tokens)
        for text in tqdm(texts, desc="prefixes", disable=None)
    ]
    measures = [
        evaluate(model, codec, replays, is_timed=is_timed) for codec in tqdm(codecs, desc="codecs", disable=None)
    ]
    if table is not None:
        _write(measures, Path(table))
    if plot is not None:
        Path(plot).write_text(draw(measures))
    return measures


def _write(measures: Sequence[Measure], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measure)])
        writer.writeheader()
        writer.writerows(asdict(measure) for measure in measures)
