"""``bf16``: fp32 keys and values rounded to bf16. Lossy, half the size; other tensors stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from ghostcacher.blocks import TOKENS, KVLayout, TensorGroup
from ghostcacher.codecs.base import SAFETENSORS_DTYPES, Piece, Room, fresh
from ghostcacher.codecs.grouping import check_finite
from ghostcacher.codecs.header import TensorField


@dataclass(frozen=True, slots=True)
class Bf16Codec:
    """Sixteen bits a value, for models in fp32; those in half precision lose nothing and gain nothing."""

    name: ClassVar[str] = "bf16"
    lossy: ClassVar[bool] = True

    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}

    def for_layout(self, layout: KVLayout) -> Self:
        """See `TensorCodec.for_layout`."""
        return self

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """One tensor, ``[layers, *spec.shape]``."""
        dtype = "BF16" if _is_coded(group) else SAFETENSORS_DTYPES[group.spec.dtype]
        return (TensorField(group.name, dtype, group.shape(piece.tokens)),)

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """The tensor, rounded.

        Raises:
            BlockError: ``nonfinite``: NaN, infinity, or a value beyond bf16.
        """
        if not _is_coded(group):
            return {group.name: tensor}
        rounded = tensor.bfloat16()
        check_finite(group, rounded)
        return {group.name: rounded}

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh
    ) -> torch.Tensor:
        """The tensor in the layout's dtype."""
        stored, shape = parts[group.name], group.shape(piece.tokens)
        return room(shape, group.spec.torch_dtype).copy_(stored) if _is_coded(group) else stored.view(shape)


def _is_coded(group: TensorGroup) -> bool:
    """Per-token state in fp32: recurrent states lose more than bits when rounded."""
    return group.spec.dtype == "float32" and TOKENS in group.spec.shape
