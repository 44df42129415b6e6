"""Layers of transformers' own whose per-token tensors are plain attributes, grown by concatenation.

Indexed attention (DSA) has index keys beside keys and values, sparse attention (MiniMax M3) too, each with token and
batch axes of its own; the attention half of a hybrid layer has keys and values only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ghostcacher.adapters.parts import dtype_name
from ghostcacher.blocks import TOKENS, Role, TensorSpec


@dataclass(frozen=True, slots=True)
class PlainTensor:
    """Attribute ``name``, with its token and batch axes, counted from the front; ``role`` as in `TensorSpec`."""

    name: str
    token_axis: int
    batch_axis: int = 0
    role: Role | None = None


KEYS_VALUES = (PlainTensor("keys", 2, role="keys"), PlainTensor("values", 2, role="values"))
INDEXED = (
    *KEYS_VALUES, PlainTensor("indexer_keys", 1), PlainTensor("indexer_position_ids", 2, batch_axis=1),
)  # fmt: skip
SPARSE = (*KEYS_VALUES, PlainTensor("idx_keys", 2))


@dataclass(frozen=True, slots=True)
class PlainSlices:
    """See `Slices`. Concatenation makes new tensors, so nothing captured is ever written again."""

    attributes: tuple[PlainTensor, ...]

    def specs(self, layer: Any) -> tuple[TensorSpec, ...]:
        """See `Slices.specs`."""
        return tuple(_spec(each, tensor) for each, tensor in self._held(layer))

    def columns(self, layer: Any) -> int:
        """See `Slices.columns`."""
        return int(layer.get_seq_length())

    def origin(self, layer: Any) -> int:  # noqa: ARG002 (everything is kept)
        """See `Slices.origin`."""
        return 0

    def tensors(self, layer: Any) -> Mapping[str, torch.Tensor]:
        """See `Slices.tensors`."""
        return {each.name: tensor for each, tensor in self._held(layer)}

    def freeze(self, layer: Any) -> None:
        """Nothing to do; see the class."""

    def writable(self, layer: Any, have: int, columns: int) -> tuple[Mapping[str, torch.Tensor], int]:
        """See `Slices.writable`."""
        found = {}
        for each, tensor in self._held(layer):
            shape = list(tensor.shape)
            shape[each.token_axis] = columns
            found[each.name] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            found[each.name].narrow(each.token_axis, 0, have).copy_(tensor.narrow(each.token_axis, 0, have))
        return found, 0

    def show(self, layer: Any, tensors: Mapping[str, torch.Tensor], columns: int, *, origin: int) -> None:  # noqa: ARG002 (always 0)
        """See `Slices.show`."""
        shown = {
            each.name: tensors[each.name].narrow(each.token_axis, 0, columns)
            for each in self.attributes if each.name in tensors
        }  # fmt: skip
        if not layer.is_initialized:
            layer.lazy_initialization(shown["keys"], shown["values"])
        if "indexer_keys" in shown and not layer.is_indexer_initialized:
            layer.lazy_initialization_indexer(shown["indexer_keys"])
        for name, tensor in shown.items():
            setattr(layer, name, tensor)

    def can_cut_to(self, layer: Any, columns: int) -> bool:
        """See `Slices.can_cut_to`."""
        return columns <= self.columns(layer)

    def cut_to(self, layer: Any, columns: int) -> None:
        """See `Slices.cut_to`."""
        for each, tensor in self._held(layer):
            setattr(layer, each.name, tensor.narrow(each.token_axis, 0, min(columns, tensor.shape[each.token_axis])))

    def let_go(self, layer: Any, before: int) -> None:
        """Nothing: everything is needed."""

    def _held(self, layer: Any) -> list[tuple[PlainTensor, torch.Tensor]]:
        found = ((each, getattr(layer, each.name, None)) for each in self.attributes)
        return [(each, tensor) for each, tensor in found if tensor is not None]


def _spec(each: PlainTensor, tensor: torch.Tensor) -> TensorSpec:
    shape = [TOKENS if axis == each.token_axis else size for axis, size in enumerate(tensor.shape)]
    del shape[each.batch_axis]
    return TensorSpec(each.name, dtype_name(tensor), tuple(shape), each.batch_axis, each.role)
