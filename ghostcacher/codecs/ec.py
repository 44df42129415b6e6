"""``ec(c)``: a uniform quantizer and an entropy coder, from 6 down to 1.2 bits a value.

One step for all keys, or values, of a layer: ``c`` times the root mean square of what is left when each channel's mean
is taken away. A group of fixed width pays for its own outlier; an entropy coder does not. Keys are coded as they were
before rope where the layout says how they were turned: channels then keep their means. From ``c`` = 0.45 on two
tokens share a byte. Codes beyond the limit are cut there and listed in full. In long blocks channels of like spread,
half an octave apart, have a frame of their own, with a Huffman table that fits them. What is not coded: `grouping`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch

from ghostcacher.blocks import KVLayout, Rotation, TensorGroup, Turn
from ghostcacher.codecs.base import Piece
from ghostcacher.codecs.entropy import compress, decompress, require
from ghostcacher.codecs.grouping import (
    check_finite,
    coded_tokens,
    kept,
    put_kept,
    rest_fields,
    sink_dtype,
    sink_fields,
    sink_tokens,
)
from ghostcacher.codecs.header import VARIABLE, TensorField
from ghostcacher.errors import BlockError, ConfigurationError

PAIRED_FROM = 0.45
STEP_RANGE = (0.01, 8.0)
CLASSES = 8
CLASSED_FROM_TOKENS = 512
_LIMIT = 127
_PAIR_LIMIT = 7
_PAIR_BASE = 15
_CODE_BYTES = 4


@dataclass(frozen=True, slots=True)
class EntropyCodec:
    """``c`` is the step in units of the spread. Lossy: see docs/quantisation.md for what it costs."""

    name: ClassVar[str] = "ec"
    lossy: ClassVar[bool] = True
    c: float
    rotation: Rotation | None = field(default=None)

    @classmethod
    def of(cls, c: float, frequencies: Sequence[float] = (), *, interleaved: bool = False) -> EntropyCodec:
        """The codec of step ``c``; ``frequencies`` and ``interleaved`` say how keys were turned, see `Rotation`.

        Raises:
            ConfigurationError: ``c`` is out of its range.
        """
        least, most = STEP_RANGE
        if isinstance(c, bool) or not isinstance(c, int | float) or not least <= c <= most:
            raise ConfigurationError(f"ec({c!r}): a step from {least} to {most}; 0.25 is about 4 bits, 0.5 about 3")
        require()
        return cls(float(c), Rotation(tuple(map(float, frequencies)), bool(interleaved)) if frequencies else None)

    def parameters(self) -> dict[str, Any]:
        """The step, and how keys are turned."""
        if self.rotation is None:
            return {"c": self.c}
        turned = self.rotation
        return {"c": self.c, "frequencies": list(turned.frequencies), "interleaved": turned.interleaved}

    def for_layout(self, layout: KVLayout) -> EntropyCodec:
        """This codec with the layout's rotation: written into each block, so that it is read without the layout's."""
        return EntropyCodec(self.c, layout.rotation)

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """Means ``[layers, heads, channels]`` and steps ``[layers]`` BF16; zstd ``frames`` end to end.

        ``sizes`` ``[layers, classes]`` are the frames' bytes. ``classes`` ``[layers, heads, channels]`` is in which
        frame a channel is, for blocks that are long enough. ``escapes`` is one frame: the codes that were cut.
        """
        coded = coded_tokens(group, piece)
        if not coded:
            return rest_fields(group, piece, 0)
        layers, heads, _, channels = group.shape(coded)
        sinks, name = sink_tokens(piece, coded), group.name
        return (
            TensorField(f"{name}.mean", "BF16", (layers, heads, channels)),
            TensorField(f"{name}.step", "BF16", (layers,)),
            TensorField(f"{name}.sizes", "I32", (layers, _classes(coded))),
            TensorField(f"{name}.frames", "U8", (VARIABLE,)),
            TensorField(f"{name}.escapes", "U8", (VARIABLE,)),
            *([TensorField(f"{name}.classes", "U8", (layers, heads, channels))] if _classes(coded) > 1 else []),
            *sink_fields(group, sinks),
            *rest_fields(group, piece, coded),
        )

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """See `fields`.

        Raises:
            BlockError: ``nonfinite``: NaN, infinity, or a spread that overflows.
        """
        coded, name = coded_tokens(group, piece), group.name
        if not coded:
            return {f"{name}.rest": tensor}
        sinks = sink_tokens(piece, coded)
        values = tensor[..., :coded, :].to(torch.float32, copy=True)
        if turn := self._turn(group, coded, piece.start):
            values = turn.back(values)
        values = values.transpose(2, 3).contiguous()
        mean = values[..., sinks:].mean(dim=-1, keepdim=True).bfloat16()
        values = values.sub_(mean)
        values[..., :sinks] = 0.0
        step = (self.c * _spread(values[..., sinks:])).bfloat16()
        first = tensor[..., :sinks, :].to(sink_dtype(group))
        # Turned keys are at most the square root of two larger than either of a pair; a code is off by half a step.
        largest = 1.5 * (values.abs().amax() + mean.float().abs().amax() + step.float().amax())
        check_finite(group, mean, step, first, largest.to(group.spec.torch_dtype))
        rows = values.div_(torch.where(step == 0, 1.0, step.float())[:, None, None, None]).round_().flatten(1, 2)
        classes = (
            _classes_of(rows) if _classes(coded) > 1 else torch.zeros(rows.shape[:2], dtype=torch.uint8, device="cpu")
        )
        frames = [
            compress(self._symbols(layer[of_layer == number])) if bool((of_layer == number).any()) else b""
            for layer, of_layer in zip(rows.clamp(-self._limit, self._limit), classes, strict=True)
            for number in range(_classes(coded))
        ]
        parts = {
            f"{name}.mean": mean.squeeze(-1),
            f"{name}.step": step,
            f"{name}.sizes": torch.tensor([len(frame) for frame in frames], dtype=torch.int32).view(len(rows), -1),
            f"{name}.frames": torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8),
            f"{name}.escapes": _listed(rows[rows.abs() >= self._limit]),
        }
        if _classes(coded) > 1:
            parts[f"{name}.classes"] = classes.view(mean.squeeze(-1).shape)
        if sinks:
            parts[f"{name}.sinks"] = first
        return {**parts, **kept(group, tensor, piece, coded)}

    def decode(self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Code x step + mean in fp32, turned as the model had it, then the layout's dtype.

        Raises:
            BlockError: ``frame``: a frame that is not what the header says.
        """
        coded, name = coded_tokens(group, piece), group.name
        if not coded:
            return parts[f"{name}.rest"].view(group.shape(piece.tokens))
        layers, heads, _, channels = group.shape(coded)
        classes = parts.get(
            f"{name}.classes", torch.zeros((layers, heads, channels), dtype=torch.uint8, device="cpu")
        ).flatten(1)
        sizes = parts[f"{name}.sizes"].flatten().tolist()
        if min(sizes) < 0 or sum(sizes) != len(parts[f"{name}.frames"]) or int(classes.max()) >= _classes(coded):
            raise BlockError("frame", f"{name}: sizes that do not fit the frames")
        frames = torch.split(parts[f"{name}.frames"], sizes)
        codes = torch.empty((layers, heads * channels, coded), dtype=torch.int8, device="cpu")
        for layer, into in enumerate(codes):
            self._decode_layer(frames[layer * _classes(coded) :], classes[layer], into)
        escapes = _Escapes(parts[f"{name}.escapes"], codes, self._limit)
        decoded = torch.empty(group.shape(piece.tokens), dtype=group.spec.torch_dtype, device="cpu")
        steps, mean = parts[f"{name}.step"].float().tolist(), parts[f"{name}.mean"].float().unsqueeze(-2)
        turn = self._turn(group, coded, piece.start)
        for layer in range(layers):
            by_token = codes[layer].view(heads, channels, coded).transpose(1, 2).contiguous()
            values = escapes.put(layer, by_token.float()).mul_(steps[layer]).add_(mean[layer])
            decoded[layer, :, :coded] = turn.forward(values) if turn else values
        return put_kept(group, decoded, piece, coded, parts)

    @property
    def _limit(self) -> int:
        return _PAIR_LIMIT if self.c >= PAIRED_FROM else _LIMIT

    def _symbols(self, rows: torch.Tensor) -> memoryview:
        """Bytes of codes ``[channels, tokens]`` within the limit."""
        if self._limit == _PAIR_LIMIT:
            even, odd = rows[:, ::2] + _PAIR_LIMIT, rows[:, 1::2] + _PAIR_LIMIT
            symbols = even.mul_(_PAIR_BASE).add_(odd).to(torch.uint8)
        else:
            symbols = rows.to(torch.int8).view(torch.uint8)
        view: memoryview = symbols.contiguous().view(-1).numpy().data
        return view

    def _decode_layer(self, frames: Sequence[torch.Tensor], classes: torch.Tensor, into: torch.Tensor) -> None:
        """Codes of one layer into ``[channels, tokens]`` int8; its frames are the first, one for each class."""
        tokens = into.shape[1]
        counts = classes.bincount(minlength=_classes(tokens)).tolist()
        per_byte = 2 if self._limit == _PAIR_LIMIT else 1
        symbols = b"".join(
            decompress(frame.numpy().data, count * tokens // per_byte)
            for frame, count in zip(frames, counts, strict=False) if count
        )  # fmt: skip
        codes = torch.from_numpy(_pairs()[np.frombuffer(symbols, np.uint8)]) if per_byte > 1 else _signed(symbols)
        into[classes.argsort(stable=True)] = codes.view(torch.int8).view(len(classes), tokens)

    def _turn(self, group: TensorGroup, tokens: int, start: int) -> Turn | None:
        """How keys ``[…, channels, tokens]`` from position ``start`` are turned, if they are."""
        rotation = self.rotation
        if rotation is None or group.spec.name != "keys" or 2 * len(rotation.frequencies) > group.shape(tokens)[-1]:
            return None
        return rotation.at(start, tokens)


class _Escapes:
    """Codes that were cut at the limit, in the order in which they stand there."""

    def __init__(self, frame: torch.Tensor, codes: torch.Tensor, limit: int) -> None:
        places = [np.flatnonzero(np.abs(layer.numpy().reshape(-1)) >= limit) for layer in codes]
        count = sum(map(len, places))
        data: memoryview = frame.numpy().data
        planes = np.frombuffer(decompress(data, count * _CODE_BYTES), np.uint8).reshape(_CODE_BYTES, count)
        whole = torch.from_numpy(planes.T.copy().reshape(-1).view(np.int32).astype(np.float32))
        self._whole = torch.split(whole, list(map(len, places)))
        self._places = places
        self._tokens = codes.shape[-1]

    def put(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """Codes of a layer ``[heads, tokens, channels]`` with the whole ones in place of those that were cut."""
        if len(self._places[layer]):
            channel, token = np.divmod(self._places[layer], self._tokens)
            head, channel = np.divmod(channel, values.shape[-1])
            values[torch.from_numpy(head), torch.from_numpy(token), torch.from_numpy(channel)] = self._whole[layer]
        return values


def _signed(symbols: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(symbols), dtype=torch.int8)


@cache
def _pairs() -> Any:
    """For each byte two codes, as the two bytes of an int16."""
    both = np.stack([np.arange(256) // _PAIR_BASE - _PAIR_LIMIT, np.arange(256) % _PAIR_BASE - _PAIR_LIMIT], axis=1)
    return both.astype(np.int8).view(np.int16)[:, 0]


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of each layer, ``[layers]``; squares of large values would overflow."""
    largest = values.abs().amax(dim=(1, 2, 3))
    scaled = values / torch.where(largest == 0, 1.0, largest)[:, None, None, None]
    return largest * scaled.square().mean(dim=(1, 2, 3)).sqrt()


def _classes(coded: int) -> int:
    """How many frames a layer has: one in short blocks, where tables and class numbers cost more than they save."""
    return CLASSES if coded >= CLASSED_FROM_TOKENS else 1


def _one_class(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device="cpu")


def _classes_of(rows: torch.Tensor) -> torch.Tensor:
    """Class of each channel of codes ``[layers, channels, tokens]``: half octaves of its spread, from the layer's."""
    spread = rows.square().mean(dim=-1).clamp(min=1e-9).sqrt()
    octaves = torch.log2(spread / spread.square().mean(dim=-1, keepdim=True).sqrt())
    return (2 * octaves).round().add(CLASSES // 2 + 1).clamp(0, CLASSES - 1).to(torch.uint8)


def _listed(codes: torch.Tensor) -> torch.Tensor:
    """Whole codes as one frame of int32, byte planes apart: the upper ones are almost constant."""
    planes = codes.to(torch.int32).view(torch.uint8).view(-1, _CODE_BYTES).T.contiguous()
    return torch.frombuffer(bytearray(compress(planes.view(-1).numpy().data)), dtype=torch.uint8)
