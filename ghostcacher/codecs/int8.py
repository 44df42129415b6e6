"""``int8``: 8.5 bits a value. See `uniform` for the codes and `grouping` for the groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from ghostcacher.blocks import KVLayout, TensorGroup
from ghostcacher.codecs.base import Piece, Room, Spread, fresh, one_by_one
from ghostcacher.codecs.grouping import coded_tokens, grouped, kept, put_kept, rest_fields
from ghostcacher.codecs.header import TensorField
from ghostcacher.codecs.uniform import end_fields, from_codes, to_codes
from ghostcacher.transfers import on_device

STEPS = 255


@dataclass(frozen=True, slots=True)
class Int8Codec:
    """Eight bits a value. Lossy: see docs/quantisation.md for what it costs."""

    name: ClassVar[str] = "int8"
    lossy: ClassVar[bool] = True

    def parameters(self) -> dict[str, Any]:
        """None: the definition has no free choice."""
        return {}

    def for_layout(self, layout: KVLayout) -> Self:
        """See `TensorCodec.for_layout`."""
        return self

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """Codes U8 ``[layers, heads, tokens, channels]``, ends of the groups, and the rest."""
        coded = coded_tokens(group, piece)
        if not coded:
            return rest_fields(group, piece, 0)
        codes = TensorField(f"{group.name}.codes", "U8", group.shape(coded))
        return (*end_fields(group, coded), codes, *rest_fields(group, piece, coded))

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """Codes, ends and rest; see `fields`.

        Raises:
            BlockError: ``nonfinite``: NaN, infinity, or a range that overflows.
        """
        coded = coded_tokens(group, piece)
        if not coded:
            return {f"{group.name}.rest": tensor}
        codes, parts = to_codes(group, tensor[..., :coded, :], STEPS)
        parts[f"{group.name}.codes"] = codes.view(group.shape(coded))
        return {**parts, **kept(group, tensor, piece, coded)}

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh,
        spread: Spread = one_by_one,
    ) -> torch.Tensor:  # fmt: skip
        """Code x step + near in fp32, then the layout's dtype; the rest as it was."""
        coded = coded_tokens(group, piece)
        if not coded:
            return parts[f"{group.name}.rest"].view(group.shape(piece.tokens))
        decoded = room(group.shape(piece.tokens), group.spec.torch_dtype)
        codes = grouped(group, on_device(parts[f"{group.name}.codes"], decoded.device))
        from_codes(group, parts, STEPS, codes, decoded, lambda run, values: _copy(codes[run], values), spread)
        return put_kept(group, decoded, piece, coded, parts)


def _copy(codes: torch.Tensor, values: torch.Tensor) -> None:
    values.copy_(codes)
