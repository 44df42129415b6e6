"""``ec(c)``: a uniform quantizer and an entropy coder, from 6 down to 1.2 bits a value.

One step for all keys, or values, of a layer: ``c`` times the root mean square of what is left when each channel's mean
is taken away. A group of fixed width pays for its own outlier; an entropy coder does not. Keys are coded as they were
before rope where the layout says how they were turned: channels then keep their means. From ``c`` = 0.45 on two
tokens share a byte, and the few codes beyond 7 are listed with their values. See `grouping` for what is not coded.
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
_LIMIT = 127
_PAIR_LIMIT = 7
_PAIR_BASE = 15


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
        """Means ``[layers, heads, channels]`` and steps ``[layers]`` BF16; zstd frames, one a layer, end to end.

        ``sizes`` ``[layers]`` are the frames' bytes, ``escapes`` the places of codes beyond the limit among all
        symbols, ``escape_values`` BF16 what stands there.
        """
        coded = coded_tokens(group, piece)
        if not coded:
            return rest_fields(group, piece, 0)
        layers, heads, _, channels = group.shape(coded)
        sinks, name = sink_tokens(piece, coded), group.name
        return (
            TensorField(f"{name}.mean", "BF16", (layers, heads, channels)),
            TensorField(f"{name}.step", "BF16", (layers,)),
            TensorField(f"{name}.sizes", "I32", (layers,)),
            TensorField(f"{name}.escapes", "I32", (VARIABLE,)),
            TensorField(f"{name}.escape_values", "BF16", (VARIABLE,)),
            TensorField(f"{name}.frames", "U8", (VARIABLE,)),
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
        codes = values.div(torch.where(step == 0, 1.0, step.float())[:, None, None, None]).round_()
        beyond = codes.abs() > self._limit
        places = beyond.flatten().nonzero()[:, 0]
        codes[beyond] = 0.0
        frames = [compress(self._symbols(layer)) for layer in codes]
        parts = {
            f"{name}.mean": mean.squeeze(-2),
            f"{name}.step": step,
            f"{name}.sizes": torch.tensor([len(frame) for frame in frames], dtype=torch.int32),
            f"{name}.escapes": places.to(torch.int32),
            f"{name}.escape_values": values.flatten()[places].bfloat16(),
            f"{name}.frames": torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8),
        }
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
        sinks, sizes = sink_tokens(piece, coded), parts[f"{name}.sizes"].tolist()
        frames, places = parts[f"{name}.frames"], parts[f"{name}.escapes"].long()
        if min(sizes) < 0 or sum(sizes) != len(frames) or len(places) != len(parts[f"{name}.escape_values"]):
            raise BlockError("frame", f"{name}: sizes that do not fit the frames")
        shape = group.shape(coded)
        values = torch.stack([self._codes(frame, shape[1:]) for frame in torch.split(frames, sizes)]).mul_(
            parts[f"{name}.step"].float()[:, None, None, None]
        )
        if len(places):
            if int(places.min()) < 0 or int(places.max()) >= values.numel():
                raise BlockError("frame", f"{name}: escapes out of the block")
            values.view(-1)[places] = parts[f"{name}.escape_values"].float()
        values = self._turned(group, values.add_(parts[f"{name}.mean"].unsqueeze(-2)), piece.start, back=False)
        decoded = torch.empty(group.shape(piece.tokens), dtype=group.spec.torch_dtype)
        decoded[:, :, :coded] = values
        if sinks:
            decoded[:, :, :sinks] = parts[f"{name}.sinks"]
        if coded < piece.tokens:
            decoded[:, :, coded:] = parts[f"{name}.rest"]
        return decoded

    @property
    def _limit(self) -> int:
        return _PAIR_LIMIT if self.c >= PAIRED_FROM else _LIMIT

    def _symbols(self, codes: torch.Tensor) -> memoryview:
        """Bytes of one layer's codes ``[heads, tokens, channels]``, channel by channel: neighbours are alike."""
        by_channel = codes.transpose(1, 2)
        if self._limit == _PAIR_LIMIT:
            even, odd = by_channel[..., ::2] + _PAIR_LIMIT, by_channel[..., 1::2] + _PAIR_LIMIT
            symbols = even.mul_(_PAIR_BASE).add_(odd).to(torch.uint8)
        else:
            symbols = by_channel.to(torch.int8).view(torch.uint8)
        view: memoryview = symbols.contiguous().view(-1).numpy().data
        return view

    def _codes(self, frame: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The inverse of `_symbols`, in fp32."""
        heads, tokens, channels = shape
        is_paired = self._limit == _PAIR_LIMIT
        size_bytes = heads * tokens * channels // (2 if is_paired else 1)
        data: memoryview = frame.numpy().data
        symbols = torch.frombuffer(bytearray(decompress(data, size_bytes)), dtype=torch.uint8)
        if not is_paired:
            return symbols.view(torch.int8).view(heads, channels, tokens).transpose(1, 2).float()
        pairs = _PAIRS[symbols.long()].view(heads, channels, tokens)
        return pairs.transpose(1, 2).contiguous()

    def _turned(self, group: TensorGroup, values: torch.Tensor, start: int, *, back: bool) -> torch.Tensor:
        if self.rotation is None or group.spec.name != "keys" or 2 * len(self.rotation.frequencies) > values.shape[-1]:
            return values
        return self.rotation.turned(values, start, back=back)


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of each layer, ``[layers]``; squares of large values would overflow."""
    largest = values.abs().amax(dim=(1, 2, 3))
    scaled = values / torch.where(largest == 0, 1.0, largest)[:, None, None, None]
    return largest * scaled.square().mean(dim=(1, 2, 3)).sqrt()


_PAIRS = torch.stack(
    [torch.arange(256) // _PAIR_BASE - _PAIR_LIMIT, torch.arange(256) % _PAIR_BASE - _PAIR_LIMIT], dim=1
).float()
