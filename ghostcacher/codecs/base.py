"""Codecs: the tensors of a block to named tensors fit for storing, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch

from ghostcacher.blocks import KVLayout, TensorGroup, sizing_tokens
from ghostcacher.codecs.header import TensorField
from ghostcacher.keys import BlockKey

SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8",
}  # fmt: skip

Room = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Gives memory to decode into, of a shape and dtype, on the device where it is wanted; it may hold anything."""


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The plain `Room`: new memory each time."""
    return torch.empty(shape, dtype=dtype, device="cpu")


_Item = TypeVar("_Item")


class Spread(Protocol):
    """Runs a function over items, on one thread or several. Inside of such a function it may be called again.

    After an exception no further item begins; when all that had begun have ended, it is raised, one of several.
    """

    def __call__(self, function: Callable[[_Item], None], items: Sequence[_Item], /) -> None:
        """Return when the function ran for every item."""
        ...


def one_by_one(function: Callable[[_Item], None], items: Sequence[_Item], /) -> None:
    """The plain `Spread`: this thread, in order."""
    for item in items:
        function(item)


@dataclass(frozen=True, slots=True)
class Piece:
    """Which tokens a block holds: ``tokens`` of them, the first at position ``start``.

    Of a snapshot, all tokens before its end: they size what it holds.
    """

    start: int
    tokens: int

    @classmethod
    def of(cls, key: BlockKey) -> Self:
        """The piece that is stored under ``key``."""
        return cls(0 if key.is_snapshot else key.start, sizing_tokens(key))


class Codec(Protocol):
    """What a tier is told to code with."""

    name: ClassVar[str]
    lossy: ClassVar[bool]

    def parameters(self) -> dict[str, Any]:
        """What `ghostcacher.codecs.registry.codec_from` needs to build an equal codec, as JSON."""
        ...

    def for_layout(self, layout: KVLayout) -> TensorCodec:
        """The codec as it codes blocks of ``layout``: what it takes from there is among its parameters."""
        ...


class TensorCodec(Codec, Protocol):
    """Tensor to tensors, exact or lossy. A codec is a frozen dataclass; what it was is written beside the bytes."""

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """Names, dtypes and shapes that `encode` gives for a block of ``piece``.

        A tensor of one axis whose size follows from the values has the shape ``(VARIABLE,)``.
        """
        ...

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """Tensors by field name, for ``tensor`` ``[layers, *spec.shape]``. Does not change ``tensor``.

        Raises:
            BlockError: ``nonfinite``: a lossy codec met NaN or infinity.
        """
        ...

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh,
        spread: Spread = one_by_one,
    ) -> torch.Tensor:  # fmt: skip
        """``[layers, *spec.shape]`` in the layout's dtype, in memory from ``room`` or shared with ``parts``.

        ``parts`` are on the CPU; what there is to compute is computed where ``room`` is. ``spread`` may be asked to run
        what is done to some layers beside what is done to others. Called on several threads at once.

        Raises:
            BlockError: ``frame``: a part is not what this codec writes.
        """
        ...
