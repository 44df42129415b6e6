"""``bf16``: fp32 keys and values rounded to bf16. Lossy, half the size; other tensors stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import torch

from ghostcacher.blocks import TOKENS, KVLayout, TensorGroup
from ghostcacher.codecs.base import SAFETENSORS_DTYPES, Piece, Room, Spread, fresh, one_by_one
from ghostcacher.codecs.grouping import check_finite
from ghostcacher.codecs.header import TensorField
from ghostcacher.codecs.symbols import runs


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
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh,
        spread: Spread = one_by_one,
    ) -> torch.Tensor:  # fmt: skip
        """The tensor in the layout's dtype."""
        stored, shape = parts[group.name], group.shape(piece.tokens)
        if not _is_coded(group):
            return stored.view(shape)
        decoded = room(shape, group.spec.torch_dtype)

        def restore(run: slice) -> None:
            decoded[run] = stored[run]

        spread(restore, runs(len(decoded), prod(shape[1:])))
        return decoded


def _is_coded(group: TensorGroup) -> bool:
    """Per-token state in fp32: recurrent states lose more than bits when rounded."""
    return group.spec.dtype == "float32" and TOKENS in group.spec.shape
