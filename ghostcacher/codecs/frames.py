"""One class of one run of codes as a zstd frame, and back.

A byte holds 1, 2 or 4 codes, whatever makes the frame smallest: without it no code could take less than a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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


@dataclass(frozen=True, slots=True)
class Run:
    """``codes`` ``[rows, columns]``, and those nearest to them in int8; ``apart`` as in `SymbolCoder`."""

    codes: NDArray[np.float32]
    small: NDArray[np.int8]
    apart: int


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


def smallest(run: Run, chosen: NDArray[np.int64]) -> Frame:
    """The frame of the rows ``chosen`` of ``run``; none if all their codes are 0."""
    small = run.small[chosen] if len(chosen) < len(run.small) else run.small
    if not small.any():
        return Frame(b"", 0, Outliers.none())
    frames = [frame for width in WIDTHS if (frame := _frame(run, chosen, small, width)) is not None]
    return min(frames, key=lambda frame: frame.cost_bytes)


def _frame(run: Run, chosen: NDArray[np.int64], small: NDArray[np.int8], width: int) -> Frame | None:
    added = ADDED[width]
    # Codes below the range wrap to its other side: one comparison finds both.
    symbols = small.view(np.uint8) + np.uint8(added)
    beyond = symbols >= 2 * added if width > 1 else (small == -added) | (small == added - 1)
    if width > 1 and np.count_nonzero(beyond) > small.size * _OUTLIERS_SHARE:
        return None
    at = np.flatnonzero(beyond)
    row, column = np.divmod(at, small.shape[1])
    places = chosen[row] * small.shape[1] + column
    codes = run.codes.reshape(-1)[places]
    is_out = (codes < -added) | (codes >= added)
    # An outlier is 0 here, which costs least.
    symbols.reshape(-1)[at[is_out]] = added
    parts = symbols.reshape(-1, width, run.apart or symbols.size // width)
    packed = parts[:, 0].copy()
    for number in range(1, width):
        packed |= parts[:, number] << (8 // width * number)
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


def unpack_into(frame: memoryview, width: int, apart: int, into: torch.Tensor, *, less: int = 0) -> None:
    """The symbols of one frame, less something, into ``into`` ``[rows, columns]`` U8.

    Raises:
        BlockError: ``frame``: not one whole frame of that many, or a width that `smallest` does not choose.
    """
    if width == 0 and not len(frame):
        into.zero_()
        return
    if width not in WIDTHS or into.numel() % (width * max(apart, 1)) or not into.numel():
        raise BlockError("frame", f"{width} codes in a byte")
    # In NumPy: torch would copy bytes that it must not write to.
    packed = np.frombuffer(decompress(frame, into.numel() // width), dtype=np.uint8)
    parts: NDArray[np.uint8] = into.numpy().reshape(-1, width, apart or len(packed))
    packed, bits = packed.reshape(-1, parts.shape[2]), 8 // width
    for number in range(width):
        part = parts[:, number]
        lowest = np.right_shift(packed, bits * number, out=part) if number else packed
        lowest = np.bitwise_and(lowest, 2**bits - 1, out=part) if number < width - 1 else lowest
        if less or lowest is packed:
            np.subtract(lowest, less, out=part)
