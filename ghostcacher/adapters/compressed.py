"""Compressed attention (DeepSeek V4): a window, and entries that each stand for many tokens.

All of it is one snapshot. The size of every tensor follows from how many tokens came before, see `Extent`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ghostcacher.adapters.parts import dtype_name
from ghostcacher.blocks import Extent, TensorSpec

_BUFFERS = ("buffer_kv", "buffer_gate")
_OVERLAPS = ("overlap_kv", "overlap_gate")


class CompressedStates:
    """See `States`; for the layers that `transformers.models.deepseek_v4` defines."""

    needs_pieces = True

    def specs(self, layer: Any) -> tuple[TensorSpec, ...]:
        """See `States.specs`. The layer must have seen enough tokens that every tensor exists."""
        window, rate = Extent("below", layer.sliding_window), layer.compress_rate
        specs = [_spec("keys", layer.keys, {1: window})]
        for name, tensor in _entries(layer):
            if tensor is None:
                raise ValueError(f"{name} of a {type(layer).__name__} is not known yet")
            part = name.partition(".")[0]
            if part in _OVERLAPS:
                specs.append(_spec(name, tensor, {0: Extent("once", rate, tensor.shape[1])}))
            else:
                specs.append(_spec(name, tensor, {0: Extent("rest" if part in _BUFFERS else "each", rate)}))
        return tuple(specs)

    def holds(self, layer: Any) -> bool:
        """See `States.holds`."""
        return bool(layer.cumulative_length)

    def ago(self, layer: Any, columns: int) -> Mapping[str, torch.Tensor] | None:
        """See `States.ago`."""
        if columns:
            return None
        return {"keys": layer.keys} | {name: tensor for name, tensor in _entries(layer) if tensor is not None}

    def restore(self, layer: Any, tensors: Mapping[str, torch.Tensor], columns: int) -> None:
        """See `States.restore`. An empty tensor stands for one that does not exist yet."""
        keys = tensors["keys"]
        if not layer.is_initialized:
            layer.lazy_initialization(keys, keys)
        layer.keys = layer.values = keys
        layer.cumulative_length = columns
        for name, _ in list(_entries(layer)):
            part, _, entry = name.partition(".")
            tensor = tensors[name]
            getattr(layer, part)[entry] = tensor if tensor.numel() else None
            if part == "compressed_kv":
                layer.entry_count[entry] = tensor.shape[1]

    def let_go(self, layer: Any) -> None:
        """Nothing is kept for `ago`."""


def select_rows(layer: Any, rows: torch.Tensor) -> None:
    """Keep these rows of every tensor; before 5.24 the layer's own ``reorder_cache`` forgets those of this kind."""
    states = CompressedStates()
    held = states.ago(layer, 0) or {}
    kept = {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in held.items()}
    missing = {name: layer.keys.new_empty((0, 0)) for name, tensor in _entries(layer) if tensor is None}
    states.restore(layer, {**kept, **missing}, layer.cumulative_length)


def _entries(layer: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    for part in ("compressed_kv", *_BUFFERS, *_OVERLAPS):
        for entry, tensor in getattr(layer, part, {}).items():
            yield f"{part}.{entry}", tensor


def _spec(name: str, tensor: torch.Tensor, extents: Mapping[int, Extent]) -> TensorSpec:
    shape = tuple(extents.get(axis, size) for axis, size in enumerate(tensor.shape[1:]))
    return TensorSpec(name, dtype_name(tensor), shape)
