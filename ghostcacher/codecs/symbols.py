"""Integer codes to bytes: rows of like spread share a zstd frame, small codes share a byte.

Codes come as ``[layers, rows, columns]``. Layers are coded in runs (see `runs`): a run is what is unpacked at once. In
a run, the rows of one class make one of the `frames`, with a Huffman table that fits them. Codes that do not fit are
`outliers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from ghostcacher.codecs.base import Spread, one_by_one
from ghostcacher.codecs.classes import Classes
from ghostcacher.codecs.frames import ADDED, MOST_ADDED, Arrange, Frame, Run, lent, smallest, unpack_into
from ghostcacher.codecs.header import VARIABLE, TensorField
from ghostcacher.codecs.outliers import Outliers, packed, unpacked
from ghostcacher.errors import BlockError
from ghostcacher.transfers import on_device

RUN_VALUES = 2**20
CODE_LIMIT = 2**24
PLACES_LIMIT = 2**31
Parts = Mapping[str, torch.Tensor]


def runs(layers: int, values: int) -> list[slice]:
    """Layers taken together: as many as hold `RUN_VALUES`, at least one; ``values`` are those of one."""
    step = max(1, RUN_VALUES // max(1, values))
    return [slice(begin, min(begin + step, layers)) for begin in range(0, layers, step)]


def _as_they_are(codes: torch.Tensor, _width: int) -> torch.Tensor:
    return codes


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of ``layers``, as ``symbols`` ``[n]``, and outliers, all in the order in which they were packed.

    They are U8 with something ``added``, or int8 without. ``width`` of them shared a byte; 1 where layers have several
    frames, or none. If ``is_lent``, they lie in memory that must not be changed.
    """

    layers: slice
    symbols: torch.Tensor
    added: int
    outliers: Outliers
    width: int = 1
    is_lent: bool = False

    def in_one_phase(self, channels: int) -> Codes:
        """These codes where they were in phases (see `orders`) of ``channels`` a token, token by token instead."""
        if self.width == 1:
            return self
        symbols = torch.cat(self.symbols.view(self.width, -1, channels).unbind(), dim=-1)
        phase, row, channel = np.unravel_index(self.outliers.places, (self.width, len(symbols), channels))
        places = (row * self.width + phase) * channels + channel
        return Codes(self.layers, symbols.view(-1), self.added, Outliers(places, self.outliers.codes))

    def in_int8(self) -> tuple[torch.Tensor, Outliers]:
        """What int8 holds of each code, and of those that are larger the rest, in units of 256.

        Changes ``symbols`` unless they are lent.
        """
        small, codes = self._small(), self.outliers.codes.astype(np.int64)
        lowest = codes.astype(np.int8)
        small.numpy()[self.outliers.places] = lowest
        rest = Outliers(self.outliers.places, ((codes - lowest) // 256).astype(np.float32))
        return small, rest.where(rest.codes != 0)

    def _small(self) -> torch.Tensor:
        if self.symbols.dtype is torch.int8:
            return self.symbols
        own = torch.empty_like(self.symbols) if self.is_lent else self.symbols
        return torch.sub(self.symbols, self.added, out=own).view(torch.int8)

    def put(self, into: torch.Tensor) -> None:
        """Write them, still with what was ``added``, ``into`` fp32 memory ``[n]``."""
        into.copy_(on_device(self.symbols, into.device))
        places, codes = self.outliers.places, self.outliers.codes + self.added
        if into.device.type == "cpu":
            # Twice as fast as `put_`.
            into.numpy()[places] = codes
        elif len(places):
            into.put_(torch.from_numpy(places).to(into.device), torch.from_numpy(codes).to(into.device))


@dataclass(frozen=True, slots=True)
class _Coded:
    """A run of ``layers``: its ``frames``, each with how many codes share a byte, and outliers."""

    layers: slice
    frames: Sequence[tuple[memoryview, int]]
    outliers: Outliers


@dataclass(frozen=True, slots=True)
class SymbolCoder:
    """Codes ``[layers, rows, columns]`` under the name ``name``, rows in ``classes``: so many frames has a run."""

    name: str
    layers: int
    rows: int
    columns: int
    classes: Classes

    @property
    def runs(self) -> list[slice]:
        """See `runs`."""
        return runs(self.layers, self.rows * self.columns)

    def fields(self) -> tuple[TensorField, ...]:
        """``sizes`` and ``codes_a_byte`` of each run's frames, and how many of its codes are ``outliers``."""
        count, name = len(self.runs), self.name
        return (
            TensorField(f"{name}.sizes", "I32", (count, self.classes.count)),
            TensorField(f"{name}.outlier_counts", "I32", (count,)),
            TensorField(f"{name}.codes_a_byte", "U8", (count, self.classes.count)),
            TensorField(f"{name}.frames", "U8", (VARIABLE,)),
            TensorField(f"{name}.outlier_planes", "U8", (VARIABLE,)),
        )

    def pack(self, codes: torch.Tensor, arranged: Arrange = _as_they_are) -> dict[str, torch.Tensor]:
        """`fields` of whole numbers ``codes`` in fp32; they may be ``arranged`` anew if all rows are of one class.

        Raises:
            BlockError: ``geometry``: a run has 2^31 codes or more, whose places have no number.
        """
        if self.runs and (self.runs[0].stop * self.rows * self.columns) >= PLACES_LIMIT:
            raise BlockError("geometry", f"{self.name}: {self.rows * self.columns} codes in a layer of one block")
        frames: list[Frame] = []
        outliers: list[Outliers] = []
        for run in self.runs:
            rows = codes[run].reshape(-1, self.columns)
            small = rows.clamp(-MOST_ADDED, MOST_ADDED - 1).to(torch.int8).cpu()
            given = Run(rows.cpu(), small, arranged)
            own = [smallest(given, chosen) for chosen in self.classes.chosen(run)]
            frames += own
            outliers.append(Outliers.of([frame.outliers for frame in own]))
        shape, name = (-1, self.classes.count), self.name
        return {
            f"{name}.sizes": _numbers([len(frame.data) for frame in frames], torch.int32).view(shape),
            f"{name}.outlier_counts": _numbers([len(each) for each in outliers], torch.int32),
            f"{name}.codes_a_byte": _numbers([frame.width for frame in frames], torch.uint8).view(shape),
            f"{name}.frames": _bytes(b"".join(frame.data for frame in frames)),
            f"{name}.outlier_planes": _bytes(packed(outliers)),
        }

    def unpack(self, parts: Parts, take: Callable[[Codes], None], spread: Spread = one_by_one) -> None:
        """Give ``take`` all codes, one run of layers at a time on each thread that ``spread`` has.

        Raises:
            BlockError: ``frame``: sizes, widths or codes that `pack` does not write.
        """
        spread(lambda coded: take(self._codes(coded)), self._coded(parts))

    def _coded(self, parts: Parts) -> list[_Coded]:
        """The runs as they are stored."""
        sizes, widths = parts[f"{self.name}.sizes"].tolist(), parts[f"{self.name}.codes_a_byte"].tolist()
        flat, data = [size for own in sizes for size in own], parts[f"{self.name}.frames"].numpy().data
        if min(flat, default=0) < 0 or sum(flat) != len(data):
            raise BlockError("frame", f"{self.name}: sizes that do not fit the frames")
        ends = list(accumulate(flat))
        frames, several = iter([data[end - size : end] for size, end in zip(flat, ends, strict=True)]), self.runs
        codes = [(run.stop - run.start) * self.rows * self.columns for run in several]
        counts = parts[f"{self.name}.outlier_counts"].tolist()
        outliers = unpacked(parts[f"{self.name}.outlier_planes"].numpy().data, counts, codes)
        return [
            _Coded(run, [(next(frames), width) for width in own], found)
            for run, own, found in zip(several, widths, outliers, strict=True)
        ]

    def _codes(self, coded: _Coded) -> Codes:
        run, rows = coded.layers, (coded.layers.stop - coded.layers.start) * self.rows
        if [width for _, width in coded.frames] == [1]:
            symbols = lent(coded.frames[0][0], rows * self.columns)
            return Codes(run, symbols, ADDED[1], coded.outliers, is_lent=True)
        symbols = torch.empty((rows, self.columns), dtype=torch.uint8, device="cpu")
        if len(coded.frames) == 1:
            [(frame, width)] = coded.frames
            unpack_into(frame, width, symbols)
            return Codes(run, symbols.view(-1), ADDED[width], coded.outliers, max(width, 1))
        counts, places = self.classes.sorted(run)
        for (frame, width), part in zip(coded.frames, torch.split(symbols, counts), strict=True):
            unpack_into(frame, width, part, less=ADDED.get(width, 0))
        return Codes(run, symbols.index_select(0, places).view(torch.int8).view(-1), 0, coded.outliers)


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _numbers([], torch.uint8)


def _numbers(numbers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device="cpu")
