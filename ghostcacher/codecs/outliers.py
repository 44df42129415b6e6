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
    """All ``runs`` in one frame; nothing if there are none.

    How far it is from one place to the next is stored, since that is a smaller number: upper bytes are nearly constant.
    """
    distances = np.concatenate([np.diff(run.places, prepend=-1) for run in runs])
    pairs = np.stack([distances, np.concatenate([run.codes for run in runs])], axis=1)
    if not len(pairs):
        return b""
    planes = np.ascontiguousarray(pairs.astype("<i4")).view(np.uint8).reshape(len(pairs), -1).T
    return compress(np.ascontiguousarray(planes).data)


def unpacked(frame: memoryview, counts: Sequence[int], sizes: Sequence[int]) -> list[Outliers]:
    """What `packed` took: ``counts`` of them in each run, which has ``sizes`` codes.

    Raises:
        BlockError: ``frame``: counts that cannot be, or places outside their run or out of order.
    """
    if min(counts, default=0) < 0 or any(count > size for count, size in zip(counts, sizes, strict=True)):
        raise BlockError("frame", "more outliers than codes")
    total = sum(counts)
    if not total and not len(frame):
        return [Outliers.none()] * len(counts)
    planes = np.frombuffer(decompress(frame, total * 2 * _NUMBER_BYTES), np.uint8).reshape(-1, total)
    pairs = np.ascontiguousarray(planes.T).view("<i4")
    found, begin = [], 0
    for count, size in zip(counts, sizes, strict=True):
        found.append(_checked(pairs[begin : begin + count], size))
        begin += count
    return found


def _checked(pairs: NDArray[np.int32], size: int) -> Outliers:
    distances, codes = pairs.T
    places = distances.cumsum(dtype=np.int64) - 1
    if len(places) and not (distances.min() > 0 and places[-1] < size):
        raise BlockError("frame", "outliers outside their run, or in another order")
    return Outliers(places, codes.astype(np.float32))
