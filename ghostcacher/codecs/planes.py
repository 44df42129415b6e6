"""``raw.z``: exact, about 10.7 bits a bf16 value: exponents in a plane of their own, Huffman coded.

Of a bf16 value only the exponent is compressible; sign and mantissa are noise. They are kept as they are, a byte each;
the exponents of some layers are one zstd frame (see `entropy`). Of fp32 there are three bytes of noise to one exponent.
Other dtypes are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import torch

from ghostcacher.blocks import KVLayout, TensorGroup
from ghostcacher.codecs.base import SAFETENSORS_DTYPES, Piece, Room, Spread, fresh, one_by_one
from ghostcacher.codecs.entropy import compress, decompress, require
from ghostcacher.codecs.header import VARIABLE, TensorField
from ghostcacher.codecs.symbols import runs
from ghostcacher.errors import BlockError
from ghostcacher.transfers import on_device

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
        """``noise`` U8 ``[layers, item bytes - 1, values]`` is all but the exponents; ``frames`` are theirs, by run."""
        shape = group.shape(piece.tokens)
        if not _is_coded(group, piece):
            return (TensorField(group.name, SAFETENSORS_DTYPES[group.spec.dtype], shape),)
        layers, count, name = shape[0], prod(shape[1:]), group.name
        return (
            TensorField(f"{name}.sizes", "I32", (len(runs(layers, count)),)),
            TensorField(f"{name}.frames", "U8", (VARIABLE,)),
            TensorField(f"{name}.noise", "U8", (layers, _item_bytes(group) - 1, count)),
        )

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """See `fields`."""
        if not _is_coded(group, piece):
            return {group.name: tensor}
        integers = tensor.cpu().contiguous().view(_INTEGERS[group.spec.dtype]).view(tensor.shape[0], -1)
        planes = _rotated(integers).view(torch.uint8).view(*integers.shape, _item_bytes(group))
        exponents = [planes[run, :, -1].contiguous().view(-1) for run in runs(*integers.shape)]
        frames = [compress(run.numpy().data) for run in exponents]
        return {
            f"{group.name}.sizes": torch.tensor([len(frame) for frame in frames], dtype=torch.int32, device="cpu"),
            f"{group.name}.frames": torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8),
            f"{group.name}.noise": planes[..., :-1].transpose(1, 2).contiguous(),
        }

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh,
        spread: Spread = one_by_one,
    ) -> torch.Tensor:  # fmt: skip
        """The tensor, bit for bit.

        Raises:
            BlockError: ``frame``: a frame that is not what the header says.
        """
        shape, name = group.shape(piece.tokens), group.name
        if not _is_coded(group, piece):
            return parts[name].view(shape)
        sizes, noise, frames = (parts[f"{name}.{part}"] for part in ("sizes", "noise", "frames"))
        if min(sizes.tolist(), default=0) < 0 or int(sizes.sum()) != len(frames):
            raise BlockError("frame", f"{name}: sizes that do not fit the frames")
        decoded = room(shape, group.spec.torch_dtype)
        integers = decoded.view(-1).view(_INTEGERS[group.spec.dtype]).view(len(noise), -1)

        def restore(coded: tuple[slice, torch.Tensor]) -> None:
            run, frame = coded
            rows = integers[run]
            exponents = torch.frombuffer(bytearray(decompress(frame.numpy().data, rows.numel())), dtype=torch.uint8)
            _put(rows, on_device(exponents.view(rows.shape), rows.device), on_device(noise[run], rows.device))

        spread(restore, list(zip(runs(*integers.shape), torch.split(frames, sizes.tolist()), strict=True)))
        return decoded


def _is_coded(group: TensorGroup, piece: Piece) -> bool:
    return group.spec.dtype in _INTEGERS and prod(group.shape(piece.tokens)) > 0


def _item_bytes(group: TensorGroup) -> int:
    return group.spec.torch_dtype.itemsize


def _rotated(integers: torch.Tensor) -> torch.Tensor:
    """Bits rotated to the left by one place: the sign leaves the exponent's byte."""
    return (integers << 1) | ((integers >> (integers.element_size() * 8 - 1)) & 1)


def _put(integers: torch.Tensor, exponents: torch.Tensor, noise: torch.Tensor) -> None:
    """The inverse of `_rotated`, of planes; ``noise`` is ``[layers, item bytes - 1, values]``, lowest bytes first."""
    bits = integers.element_size() * 8
    rest = noise[:, -1].to(integers.dtype)
    for plane in reversed(noise[:, :-1].unbind(1)):
        rest.bitwise_left_shift_(8).bitwise_or_(plane)
    # Added, as the highest of these bits stay 0: that is one pass less than shift and or.
    torch.add(rest >> 1, integers.copy_(exponents), alpha=1 << (bits - 9), out=integers)
    integers.bitwise_or_(rest.bitwise_left_shift_(bits - 1))
