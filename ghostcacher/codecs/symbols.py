"""Integer codes to bytes: rows of like spread share a zstd frame, small codes share a byte.

Codes come as ``[layers, rows, columns]``. Layers are coded in runs (see `runs`): a run is what is unpacked at once. In
a run, the rows of one class make one frame, with a Huffman table that fits them. A byte holds 1, 2 or 4 codes, whatever
makes that frame smallest: without it no code could take less than a bit. Codes that do not fit are listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ghostcacher.codecs.entropy import compress, decompress
from ghostcacher.codecs.header import VARIABLE, TensorField
from ghostcacher.errors import BlockError

RUN_VALUES = 2**20
UNPACKED_VALUES = 2**18
WIDTHS = (1, 2, 4)
CODE_LIMIT = 2**24
PLACES_LIMIT = 2**31
_LISTED_BYTES = 3
_LISTED_SHARE = 0.02
_CODE_BYTES = 4
_MINUS = {1: 128, 2: 8, 4: 2}
Parts = Mapping[str, torch.Tensor]


def runs(layers: int, values: int, most: int = RUN_VALUES) -> list[slice]:
    """Layers taken together: as many as hold ``most`` values, at least one; ``values`` are those of one."""
    step = max(1, most // max(1, values))
    return [slice(begin, min(begin + step, layers)) for begin in range(0, layers, step)]


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of ``layers``: ``small`` ``[layers, rows, columns]`` int8, but at ``places`` ``[n]`` ``large`` ``[n]``."""

    layers: slice
    small: torch.Tensor
    places: NDArray[np.int64]
    large: NDArray[np.float32]

    def in_int8(self) -> tuple[torch.Tensor, NDArray[np.int64], NDArray[np.float32]]:
        """All codes that int8 holds and 0 for the others, and places and codes of those. Changes ``small``."""
        if not len(self.places):
            return self.small, self.places, self.large
        fits = np.abs(self.large) <= torch.iinfo(torch.int8).max
        self.small.view(-1).numpy()[self.places] = np.where(fits, self.large, 0)
        return self.small, self.places[~fits], self.large[~fits]

    def put(self, into: torch.Tensor, *, is_turned: bool = False) -> None:
        """Write them to fp32 memory of that many, or as ``[layers, columns, rows]`` if ``is_turned``."""
        layers, rows, columns = self.small.shape
        places = self.places
        if is_turned:
            for layer, to in zip(self.small.to(into.device), into.view(layers, columns, rows), strict=True):
                to.copy_(layer.float().t())
            row, column = np.divmod(places, columns)
            places = (row // rows * columns + column) * rows + row % rows
        else:
            into.view(self.small.shape).copy_(self.small.to(into.device))
        if len(places):
            into.view(-1)[torch.from_numpy(places).to(into.device)] = torch.from_numpy(self.large).to(into.device)


@dataclass(frozen=True, slots=True)
class SymbolCoder:
    """Codes ``[layers, rows, columns]`` under the name ``name``, with at most ``classes`` frames in a run."""

    name: str
    layers: int
    rows: int
    columns: int
    classes: int

    @property
    def runs(self) -> list[slice]:
        """See `runs`."""
        return runs(self.layers, self.rows * self.columns)

    def fields(self) -> tuple[TensorField, ...]:
        """``sizes`` and ``codes_a_byte`` of each run's frames, and how many codes of it are ``listed``."""
        count, name = len(self.runs), self.name
        return (
            TensorField(f"{name}.sizes", "I32", (count, self.classes)),
            TensorField(f"{name}.listed", "I32", (count,)),
            TensorField(f"{name}.codes_a_byte", "U8", (count, self.classes)),
            TensorField(f"{name}.frames", "U8", (VARIABLE,)),
            TensorField(f"{name}.list", "U8", (VARIABLE,)),
        )

    def pack(self, codes: torch.Tensor, classes: torch.Tensor) -> dict[str, torch.Tensor]:
        """`fields` of whole numbers ``codes`` in fp32, whose rows are in ``classes`` ``[layers, rows]``, U8.

        Raises:
            BlockError: ``geometry``: a run has 2^31 codes or more, whose places have no number.
        """
        codes, classes = codes.cpu(), classes.cpu()
        if self.runs and (self.runs[0].stop * self.rows * self.columns) >= PLACES_LIMIT:
            raise BlockError("geometry", f"{self.name}: {self.rows * self.columns} codes in a layer of one block")
        frames: list[_Frame] = []
        listed: list[torch.Tensor] = []
        for run in self.runs:
            rows, of_rows = codes[run].reshape(-1, self.columns), classes[run].reshape(-1)
            own = [_smallest(rows, (of_rows == number).nonzero()[:, 0]) for number in range(self.classes)]
            frames += own
            listed.append(_in_order(torch.cat([frame.listed for frame in own])))
        shape, name = (-1, self.classes), self.name
        return {
            f"{name}.sizes": _numbers([len(frame.data) for frame in frames], torch.int32).view(shape),
            f"{name}.listed": _numbers([len(each) for each in listed], torch.int32),
            f"{name}.codes_a_byte": _numbers([frame.width for frame in frames], torch.uint8).view(shape),
            f"{name}.frames": _bytes(b"".join(frame.data for frame in frames)),
            f"{name}.list": _planes(torch.cat(listed)),
        }

    def unpack(self, parts: Parts, classes: torch.Tensor) -> Iterator[Codes]:
        """All codes, a few layers at a time: what is done with them then stays in the processor's cache.

        Raises:
            BlockError: ``frame``: sizes, widths or codes that `pack` does not write.
        """
        sizes, widths = parts[f"{self.name}.sizes"], parts[f"{self.name}.codes_a_byte"]
        flat = sizes.flatten().tolist()
        data = parts[f"{self.name}.frames"]
        if min(flat, default=0) < 0 or sum(flat) != len(data) or int(classes.max()) >= self.classes:
            raise BlockError("frame", f"{self.name}: sizes that do not fit the frames")
        frames, listed = torch.split(data, flat), self._listed(parts)
        for number, run in enumerate(self.runs):
            own = frames[number * self.classes : (number + 1) * self.classes]
            small = _unpacked(own, widths[number].tolist(), classes[run].reshape(-1), self.columns)
            yield from self._by_layers(run, small.view(-1, self.rows, self.columns), listed[number])

    def _by_layers(self, run: slice, small: torch.Tensor, listed: torch.Tensor) -> Iterator[Codes]:
        values = self.rows * self.columns
        places, large = listed[:, 0].numpy().astype(np.int64), listed[:, 1].numpy().astype(np.float32)
        if len(places) and not (places[0] >= 0 and places[-1] < small.numel() and bool((np.diff(places) > 0).all())):
            raise BlockError("frame", f"{self.name}: listed codes outside their run, or in another order")
        for layers in runs(len(small), values, UNPACKED_VALUES):
            first, last = np.searchsorted(places, [layers.start * values, layers.stop * values])
            of_run = slice(run.start + layers.start, run.start + layers.stop)
            yield Codes(of_run, small[layers], places[first:last] - layers.start * values, large[first:last])

    def _listed(self, parts: Parts) -> tuple[torch.Tensor, ...]:
        counts = parts[f"{self.name}.listed"].tolist()
        most = self.layers * self.rows * self.columns
        if min(counts, default=0) < 0 or sum(counts) > most:
            raise BlockError("frame", f"{self.name}: more codes listed than there are")
        return torch.split(_from_planes(parts[f"{self.name}.list"], sum(counts)), counts)


@dataclass(frozen=True, slots=True)
class _Frame:
    """One class of one run: ``listed`` ``[codes, 2]`` are place within the run and code, int32."""

    data: bytes
    width: int
    listed: torch.Tensor

    @property
    def cost_bytes(self) -> int:
        return len(self.data) + _LISTED_BYTES * len(self.listed)


def _smallest(rows: torch.Tensor, chosen: torch.Tensor) -> _Frame:
    """The frame of the ``chosen`` ones of ``rows`` ``[rows, columns]``; none if all their codes are 0."""
    codes = rows[chosen]
    if not bool(codes.any()):
        return _Frame(b"", 0, torch.empty((0, 2), dtype=torch.int32, device="cpu"))
    most = codes.numel() * _LISTED_SHARE
    frames = [frame for width in WIDTHS if (frame := _frame(codes, chosen, width, most)) is not None]
    return min(frames, key=lambda frame: frame.cost_bytes)


def _frame(codes: torch.Tensor, chosen: torch.Tensor, width: int, most: float) -> _Frame | None:
    minus, columns = _MINUS[width], codes.shape[1]
    is_out = (codes < -minus) | (codes >= minus)
    out = is_out.nonzero()
    if len(out) > most and width > 1:
        return None
    places = chosen[out[:, 0]] * columns + out[:, 1]
    listed = torch.stack([places.to(torch.int32), codes[is_out].to(torch.int32)], dim=1)
    parts = (codes.clamp(-minus, minus - 1) + minus).to(torch.uint8).view(width, -1)
    symbols = parts[0].clone()
    for number, part in enumerate(parts[1:], start=1):
        symbols |= part << (8 // width * number)
    data: memoryview = symbols.numpy().data
    return _Frame(compress(data), width, listed)


def _in_order(listed: torch.Tensor) -> torch.Tensor:
    return listed[listed[:, 0].argsort()]


def _unpacked(frames: tuple[torch.Tensor, ...], widths: list[int], of_rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Codes of one run, ``[rows, columns]`` int8."""
    counts = of_rows.bincount(minlength=len(frames)).tolist()
    codes = torch.empty((len(of_rows), columns), dtype=torch.int8, device="cpu")
    begin = 0
    for frame, width, count in zip(frames, widths, counts, strict=True):
        _spread(frame, width, codes[begin : begin + count].view(-1))
        begin += count
    return codes if len(frames) == 1 else codes.index_select(0, _back_in_order(of_rows))


def _back_in_order(of_rows: torch.Tensor) -> torch.Tensor:
    """Where each row stands among rows sorted by class."""
    order = np.argsort(of_rows.numpy(), kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return torch.from_numpy(places)


def _spread(frame: torch.Tensor, width: int, into: torch.Tensor) -> None:
    """The codes of one frame into ``into`` ``[codes]`` int8."""
    if not len(into) or (width == 0 and not frame.numel()):
        into.zero_()
        return
    if width not in WIDTHS or len(into) % width:
        raise BlockError("frame", f"{width} codes in a byte")
    # In NumPy: torch would copy bytes that it must not write to.
    symbols = np.frombuffer(decompress(frame.numpy().data, len(into) // width), dtype=np.uint8)
    codes: NDArray[np.uint8] = into.view(torch.uint8).numpy()
    bits, minus = 8 // width, _MINUS[width]
    for number, part in enumerate(codes.reshape(width, -1)):
        np.right_shift(symbols, bits * number, out=part)
        if number < width - 1:
            np.bitwise_and(part, 2**bits - 1, out=part)
    np.subtract(codes, minus, out=codes)


def _planes(listed: torch.Tensor) -> torch.Tensor:
    """``[codes, 2]`` int32 as one frame, byte planes apart: the upper ones are almost constant."""
    if not len(listed):
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    planes = listed.contiguous().view(torch.uint8).view(-1, 2 * _CODE_BYTES).T.contiguous()
    return _bytes(compress(planes.view(-1).numpy().data))


def _from_planes(frame: torch.Tensor, count: int) -> torch.Tensor:
    if not count and not len(frame):
        return torch.empty((0, 2), dtype=torch.int32, device="cpu")
    planes = _bytes(decompress(frame.numpy().data, count * 2 * _CODE_BYTES)).view(2 * _CODE_BYTES, count)
    return planes.T.reshape(-1).view(torch.int32).view(count, 2)


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _numbers([], torch.uint8)


def _numbers(numbers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device="cpu")
