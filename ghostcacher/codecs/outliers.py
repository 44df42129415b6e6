"""Codes that have no symbol: where they stand and what they are, as one zstd frame of byte planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ghostcacher.codecs.entropy import compress, decompress
from ghostcacher.errors import BlockError

_NUMBER_BYTES = 4
_WIDTHS_BYTES = 2


@dataclass(frozen=True, slots=True, eq=False)
class Outliers:
    """Of one run: ``places`` ``[n]``, which rise, and ``codes`` ``[n]``, whole numbers."""

    places: NDArray[np.int64]
    codes: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.places)

    @classmethod
    def of(cls, parts: Sequence[Outliers]) -> Self:
        """All of ``parts`` by place."""
        places = np.concatenate([part.places for part in parts])
        order = places.argsort()
        return cls(places[order], np.concatenate([part.codes for part in parts])[order])

    @classmethod
    def none(cls) -> Self:
        """No codes."""
        return cls(np.empty(0, np.int64), np.empty(0, np.float32))

    def where(self, chosen: NDArray[np.bool_]) -> Self:
        """Those that are ``chosen`` ``[n]``."""
        return type(self)(self.places[chosen], self.codes[chosen])


def packed(runs: Sequence[Outliers]) -> bytes:
    """All ``runs``; nothing if there are none.

    Two bytes say how many bytes a distance and a code take, sign included. Then comes one frame: all lowest bytes of
    the distances from one place to the next, all second ones, and so on; then those of the codes. Distances are
    smaller than places.
    """
    distances = np.concatenate([np.diff(run.places, prepend=-1) for run in runs])
    codes = np.concatenate([run.codes for run in runs]).astype(np.int64)
    if not len(codes):
        return b""
    widths = [int(np.abs(each).max()).bit_length() // 8 + 1 for each in (distances, codes)]
    planes = [_planes(each)[:width] for each, width in zip((distances, codes), widths, strict=True)]
    return bytes(widths) + compress(np.concatenate(planes).data)


def unpacked(data: memoryview, counts: Sequence[int], sizes: Sequence[int]) -> list[Outliers]:
    """What `packed` took: ``counts`` of them in each run, which has ``sizes`` codes.

    Raises:
        BlockError: ``frame``: counts or widths that cannot be, or places outside their run or out of order.
    """
    if min(counts, default=0) < 0 or any(count > size for count, size in zip(counts, sizes, strict=True)):
        raise BlockError("frame", "more outliers than codes")
    total, (of_distance, of_code) = sum(counts), data[:_WIDTHS_BYTES] if len(data) >= _WIDTHS_BYTES else (0, 0)
    if not total and not len(data):
        return [Outliers.none()] * len(counts)
    if not (total and 0 < of_distance <= _NUMBER_BYTES and 0 < of_code <= _NUMBER_BYTES):
        raise BlockError("frame", f"{total} outliers of {of_distance} and {of_code} bytes")
    frame = decompress(data[_WIDTHS_BYTES:], total * (of_distance + of_code))
    planes = np.frombuffer(frame, np.uint8).reshape(-1, total)
    distances, codes = _whole(planes[:of_distance]), _whole(planes[of_distance:]).astype(np.float32)
    if distances.min() <= 0:
        raise BlockError("frame", "outliers in another order")
    found, begin, ends = [], 0, distances.cumsum()
    for count, size in zip(counts, sizes, strict=True):
        own = slice(begin, begin + count)
        places = ends[own] - (ends[begin - 1] + 1 if begin else 1)
        if count and places[-1] >= size:
            raise BlockError("frame", "outliers outside their run")
        found.append(Outliers(places, codes[own]))
        begin += count
    return found


def _planes(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Bytes of ``numbers`` ``[n]``, ``[8, n]``, the lowest first."""
    return np.ascontiguousarray(numbers.astype("<i8").view(np.uint8).reshape(len(numbers), -1).T)


def _whole(planes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers of which ``planes`` ``[k, n]`` are the lowest bytes, with their sign."""
    numbers: NDArray[np.int64] = planes[-1].view(np.int8).astype(np.int64)
    for plane in planes[-2::-1]:
        numbers <<= 8
        numbers |= plane
    return numbers
