"""The layers of one cache, each with its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache

from ghostcacher.adapters.parts import Kind

Snapshot = Sequence[Mapping[str, torch.Tensor]]
"""Per layer, its tensors without a token axis, as the model shapes them: all rows."""

Held = tuple[Mapping[str, torch.Tensor], int]
"""One layer's per-token tensors, all rows, and the column at which they begin."""


class CacheState:
    """What a cache holds, layer by layer. ``layers`` is the cache's own list."""

    def __init__(
        self, layers: list[Any], kinds: Sequence[Kind], blank: Callable[[], list[Any]], *, is_static: bool = False
    ) -> None:
        """``blank`` gives empty layers of these kinds. A static cache is filled once, from the front."""
        self.is_static = is_static
        self.layers = layers
        self.kinds = tuple(kinds)
        self._blank = blank

    @property
    def needs_pieces(self) -> bool:
        """Whether snapshots can only be taken where a forward ends."""
        return any(kind.states is not None and kind.states.needs_pieces for kind in self.kinds)

    @property
    def has_states(self) -> bool:
        """Whether any layer has state without a token axis."""
        return any(kind.states is not None for kind in self.kinds)

    @property
    def is_empty(self) -> bool:
        """Whether no layer has seen a token."""
        return all(kind.is_empty(layer) for kind, layer in self.pairs())

    @property
    def rows(self) -> int:
        """Rows of the batch that the layers hold state of; 0 if they hold none."""
        for kind, layer in self.pairs():
            if not kind.is_empty(layer):
                slices = kind.slices.tensors(layer) if kind.slices else {}
                states = (kind.states.ago(layer, 0) or {}) if kind.states else {}
                axes = {spec.name: spec.batch_axis for spec in kind.spec(layer).tensors}
                return next((int(t.shape[axes[n]]) for n, t in {**slices, **states}.items()), 0)
        return 0

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows with these numbers, in this order and as often as they occur, of every tensor."""
        for kind, layer in self.pairs():
            kind.select(layer, rows)

    def pairs(self) -> list[tuple[Kind, Any]]:
        """Every layer with its kind."""
        return list(zip(self.kinds, self.layers, strict=False))

    def columns(self) -> int | None:
        """Columns that every layer which counts them holds; None if no layer counts."""
        counts = [kind.slices.columns(layer) for kind, layer in self.pairs() if kind.slices]
        return min(counts) if counts else None

    def is_at(self, columns: int) -> bool:
        """Whether the layers hold exactly ``columns`` columns, as far as they count."""
        counts = {kind.slices.columns(layer) for kind, layer in self.pairs() if kind.slices}
        return len(self.layers) == len(self.kinds) and counts <= {columns}

    def cut_to(self, columns: int, *, held: int) -> int:
        """Keep the first ``columns`` of ``held`` columns; if any layer cannot, drop everything. What is left."""
        if columns == held and self.is_at(held):
            return columns
        if (
            columns == 0
            or self.has_states
            or not all(k.slices.can_cut_to(x, columns) for k, x in self.pairs() if k.slices)
        ):
            self.empty()
            return 0
        for kind, layer in self.pairs():
            if kind.slices:
                kind.slices.cut_to(layer, columns)
        return columns

    def empty(self) -> None:
        """Drop everything: fresh layers of the same kinds."""
        put_layers(self.layers, self._blank())

    def snapshot(self, ago: int = 0) -> Snapshot | None:
        """A copy of the state without token axis as it was ``ago`` columns ago, or None if that cannot be told."""
        found: list[Mapping[str, torch.Tensor]] = []
        for kind, layer in self.pairs():
            state = kind.states.ago(layer, ago) if kind.states else {}
            if state is None:
                return None
            found.append({name: tensor.clone() for name, tensor in state.items()})
        return found

    def frozen(self) -> Sequence[Held]:
        """What every layer holds per token, about to be stored: later columns are written elsewhere."""
        found: list[Held] = []
        for kind, layer in self.pairs():
            if kind.slices:
                kind.slices.freeze(layer)
                found.append((kind.slices.tensors(layer), kind.slices.origin(layer)))
            else:
                found.append(({}, 0))
        return found

    def let_go(self, before: int) -> None:
        """Columns below ``before`` are stored: forget what the model does not need."""
        for kind, layer in self.pairs():
            if kind.slices:
                kind.slices.let_go(layer, before)
        self.forget_inputs()

    def forget_inputs(self) -> None:
        """Earlier states cannot be told any more: a forward is about to change them unseen."""
        for kind, layer in self.pairs():
            if kind.states:
                kind.states.let_go(layer)


def put_layers(layers: list[Any], fresh: list[Any]) -> None:
    """Put ``fresh`` layers in place of a cache's; they record their past, to be cropped later, if those did."""
    is_recording = any(getattr(layer, "record_past", False) for layer in layers)
    layers[:] = fresh
    if is_recording:
        for layer in layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()


def past_of(cache: Cache) -> int:
    """Columns that a cache holds of which we know nothing; 1 for state that has no columns."""
    for layer in cache.layers:
        if hasattr(layer, "get_seq_length"):
            return int(layer.get_seq_length())
    return int(any(getattr(layer, "has_previous_state", None) and any(_flags(layer)) for layer in cache.layers))


def _flags(layer: Any) -> list[bool]:
    held = layer.has_previous_state
    return [bool(flag) for flag in (held.values() if isinstance(held, dict) else held)]
