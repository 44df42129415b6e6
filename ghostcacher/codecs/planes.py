"""``raw.z``: exact, about 10.7 bits a bf16 value: exponents in a plane of their own, Huffman coded.

Of a bf16 value only the exponent is compressible; sign and mantissa are noise. They are kept
as they are, a byte each; the exponents of a layer are one zstd frame (see `entropy`). Of fp32 there are three bytes of
noise to one exponent. Other dtypes are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import torch

from ghostcacher.blocks import KVLayout, TensorGroup
from ghostcacher.codecs.base import SAFETENSORS_DTYPES, Piece, Room, fresh
from ghostcacher.codecs.entropy import compress, decompress, require
from ghostcacher.codecs.header import VARIABLE, TensorField
from ghostcacher.errors import BlockError

_INTEGERS = {"bfloat16": torch.int16, "float32": torch.int32}


@dataclass(frozen=True, slots=True)
class PlaneCodec:
    """Exact, smaller than ``raw``, slower to read."""

    name: ClassVar[str] = "raw.z"
    lossy: ClassVar[bool] = False

    @classmethod
    def of(cls) -> Self:
        """The codec.

        Raises:
            MissingExtraError: there is no zstd.
        """
        require()
        return cls()

    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}

    def for_layout(self, layout: KVLayout) -> Self:
        """See `TensorCodec.for_layout`."""
        return self

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """``noise`` U8 ``[layers, bytes]`` is all but the exponents; ``frames`` are theirs, end to end."""
        shape = group.shape(piece.tokens)
        if not _is_coded(group, piece):
            return (TensorField(group.name, SAFETENSORS_DTYPES[group.spec.dtype], shape),)
        layers, name = shape[0], group.name
        return (
            TensorField(f"{name}.sizes", "I32", (layers,)),
            TensorField(f"{name}.frames", "U8", (VARIABLE,)),
            TensorField(f"{name}.noise", "U8", (layers, prod(shape[1:]) * (_item_bytes(group) - 1))),
        )

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """See `fields`."""
        if not _is_coded(group, piece):
            return {group.name: tensor}
        integers = tensor.contiguous().view(_INTEGERS[group.spec.dtype]).view(tensor.shape[0], -1)
        planes = _rotated(integers, 1).view(torch.uint8).view(*integers.shape, _item_bytes(group))
        frames = [compress(plane.contiguous().numpy().data) for plane in planes[..., -1]]
        return {
            f"{group.name}.sizes": torch.tensor([len(frame) for frame in frames], dtype=torch.int32),
            f"{group.name}.frames": torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8),
            f"{group.name}.noise": planes[..., :-1].reshape(len(planes), -1),
        }

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh
    ) -> torch.Tensor:
        """The tensor, bit for bit.

        Raises:
            BlockError: ``frame``: a frame that is not what the header says.
        """
        shape, name = group.shape(piece.tokens), group.name
        if not _is_coded(group, piece):
            return parts[name].view(shape)
        sizes, count, item_bytes = parts[f"{name}.sizes"].tolist(), prod(shape[1:]), _item_bytes(group)
        if min(sizes, default=0) < 0 or sum(sizes) != len(parts[f"{name}.frames"]):
            raise BlockError("frame", f"{name}: sizes that do not fit the frames")
        decoded = room(shape, group.spec.torch_dtype)
        integers = decoded.view(-1).view(_INTEGERS[group.spec.dtype]).view(shape[0], count)
        planes = integers.view(torch.uint8).view(shape[0], count, item_bytes)
        planes[..., :-1] = parts[f"{name}.noise"].view(shape[0], count, item_bytes - 1)
        for layer, frame in enumerate(torch.split(parts[f"{name}.frames"], sizes)):
            exponents = bytearray(decompress(frame.numpy().data, count))
            planes[layer, :, -1] = torch.frombuffer(exponents, dtype=torch.uint8)
            integers[layer] = _rotated(integers[layer], -1)
        return decoded


def _is_coded(group: TensorGroup, piece: Piece) -> bool:
    return group.spec.dtype in _INTEGERS and prod(group.shape(piece.tokens)) > 0


def _item_bytes(group: TensorGroup) -> int:
    return group.spec.torch_dtype.itemsize


def _rotated(integers: torch.Tensor, places: int) -> torch.Tensor:
    """Bits rotated to the left by one place, or back: the sign leaves the exponent's byte, or returns."""
    width = integers.element_size() * 8
    if places == 1:
        return (integers << 1) | ((integers >> (width - 1)) & 1)
    return ((integers >> 1) & ~(-1 << (width - 1))) | (integers << (width - 1))
