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
from typing import Any, ClassVar

import torch

from ghostcacher.blocks import KVLayout, Rotation, TensorGroup
from ghostcacher.codecs.base import Piece
from ghostcacher.codecs.entropy import compress, decompress, require
from ghostcacher.codecs.grouping import check_finite, coded_tokens, rest_fields, sink_tokens
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
            *([TensorField(f"{name}.sinks", "BF16", group.shape(sinks))] if sinks else []),
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
        values = self._turned(group, tensor[..., :coded, :].to(torch.float32, copy=True), piece.start, back=True)
        mean = values[..., sinks:, :].mean(dim=-2, keepdim=True).bfloat16()
        values = values.sub_(mean)
        values[..., :sinks, :] = 0.0
        step = (self.c * _spread(values[..., sinks:, :])).bfloat16()
        check_finite(group, mean, step, tensor[..., :sinks, :])
        rows = values.div_(torch.where(step == 0, 1.0, step.float())[:, None, None, None]).round_()
        rows = rows.transpose(2, 3).flatten(1, 2).contiguous()
        classes = _classes_of(rows) if _classes(coded) > 1 else torch.zeros(rows.shape[:2], dtype=torch.uint8)
        frames = [
            compress(self._symbols(layer[of_layer == number])) if bool((of_layer == number).any()) else b""
            for layer, of_layer in zip(rows.clamp(-self._limit, self._limit), classes, strict=True)
            for number in range(_classes(coded))
        ]
        parts = {
            f"{name}.mean": mean.squeeze(-2),
            f"{name}.step": step,
            f"{name}.sizes": torch.tensor([len(frame) for frame in frames], dtype=torch.int32).view(len(rows), -1),
            f"{name}.frames": torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8),
            f"{name}.escapes": _listed(rows[rows.abs() >= self._limit]),
        }
        if _classes(coded) > 1:
            parts[f"{name}.classes"] = classes.view(mean.squeeze(-2).shape)
        if sinks:
            parts[f"{name}.sinks"] = tensor[..., :sinks, :].bfloat16()
        if coded < piece.tokens:
            parts[f"{name}.rest"] = tensor[..., coded:, :]
        return parts

    def decode(self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Code x step + mean in fp32, turned as the model had it, then the layout's dtype.

        Raises:
            BlockError: ``frame``: a frame that is not what the header says.
        """
        coded, name = coded_tokens(group, piece), group.name
        if not coded:
            return parts[f"{name}.rest"].view(group.shape(piece.tokens))
        layers, heads, _, channels = group.shape(coded)
        rows = torch.empty((layers, heads * channels, coded))
        classes = parts.get(f"{name}.classes", torch.zeros((layers, heads, channels), dtype=torch.uint8)).flatten(1)
        sizes = parts[f"{name}.sizes"].flatten().tolist()
        if min(sizes) < 0 or sum(sizes) != len(parts[f"{name}.frames"]) or int(classes.max()) >= _classes(coded):
            raise BlockError("frame", f"{name}: sizes that do not fit the frames")
        for number, frame in enumerate(torch.split(parts[f"{name}.frames"], sizes)):
            layer, chosen = divmod(number, _classes(coded))
            mine = classes[layer] == chosen
            if bool(mine.any()):
                rows[layer, mine] = self._codes(frame, int(mine.sum()), coded)
        cut = rows.abs() >= self._limit
        rows[cut] = _unlisted(parts[f"{name}.escapes"], int(cut.sum()))
        rows.mul_(parts[f"{name}.step"].float()[:, None, None]).add_(parts[f"{name}.mean"].flatten(1)[:, :, None])
        values = rows.view(layers, heads, channels, coded).transpose(2, 3).contiguous()
        decoded = torch.empty(group.shape(piece.tokens), dtype=group.spec.torch_dtype)
        decoded[:, :, :coded] = self._turned(group, values, piece.start, back=False)
        sinks = sink_tokens(piece, coded)
        if sinks:
            decoded[:, :, :sinks] = parts[f"{name}.sinks"]
        if coded < piece.tokens:
            decoded[:, :, coded:] = parts[f"{name}.rest"]
        return decoded

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

    def _codes(self, frame: torch.Tensor, channels: int, tokens: int) -> torch.Tensor:
        """The inverse of `_symbols`, in fp32."""
        is_paired = self._limit == _PAIR_LIMIT
        data: memoryview = frame.numpy().data
        symbols = decompress(data, channels * tokens // (2 if is_paired else 1))
        bytes_ = torch.frombuffer(bytearray(symbols), dtype=torch.uint8)
        codes = _PAIRS[bytes_.long()] if is_paired else bytes_.view(torch.int8).float()
        return codes.view(channels, tokens)

    def _turned(self, group: TensorGroup, values: torch.Tensor, start: int, *, back: bool) -> torch.Tensor:
        if self.rotation is None or group.spec.name != "keys" or 2 * len(self.rotation.frequencies) > values.shape[-1]:
            return values
        return self.rotation.turned(values, start, back=back)


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of each layer, ``[layers]``; squares of large values would overflow."""
    largest = values.abs().amax(dim=(1, 2, 3))
    scaled = values / torch.where(largest == 0, 1.0, largest)[:, None, None, None]
    return largest * scaled.square().mean(dim=(1, 2, 3)).sqrt()


def _classes(coded: int) -> int:
    """How many frames a layer has: one in short blocks, where tables and class numbers cost more than they save."""
    return CLASSES if coded >= CLASSED_FROM_TOKENS else 1


def _classes_of(rows: torch.Tensor) -> torch.Tensor:
    """Class of each channel of codes ``[layers, channels, tokens]``: half octaves of its spread, from the layer's."""
    spread = rows.square().mean(dim=-1).clamp(min=1e-9).sqrt()
    octaves = torch.log2(spread / spread.square().mean(dim=-1, keepdim=True).sqrt())
    return (2 * octaves).round().add(CLASSES // 2 + 1).clamp(0, CLASSES - 1).to(torch.uint8)


def _listed(codes: torch.Tensor) -> torch.Tensor:
    """Whole codes as one frame of int32, byte planes apart: the upper ones are almost constant."""
    planes = codes.to(torch.int32).view(torch.uint8).view(-1, _CODE_BYTES).T.contiguous()
    return torch.frombuffer(bytearray(compress(planes.view(-1).numpy().data)), dtype=torch.uint8)


def _unlisted(frame: torch.Tensor, count: int) -> torch.Tensor:
    data: memoryview = frame.numpy().data
    planes = torch.frombuffer(bytearray(decompress(data, count * _CODE_BYTES) or b"\0"), dtype=torch.uint8)
    planes = planes[: count * _CODE_BYTES].view(_CODE_BYTES, count)
    return planes.T.contiguous().view(-1).view(torch.int32).float()


_PAIRS = torch.stack(
    [torch.arange(256) // _PAIR_BASE - _PAIR_LIMIT, torch.arange(256) % _PAIR_BASE - _PAIR_LIMIT], dim=1
).float()
