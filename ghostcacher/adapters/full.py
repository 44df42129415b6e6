"""Full attention: one key and one value per token, cut anywhere.

Latent attention (MLA) has the same class: ``keys`` is the latent and ``values`` the rope part there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch

from ghostcacher.adapters.layers import GrowingLayer
from ghostcacher.adapters.parts import dtype_name
from ghostcacher.blocks import TOKENS, Role, TensorSpec

_KEYS_VALUES_RANK = 4


def keys_values_specs(layer: object) -> tuple[TensorSpec, ...]:
    """Keys and values, per token and without their batch axis.

    Raises:
        ValueError: keys or values are not ``[rows, heads, tokens, dim]``.
    """
    specs, roles = [], get_args(Role)
    for name in roles:
        tensor = getattr(layer, name)
        if tensor is None or tensor.dim() != _KEYS_VALUES_RANK:
            raise ValueError(f"{name} of a {type(layer).__name__} are not [rows, heads, tokens, dim]")
        specs.append(TensorSpec(name, dtype_name(tensor), (tensor.shape[1], TOKENS, tensor.shape[3]), role=name))
    return tuple(specs)


class FullSlices:
    """See `Slices`; for `GrowingLayer`."""

    def specs(self, layer: GrowingLayer) -> tuple[TensorSpec, ...]:
        """See `Slices.specs`."""
        return keys_values_specs(layer)

    def columns(self, layer: GrowingLayer) -> int:
        """See `Slices.columns`."""
        return int(layer.get_seq_length())

    def origin(self, layer: GrowingLayer) -> int:  # noqa: ARG002 (full attention needs everything)
        """See `Slices.origin`."""
        return 0

    def tensors(self, layer: GrowingLayer) -> Mapping[str, torch.Tensor]:
        """See `Slices.tensors`."""
        return {"keys": layer.keys, "values": layer.values}

    def freeze(self, layer: GrowingLayer) -> None:
        """See `Slices.freeze`."""
        layer.freeze()

    def writable(self, layer: GrowingLayer, have: int, columns: int) -> tuple[Mapping[str, torch.Tensor], int]:
        """See `Slices.writable`."""
        keys, values = layer.writable(layer.keys, layer.values, have, columns)
        return {"keys": keys, "values": values}, 0

    def show(self, layer: GrowingLayer, tensors: Mapping[str, torch.Tensor], columns: int, *, origin: int) -> None:  # noqa: ARG002 (always 0)
        """See `Slices.show`."""
        layer.adopt(tensors["keys"], tensors["values"], columns)

    def can_cut_to(self, layer: GrowingLayer, columns: int) -> bool:
        """See `Slices.can_cut_to`."""
        return columns <= self.columns(layer)

    def cut_to(self, layer: GrowingLayer, columns: int) -> None:
        """See `Slices.cut_to`."""
        layer.cut_to(columns)

    def let_go(self, layer: GrowingLayer, before: int) -> None:
        """Nothing: full attention needs everything."""
