"""``raw``: each tensor in its own dtype, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ghostcacher.blocks import TensorGroup
from ghostcacher.codecs.base import SAFETENSORS_DTYPES
from ghostcacher.codecs.header import TensorField


@dataclass(frozen=True, slots=True)
class RawCodec:
    """The model's own bytes. Exact."""

    name: ClassVar[str] = "raw"
    lossy: ClassVar[bool] = False

    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}

    def fields(self, group: TensorGroup, tokens: int) -> tuple[TensorField, ...]:
        """One tensor, ``[layers, *spec.shape]``."""
        return (TensorField(group.name, SAFETENSORS_DTYPES[group.spec.dtype], group.shape(tokens)),)

    def encode(self, group: TensorGroup, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The tensor itself."""
        return {group.name: tensor}

    def decode(self, group: TensorGroup, tokens: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor itself; shares memory with ``parts``."""
        return parts[group.name].view(group.shape(tokens))
