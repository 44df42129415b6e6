"""What a kind of cache layer consists of: per-token slices, snapshots, or both.

A kind is chosen by the layer's class and holds no state: every method is given the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ghostcacher.blocks import LayerKind, LayerSpec, TensorSpec


class Slices(Protocol):
    """State with one entry per token: may be cut, stored and put back anywhere.

    Tensors are shaped as the model shapes them; ``columns`` counts tokens, padding included, from the first.
    """

    def specs(self, layer: Any) -> tuple[TensorSpec, ...]:
        """What an initialised layer holds. Raises ValueError if it is not of the shape this kind has."""
        ...

    def columns(self, layer: Any) -> int:
        """Columns seen so far."""
        ...

    def origin(self, layer: Any) -> int:
        """The column at which `tensors` begin: above 0 once a window has let go of what it no longer needs."""
        ...

    def tensors(self, layer: Any) -> Mapping[str, torch.Tensor]:
        """Everything still held, by name. Never written again after `freeze`."""
        ...

    def freeze(self, layer: Any) -> None:
        """The columns seen now are about to be stored: write later ones elsewhere."""
        ...

    def writable(self, layer: Any, have: int, columns: int) -> tuple[Mapping[str, torch.Tensor], int]:
        """Tensors that hold the first ``have`` columns and have room for ``columns``, and the column they begin at.

        Does not change what the layer shows.
        """
        ...

    def show(self, layer: Any, tensors: Mapping[str, torch.Tensor], columns: int, *, origin: int) -> None:
        """Make these tensors, which begin at column ``origin``, the layer's first ``columns`` columns."""
        ...

    def can_cut_to(self, layer: Any, columns: int) -> bool:
        """Whether the layer still holds what it would show after only ``columns`` columns."""
        ...

    def cut_to(self, layer: Any, columns: int) -> None:
        """Show only the first ``columns`` columns."""
        ...

    def let_go(self, layer: Any, before: int) -> None:
        """Columns below ``before`` are stored; forget those that attention does not need."""
        ...


class States(Protocol):
    """State without a token axis: valid after exactly the tokens that made it."""

    @property
    def needs_pieces(self) -> bool:
        """Whether the state at a length can only be had by ending a forward there."""
        ...

    def specs(self, layer: Any) -> tuple[TensorSpec, ...]:
        """What an initialised layer holds."""
        ...

    def holds(self, layer: Any) -> bool:
        """Whether the layer has seen any token."""
        ...

    def ago(self, layer: Any, columns: int) -> Mapping[str, torch.Tensor] | None:
        """The state as it was ``columns`` columns ago, by name, or None if that cannot be told.

        May be changed in place by the model later: clone it.
        """
        ...

    def restore(self, layer: Any, tensors: Mapping[str, torch.Tensor], columns: int) -> None:
        """Make these tensors, which the layer may change from now on, its state after ``columns`` columns."""
        ...

    def let_go(self, layer: Any) -> None:
        """Forget what is kept only to answer `ago`."""
        ...


def _reorder(layer: Any, rows: torch.Tensor) -> None:
    layer.reorder_cache(rows)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of layer.

    ``make`` gives an empty layer of ours in place of an empty one of transformers'; ``select`` keeps the rows of the
    batch with the given numbers, in that order.
    """

    name: LayerKind
    make: Callable[[Any], Any]
    slices: Slices | None = None
    states: States | None = None
    select: Callable[[Any, torch.Tensor], None] = _reorder

    def spec(self, layer: Any) -> LayerSpec:
        """What a layer that has seen tokens holds."""
        slices = self.slices.specs(layer) if self.slices else ()
        states = self.states.specs(layer) if self.states else ()
        return LayerSpec(self.name, (*slices, *states))

    def is_empty(self, layer: Any) -> bool:
        """Whether the layer has seen no token."""
        has_slices = self.slices is not None and self.slices.columns(layer) > 0
        return not has_slices and not (self.states is not None and self.states.holds(layer))


def dtype_name(tensor: torch.Tensor) -> str:
    """``"float32"``, as `TensorSpec` writes it."""
    return str(tensor.dtype).removeprefix("torch.")
