"""Static caches, which ``attach`` fills: preallocated buffers that compiled code knows by their address.

They are filled through their own ``update`` and read by copying: a static buffer is written in place again when the
cache is reset. Only prompts are stored, as decode steps may run inside a compiled graph, unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ghostcacher.adapters.full import keys_values_specs
from ghostcacher.adapters.kinds import DUMMY, FULL, LATENT, RECURRENT, STOCK, WINDOW, class_name
from ghostcacher.adapters.parts import Kind
from ghostcacher.adapters.state import CacheState
from ghostcacher.adapters.unserved import UnservedError
from ghostcacher.blocks import TensorSpec

_KINDS: Mapping[str, frozenset[Kind]] = {
    STOCK + "StaticLayer": frozenset({FULL, LATENT}),
    STOCK + "StaticSlidingWindowLayer": frozenset({WINDOW}),
    STOCK + "LinearAttentionLayer": frozenset({RECURRENT}),
    STOCK + "DummyLayer": frozenset({DUMMY}),
}
"""By static class, the kinds that a model's dynamic layer in its place may have."""


class StaticSlices:
    """See `Slices`; for `StaticLayer` and `StaticSlidingWindowLayer` of transformers."""

    def specs(self, layer: Any) -> tuple[TensorSpec, ...]:
        """See `Slices.specs`."""
        return keys_values_specs(layer)

    def columns(self, layer: Any) -> int:
        """See `Slices.columns`."""
        return int(layer.get_seq_length())

    def origin(self, layer: Any) -> int:
        """See `Slices.origin`."""
        return max(0, self.columns(layer) - int(layer.keys.shape[-2])) if layer.is_initialized else 0

    def tensors(self, layer: Any) -> Mapping[str, torch.Tensor]:
        """See `Slices.tensors`. Copies."""
        held = self.columns(layer) - self.origin(layer)
        return {"keys": layer.keys[:, :, :held].clone(), "values": layer.values[:, :, :held].clone()}

    def freeze(self, layer: Any) -> None:
        """Nothing: what is read is copied."""

    def writable(self, layer: Any, have: int, columns: int) -> tuple[Mapping[str, torch.Tensor], int]:
        """Never possible, so the path does not ask: a static buffer is filled once, from the front."""
        raise UnservedError(f"a {type(layer).__name__} with {have} columns cannot be filled up to {columns}")

    def show(self, layer: Any, tensors: Mapping[str, torch.Tensor], columns: int, *, origin: int) -> None:  # noqa: ARG002 (always 0)
        """See `Slices.show`."""
        layer.update(tensors["keys"][:, :, :columns], tensors["values"][:, :, :columns])

    def can_cut_to(self, layer: Any, columns: int) -> bool:  # noqa: ARG002 (never)
        """See `Slices.can_cut_to`."""
        return False

    def cut_to(self, layer: Any, columns: int) -> None:
        """Never possible; see `can_cut_to`."""
        raise UnservedError(f"a {type(layer).__name__} is not cut to {columns} columns")

    def let_go(self, layer: Any, before: int) -> None:
        """Nothing: static buffers keep their size."""


def static_state(layers: list[Any], kinds: Sequence[Kind]) -> CacheState | None:
    """The state over the layers of a static cache of a model whose dynamic layers are of ``kinds``, or None."""
    if len(layers) != len(kinds):
        return None
    if not all(kind in _KINDS.get(class_name(layer), ()) for kind, layer in zip(kinds, layers, strict=True)):
        return None
    own = [replace(kind, slices=StaticSlices()) if kind.slices else kind for kind in kinds]
    return CacheState(layers, own, _resetting(layers), is_static=True)


def _resetting(layers: list[Any]) -> Callable[[], list[Any]]:
    def blank() -> list[Any]:
        for layer in layers:
            layer.reset()
        return list(layers)

    return blank
