"""``int8``: 8.5 bits a value, uniform codes between the minimum and the maximum of each group.

A value is rounded to bf16 first, so that both ends of a group are bf16 numbers that occur in it and take the first
and the last code exactly. Coding what was decoded therefore gives the same bytes. See `grouping` for the groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from ghostcacher.blocks import KVLayout, TensorGroup
from ghostcacher.codecs.base import Piece
from ghostcacher.codecs.grouping import (
    check_finite,
    coded_tokens,
    end_dtype,
    grid,
    group_axis,
    grouped,
    rest_fields,
)
from ghostcacher.codecs.header import TensorField

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
        """Codes ``[layers, heads, tokens, channels]`` U8, ends of the groups BF16 (see `grid`), and the rest."""
        coded = coded_tokens(group, piece)
        if not coded:
            return rest_fields(group, piece, 0)
        ends, dtype = grid(group, coded), "F16" if end_dtype(group) is torch.float16 else "BF16"
        return (
            TensorField(f"{group.name}.maximum", dtype, ends),
            TensorField(f"{group.name}.minimum", dtype, ends),
            TensorField(f"{group.name}.codes", "U8", group.shape(coded)),
            *rest_fields(group, piece, coded),
        )

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """Codes, ends and rest; see `fields`.

        Raises:
            BlockError: ``nonfinite``: NaN, infinity, or a range that overflows.
        """
        coded = coded_tokens(group, piece)
        if not coded:
            return {f"{group.name}.rest": tensor}
        values = grouped(group, tensor[..., :coded, :].to(end_dtype(group)).float())
        axis = group_axis(group)
        minimum, maximum = values.aminmax(dim=axis, keepdim=True)
        step = (maximum - minimum) / STEPS
        check_finite(group, step)
        step[step == 0] = 1.0
        codes = values.sub_(minimum).div_(step).round_().to(torch.uint8)
        parts = {
            f"{group.name}.maximum": maximum.squeeze(axis).to(end_dtype(group)),
            f"{group.name}.minimum": minimum.squeeze(axis).to(end_dtype(group)),
            f"{group.name}.codes": codes.view(tensor[..., :coded, :].shape),
        }
        if coded < piece.tokens:
            parts[f"{group.name}.rest"] = tensor[..., coded:, :]
        return parts

    def decode(self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Code x step + minimum in fp32, then the layout's dtype; the rest as it was."""
        coded = coded_tokens(group, piece)
        if not coded:
            return parts[f"{group.name}.rest"].view(group.shape(piece.tokens))
        axis = group_axis(group)
        minimum = parts[f"{group.name}.minimum"].unsqueeze(axis).float()
        step = (parts[f"{group.name}.maximum"].unsqueeze(axis).float() - minimum) / STEPS
        decoded = torch.empty(group.shape(piece.tokens), dtype=group.spec.torch_dtype)
        codes = grouped(group, parts[f"{group.name}.codes"])
        for layer in range(len(group.layers)):
            values = codes[layer].float().mul_(step[layer]).add_(minimum[layer])
            decoded[layer, :, :coded] = values.view(decoded[layer, :, :coded].shape)
        if coded < piece.tokens:
            decoded[:, :, coded:] = parts[f"{group.name}.rest"]
        return decoded
