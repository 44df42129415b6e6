"""``int4``: 4.5 bits a value, as `int8` with 15 steps, two codes to a byte; the first 4 tokens of a prefix in bf16.

A byte of keys holds tokens t (low) and t + 32 (high) of one channel, one of values the channels d and d + half of a
group, so that unpacking writes two runs. The first 4 tokens take no part in their groups' ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from ghostcacher.blocks import KVLayout, TensorGroup
from ghostcacher.codecs.base import Piece, Room, Spread, fresh, one_by_one
from ghostcacher.codecs.grouping import (
    check_finite,
    coded_tokens,
    group_axis,
    kept,
    put_kept,
    rest_fields,
    sink_dtype,
    sink_fields,
    sink_tokens,
    value_group,
)
from ghostcacher.codecs.header import TensorField
from ghostcacher.codecs.uniform import end_fields, from_codes, to_codes
from ghostcacher.transfers import on_device

STEPS = 15
_BITS = 4
_LOW = 2**_BITS - 1


@dataclass(frozen=True, slots=True)
class Int4Codec:
    """Four bits a value. Lossy: see docs/quantisation.md for what it costs."""

    name: ClassVar[str] = "int4"
    lossy: ClassVar[bool] = True

    def parameters(self) -> dict[str, Any]:
        """None: the definition has no free choice."""
        return {}

    def for_layout(self, layout: KVLayout) -> Self:
        """See `TensorCodec.for_layout`."""
        return self

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """Codes U8, two to a byte (half the tokens of keys, half the channels of values), ends, sinks, rest."""
        coded = _coded(group, piece)
        if not coded:
            return rest_fields(group, piece, 0)
        sinks, name = sink_tokens(piece, coded), group.name
        return (
            *end_fields(group, coded),
            *sink_fields(group, sinks),
            TensorField(f"{name}.codes", "U8", _packed_shape(group, coded)),
            *rest_fields(group, piece, coded),
        )

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """Codes, ends, sinks and rest; see `fields`.

        Raises:
            BlockError: ``nonfinite``: NaN, infinity, or a range that overflows.
        """
        coded = _coded(group, piece)
        if not coded:
            return {f"{group.name}.rest": tensor}
        values, sinks = tensor[..., :coded, :], sink_tokens(piece, coded)
        if sinks:
            # Something else in their place: they must not widen their groups, and code the same when coded again.
            values = values.clone()
            values[..., :sinks, :] = values[..., sinks : sinks + 1, :] if group.spec.role == "keys" else 0.0
        codes, parts = to_codes(group, values, STEPS)
        low, high = codes.chunk(2, dim=group_axis(group))
        parts[f"{group.name}.codes"] = low.add(high, alpha=2**_BITS).reshape(_packed_shape(group, coded))
        if sinks:
            parts[f"{group.name}.sinks"] = tensor[..., :sinks, :].to(sink_dtype(group))
            check_finite(group, parts[f"{group.name}.sinks"])
        return {**parts, **kept(group, tensor, piece, coded)}

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh,
        spread: Spread = one_by_one,
    ) -> torch.Tensor:  # fmt: skip
        """Code x step + near in fp32, then the layout's dtype; sinks and rest as they were."""
        coded = _coded(group, piece)
        if not coded:
            return parts[f"{group.name}.rest"].view(group.shape(piece.tokens))
        decoded = room(group.shape(piece.tokens), group.spec.torch_dtype)
        packed = on_device(parts[f"{group.name}.codes"], decoded.device).view(_unflattened(group, coded))
        axis = group_axis(group)

        def unpack(run: slice, values: torch.Tensor) -> None:
            low, high = values.chunk(2, dim=axis)
            low.copy_(packed[run] & _LOW)
            high.copy_(packed[run] >> _BITS)

        from_codes(group, parts, STEPS, packed, decoded, unpack, spread)
        return put_kept(group, decoded, piece, coded, parts)


def _coded(group: TensorGroup, piece: Piece) -> int:
    """As `coded_tokens`; none of values with an odd number of channels, which do not pair."""
    coded = coded_tokens(group, piece)
    return coded if coded and group.shape(coded)[-1] % 2 == 0 else 0


def _packed_shape(group: TensorGroup, coded: int) -> tuple[int, ...]:
    layers, heads, tokens, channels = group.shape(coded)
    if group.spec.role == "keys":
        return layers, heads, tokens // 2, channels
    return layers, heads, tokens, channels // 2


def _unflattened(group: TensorGroup, coded: int) -> tuple[int, ...]:
    """`_packed_shape` with each group's bytes along an axis of its own."""
    layers, heads, tokens, channels = group.shape(coded)
    if group.spec.role == "keys":
        return layers, heads, tokens // 64, 32, channels
    size = value_group(channels)
    return layers, heads, tokens, channels // size, size // 2
