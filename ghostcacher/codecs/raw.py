"""``raw``: each tensor in its own dtype, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from ghostcacher.blocks import KVLayout, TensorGroup
from ghostcacher.codecs.base import SAFETENSORS_DTYPES, Piece, Room, Spread, fresh, one_by_one
from ghostcacher.codecs.header import TensorField


@dataclass(frozen=True, slots=True)
class RawCodec:
    """The model's own bytes. Exact."""

    name: ClassVar[str] = "raw"
    lossy: ClassVar[bool] = False

    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}

    def for_layout(self, layout: KVLayout) -> Self:
        """See `TensorCodec.for_layout`."""
        return self

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """One tensor, ``[layers, *spec.shape]``."""
        return (TensorField(group.name, SAFETENSORS_DTYPES[group.spec.dtype], group.shape(piece.tokens)),)

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """The tensor itself."""
        return {group.name: tensor}

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh,
        spread: Spread = one_by_one,
    ) -> torch.Tensor:  # fmt: skip
        """The tensor itself; shares memory with ``parts``."""
        return parts[group.name].view(group.shape(piece.tokens))
