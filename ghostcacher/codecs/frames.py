"""One class of one run of codes as a zstd frame, and back.

A byte holds 1, 2 or 4 codes, whatever makes the frame smallest: without it no code could take less than a bit. They are
as far apart from each other as they can be: unpacking runs over long pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from ghostcacher.codecs.entropy import compress, decompress
from ghostcacher.codecs.outliers import Outliers
from ghostcacher.errors import BlockError

MOST_ADDED = 128
"""A symbol is its code plus that, or plus less."""

WIDTHS = (1, 2, 4)
ADDED = {0: 0, 1: MOST_ADDED, 2: 8, 4: 2}
"""By how many symbols share a byte; 0: there is no frame, as all codes are 0."""

_OUTLIER_BYTES = 2
_OUTLIERS_SHARE = 0.02


Arrange = Callable[[torch.Tensor, int], torch.Tensor]
"""Codes ``[rows, columns]`` in the order in which they are packed, so many to a byte."""


@dataclass(frozen=True, slots=True)
class Run:
    """``codes`` ``[rows, columns]`` in fp32, and those nearest to them in int8; how they are ``arranged``."""

    codes: torch.Tensor
    small: torch.Tensor
    arranged: Arrange


@dataclass(frozen=True, slots=True)
class Frame:
    """One class of one run; places of ``outliers`` are within the run."""

    data: bytes
    width: int
    outliers: Outliers

    @property
    def cost_bytes(self) -> int:
        """Of the frame and about what its outliers take."""
        return len(self.data) + _OUTLIER_BYTES * len(self.outliers)


def smallest(run: Run, chosen: torch.Tensor) -> Frame:
    """The frame of the rows ``chosen`` of ``run``; none if all their codes are 0.

    Where it is not of all rows, `Run.arranged` must leave them as they are.
    """
    small = run.small[chosen] if len(chosen) < len(run.small) else run.small
    if not bool(small.any()):
        return Frame(b"", 0, Outliers.none())
    frames = [frame for width in WIDTHS if (frame := _frame(run, chosen, small, width)) is not None]
    return min(frames, key=lambda frame: frame.cost_bytes)


def _frame(run: Run, chosen: torch.Tensor, small: torch.Tensor, width: int) -> Frame | None:
    added = ADDED[width]
    # Codes below the range wrap to its other side: one comparison finds both.
    symbols = run.arranged(small, width).reshape(-1).numpy().view(np.uint8) + np.uint8(added)
    beyond = symbols >= 2 * added if width > 1 else (symbols == 0) | (symbols == 2 * added - 1)
    if width > 1 and np.count_nonzero(beyond) > symbols.size * _OUTLIERS_SHARE:
        return None
    at = np.flatnonzero(beyond)
    row, column = np.divmod(at, small.shape[1])
    places = chosen.numpy()[row] * small.shape[1] + column
    codes = run.arranged(run.codes, width).reshape(-1).numpy()[places] if len(at) else np.empty(0, np.float32)
    is_out = (codes < -added) | (codes >= added)
    # An outlier is 0 here, which costs least.
    symbols[at[is_out]] = added
    parts = symbols.reshape(width, -1)
    packed = parts[0].copy()
    for number in range(1, width):
        packed |= parts[number] << (8 // width * number)
    return Frame(compress(packed.data), width, Outliers(places[is_out], codes[is_out]))


def lent(frame: memoryview, count: int) -> torch.Tensor:
    """The symbols of a frame with one in each byte, ``[count]`` U8, where they were decompressed to: not to be changed.

    A copy where NumPy does not lend such memory (before 2.1).

    Raises:
        BlockError: ``frame``: not one whole frame of that many.
    """
    symbols = np.frombuffer(decompress(frame, count), dtype=np.uint8)
    try:
        found: torch.Tensor = from_dlpack(symbols)
    except BufferError:
        found = torch.from_numpy(symbols.copy())
    return found


def unpack_into(frame: memoryview, width: int, into: torch.Tensor, *, less: int = 0) -> None:
    """The symbols of one frame, less something, into ``into`` ``[rows, columns]`` U8.

    Raises:
        BlockError: ``frame``: not one whole frame of that many, or a width that `smallest` does not choose.
    """
    if width == 0 and not len(frame):
        into.zero_()
        return
    if width not in WIDTHS or into.numel() % width or not into.numel():
        raise BlockError("frame", f"{width} codes in a byte")
    # In NumPy: torch would copy bytes that it must not write to.
    packed = np.frombuffer(decompress(frame, into.numel() // width), dtype=np.uint8)
    parts, bits = into.numpy().reshape(width, -1), 8 // width
    for number, part in enumerate(parts):
        lowest = np.right_shift(packed, bits * number, out=part) if number else packed
        lowest = np.bitwise_and(lowest, 2**bits - 1, out=part) if number < width - 1 else lowest
        if less or lowest is packed:
            np.subtract(lowest, less, out=part)
