"""``ec(c)``: a uniform quantizer and an entropy coder, from 6 down to 1.2 bits a value.

One step for all keys, or values, of a layer: ``c`` times the root mean square of what is left when each channel's mean
is taken away. A group of fixed width pays for its own outlier; an entropy coder does not. Keys are coded as they were
before rope where the layout says how they were turned: channels then keep their means. All codes of a layer share one
table. Frames for classes of like channels would be a little smaller in long blocks, but their channels would have to
be put back in order. What is not coded: `grouping`; how codes are stored: `symbols`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ghostcacher.blocks import KVLayout, Rotation, TensorGroup
from ghostcacher.codecs.base import Piece, Room, Spread, fresh, one_by_one
from ghostcacher.codecs.classes import one_class
from ghostcacher.codecs.entropy import require
from ghostcacher.codecs.frames import MOST_ADDED
from ghostcacher.codecs.grouping import (
    by_channel,
    check_finite,
    coded_tokens,
    kept,
    put_kept,
    rest_fields,
    sink_dtype,
    sink_fields,
    sink_tokens,
    turn_of,
)
from ghostcacher.codecs.header import TensorField
from ghostcacher.codecs.heads import Heads
from ghostcacher.codecs.lines import Lines
from ghostcacher.codecs.orders import PhaseByPhase
from ghostcacher.codecs.symbols import Codes, SymbolCoder
from ghostcacher.errors import ConfigurationError

STEP_RANGE = (0.01, 8.0)


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
        require()
        turned = Rotation(tuple(map(float, frequencies)), bool(interleaved)) if frequencies else None
        return cls(checked_step("ec", c), turned)

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
        """Means ``[layers, n]`` and steps ``[layers]`` BF16, and what `SymbolCoder` gives.

        ``n`` are all heads' channels, plane by plane (see `Heads`).
        """
        coded = coded_tokens(group, piece)
        if not coded:
            return rest_fields(group, piece, 0)
        layers, heads, _, channels = group.shape(coded)
        per_channel, name = (layers, heads * channels), group.name
        return (
            TensorField(f"{name}.means", "BF16", per_channel),
            TensorField(f"{name}.steps", "BF16", (layers,)),
            *_coder(name, layers, coded * heads * channels).fields(),
            *sink_fields(group, sink_tokens(piece, coded)),
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
        heads = self._heads(group, piece, coded)
        values = heads.columns(by_channel(group, tensor, piece, coded, self.rotation))
        mean = values[:, sinks:].mean(dim=1, keepdim=True).bfloat16()
        values = values.sub_(mean)
        values[:, :sinks] = 0.0
        step = (self.c * _spread(values[:, sinks:])).bfloat16()
        first = tensor[..., :sinks, :].to(sink_dtype(group))
        # Turned keys are at most the square root of two larger than either of a pair; a code is off by half a step.
        largest = 1.5 * (values.abs().amax() + mean.float().abs().amax() + step.float().amax())
        check_finite(group, mean, step, first, largest.to(group.spec.torch_dtype), largest + MOST_ADDED * step.float())
        codes = values.div_(torch.where(step == 0, 1.0, step.float())[:, None, None]).round_()
        parts = {f"{name}.means": mean[:, 0], f"{name}.steps": step}
        parts |= _coder(name, len(step), codes[:1].numel()).pack(codes.flatten(1), PhaseByPhase(heads).arranged)
        if sinks:
            parts[f"{name}.sinks"] = first
        return {**parts, **kept(group, tensor, piece, coded)}

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh,
        spread: Spread = one_by_one,
    ) -> torch.Tensor:  # fmt: skip
        """Code x step + mean in fp32, turned as the model had it, then the layout's dtype.

        Raises:
            BlockError: ``frame``: a frame that is not what the header says.
        """
        coded, name = coded_tokens(group, piece), group.name
        if not coded:
            return parts[f"{name}.rest"].view(group.shape(piece.tokens))
        decoded = room(group.shape(piece.tokens), group.spec.torch_dtype)
        mean = parts[f"{name}.means"].float()[:, None]
        step = parts[f"{name}.steps"].float()[:, None, None]
        heads = self._heads(group, piece, coded)
        back = Lines(PhaseByPhase(heads), mean, step, decoded)

        def restore(codes: Codes) -> None:
            if heads.turn is None:
                # Then they lie as state does, and go into it at once.
                codes = codes.in_one_phase(heads.channels)
            codes.put(back.room(codes.layers, codes.width))
            back.write(codes.layers, codes.width, codes.added)

        _coder(name, len(step), decoded[:1, :, :coded].numel()).unpack(parts, restore, spread)
        return put_kept(group, decoded, piece, coded, parts)

    def _heads(self, group: TensorGroup, piece: Piece, coded: int) -> Heads:
        _, heads, _, channels = group.shape(coded)
        turn = turn_of(group, self.rotation, piece.start, coded)
        return Heads(coded, heads, channels, turn)


def checked_step(name: str, c: object) -> float:
    """``c`` as a number.

    Raises:
        ConfigurationError: it is none, or out of its range.
    """
    least, most = STEP_RANGE
    if isinstance(c, bool) or not isinstance(c, int | float) or not least <= c <= most:
        raise ConfigurationError(f"{name}({c!r}): a step from {least} to {most}; 0.25 is fine, 1.0 is coarse")
    return float(c)


def _coder(name: str, layers: int, values: int) -> SymbolCoder:
    """All ``values`` of a layer are one row."""
    return SymbolCoder(name, layers, 1, values, one_class(layers))


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of each layer, ``[layers]``; squares of large values would overflow."""
    largest = values.abs().amax(dim=(1, 2))
    scaled = values / torch.where(largest == 0, 1.0, largest)[:, None, None]
    return largest * scaled.square().mean(dim=(1, 2)).sqrt()
