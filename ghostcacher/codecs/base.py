"""Codecs: the tensors of a block to named tensors fit for storing, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from ghostcacher.blocks import TensorGroup
from ghostcacher.codecs.header import TensorField

SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int8": "I8", "uint8": "U8",
}  # fmt: skip


class TensorCodec(Protocol):
    """Tensor to tensors, exact or lossy. A codec is a frozen dataclass; what it was is written beside the bytes."""

    name: ClassVar[str]
    lossy: ClassVar[bool]

    def parameters(self) -> dict[str, Any]:
        """What `ghostcacher.codecs.registry.codec_from` needs to build an equal codec, as JSON."""
        ...

    def fields(self, group: TensorGroup, tokens: int) -> tuple[TensorField, ...]:
        """Names, dtypes and shapes that `encode` gives for a block of ``tokens`` tokens; never empty tensors."""
        ...

    def encode(self, group: TensorGroup, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Tensors by field name, for ``tensor`` ``[layers, *spec.shape]``. Does not change ``tensor``.

        Raises:
            BlockError: ``nonfinite``: a lossy codec met NaN or infinity.
        """
        ...

    def decode(self, group: TensorGroup, tokens: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[layers, *spec.shape]`` in the layout's dtype; may share memory with ``parts``."""
        ...
