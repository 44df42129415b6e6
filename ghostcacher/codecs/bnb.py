"""``bnb_int8``, ``bnb_nf4``, ``bnb_fp4``: the block-wise quantizers of bitsandbytes, 64 values to a block.

Made for weights. On keys they are many times worse than `int8` and `int4` at the same size: their tables are symmetric,
keys lie far from zero. They are here to be compared with; see docs/quantisation.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar, Self

import torch

from ghostcacher.blocks import KVLayout, TensorGroup
from ghostcacher.codecs.base import Piece, Room, Spread, fresh, one_by_one
from ghostcacher.codecs.grouping import check_finite, coded_tokens, kept, put_kept, rest_fields
from ghostcacher.codecs.header import TensorField
from ghostcacher.errors import MissingExtraError

BLOCK_VALUES = 64


@dataclass(frozen=True, slots=True)
class _Bnb:
    """What the three have in common: ``[layers, heads, tokens, channels]`` in blocks of 64 values, in that order."""

    name: ClassVar[str]
    lossy: ClassVar[bool] = True
    values_per_byte: ClassVar[int]

    @classmethod
    def of(cls) -> Self:
        """The codec.

        Raises:
            MissingExtraError: bitsandbytes is not installed, or does not work here.
        """
        _bitsandbytes()
        return cls()

    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}

    def for_layout(self, layout: KVLayout) -> Self:
        """See `TensorCodec.for_layout`."""
        return self

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """``codes`` U8 in storing order, ``absmax`` F32 of each block, and the rest."""
        coded = coded_tokens(group, piece)
        if not coded:
            return rest_fields(group, piece, 0)
        values, name = prod(group.shape(coded)), group.name
        return (
            TensorField(f"{name}.absmax", "F32", (values // BLOCK_VALUES,)),
            TensorField(f"{name}.codes", "U8", (values // self.values_per_byte,)),
            *rest_fields(group, piece, coded),
        )

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """See `fields`.

        Raises:
            BlockError: ``nonfinite``: NaN or infinity.
            MissingExtraError: bitsandbytes is not installed.
        """
        coded, name = coded_tokens(group, piece), group.name
        if not coded:
            return {f"{name}.rest": tensor}
        values = tensor[..., :coded, :].float().contiguous().view(-1)
        check_finite(group, values)
        codes, absmax = self._quantized(values)
        parts = {f"{name}.absmax": absmax, f"{name}.codes": codes.view(-1)}
        return {**parts, **kept(group, tensor, piece, coded)}

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh,
        spread: Spread = one_by_one,
    ) -> torch.Tensor:  # fmt: skip
        """What bitsandbytes makes of codes and ``absmax``; the rest as it was."""
        coded, name = coded_tokens(group, piece), group.name
        if not coded:
            return parts[f"{name}.rest"].view(group.shape(piece.tokens))
        decoded = room(group.shape(piece.tokens), group.spec.torch_dtype)
        values = self._restored(parts[f"{name}.codes"], parts[f"{name}.absmax"], prod(group.shape(coded)))
        decoded[..., :coded, :] = values.view(group.shape(coded))
        return put_kept(group, decoded, piece, coded, parts)

    def _quantized(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, state = _bitsandbytes().quantize_4bit(values, blocksize=BLOCK_VALUES, quant_type=self.name[-3:])
        return codes, state.absmax

    def _restored(self, codes: torch.Tensor, absmax: torch.Tensor, count: int) -> torch.Tensor:
        bnb, kind = _bitsandbytes(), self.name[-3:]
        state = bnb.QuantState(
            absmax.contiguous(), torch.Size([count]), bnb.get_4bit_type(kind, device="cpu"), BLOCK_VALUES, kind,
            torch.float32,
        )  # fmt: skip
        restored: torch.Tensor = bnb.dequantize_4bit(codes.contiguous().view(-1, 1), state)
        return restored


@dataclass(frozen=True, slots=True)
class BnbNf4Codec(_Bnb):
    """4.5 bits a value: 16 quantiles of a normal distribution."""

    name: ClassVar[str] = "bnb_nf4"
    values_per_byte: ClassVar[int] = 2


@dataclass(frozen=True, slots=True)
class BnbFp4Codec(_Bnb):
    """4.5 bits a value: 16 floats."""

    name: ClassVar[str] = "bnb_fp4"
    values_per_byte: ClassVar[int] = 2


@dataclass(frozen=True, slots=True)
class BnbInt8Codec(_Bnb):
    """8.5 bits a value: bitsandbytes' dynamic map of 256 numbers."""

    name: ClassVar[str] = "bnb_int8"
    values_per_byte: ClassVar[int] = 1

    def _quantized(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.device("cpu"):  # bitsandbytes keeps the map that it makes first
            codes, state = _bitsandbytes().quantize_blockwise(values, blocksize=BLOCK_VALUES)
        return codes, state.absmax

    def _restored(self, codes: torch.Tensor, absmax: torch.Tensor, count: int) -> torch.Tensor:
        with torch.device("cpu"):  # bitsandbytes makes its map on whatever is the default
            numbers = torch.as_tensor(_bitsandbytes().create_dynamic_map())
        blocks = codes.view(-1, BLOCK_VALUES)
        return (numbers[blocks.long()] * absmax.view(-1, 1)).view(count)


@cache
def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # its import looks for devices and libraries, and fails in many ways
        raise MissingExtraError("bitsandbytes", "bnb", "this codec") from error
