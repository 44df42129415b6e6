"""Sliding and chunked attention: attention sees the last tokens only, but any prefix may be asked for later.

So a layer of ours keeps every key and value that ``update`` saw until they are stored, and shows attention exactly
what transformers' own layer would: a prefix cut anywhere is rebuilt from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from ghostcacher.adapters.full import keys_values_specs
from ghostcacher.adapters.layers import HEADROOM_TOKENS, room_for
from ghostcacher.blocks import TensorSpec


class WindowLayer(DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` over buffers with history in front and spare room behind.

    The buffers begin at column ``first_column``. Columns below ``frozen_columns`` have been captured for storing
    and are never written again; those below ``needed_from`` may be forgotten when the window has passed them.
    """

    cumulative_length: int
    sliding_window: int
    record_past: bool
    is_initialized: bool
    keys: Any
    values: Any
    first_column: int
    frozen_columns: int
    needed_from: int
    _key_buffer: torch.Tensor | None
    _value_buffer: torch.Tensor | None

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(sliding_window=sliding_window, **kwargs)
        self._forget_buffers()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[rows, heads, tokens, dim]`` states; returns what attention may see. Stock behaviour otherwise."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._forget_buffers()
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return updated
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.cumulative_length
        end = start + key_states.shape[-2]
        keys, values, origin = self.writable(key_states, value_states, start, end)
        keys[:, :, start - origin : end - origin] = key_states
        values[:, :, start - origin : end - origin] = value_states
        self.adopt(keys, values, origin, end)
        seen = start - self._kept(start) - origin
        return keys[:, :, seen : end - origin], values[:, :, seen : end - origin]

    def writable(
        self, keys_like: torch.Tensor, values_like: torch.Tensor, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Buffers that hold the columns before ``start`` still needed and have room up to ``end``; their origin."""
        keys, values = self._key_buffer, self._value_buffer
        if keys is None or values is None:
            keys, values, self.first_column = self.keys, self.values, start - self._kept(start)
        elif self._continues(keys, keys_like, start, end):
            return keys, values, self.first_column
        keep_from = max(self.first_column, min(self.needed_from, start - self._kept(start)))
        held = slice(keep_from - self.first_column, start - self.first_column)
        return (
            _moved(keys, keys_like, held, end - keep_from),
            _moved(values, values_like, held, end - keep_from),
            keep_from,
        )

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, origin: int, columns: int) -> None:
        """Show these buffers, which begin at column ``origin``, as a layer that has seen ``columns`` columns."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if keys is not self._key_buffer:
            self.frozen_columns = 0
        self._key_buffer, self._value_buffer, self.first_column = keys, values, origin
        self.cumulative_length = columns
        shown = slice(columns - self._kept(columns) - origin, columns - origin)
        self.keys, self.values = keys[:, :, shown], values[:, :, shown]

    def history(self) -> Mapping[str, torch.Tensor]:
        """Keys and values from ``first_column`` on."""
        if self._key_buffer is None or self._value_buffer is None:
            return {"keys": self.keys, "values": self.values}
        held = slice(0, self.cumulative_length - self.first_column)
        return {"keys": self._key_buffer[:, :, held], "values": self._value_buffer[:, :, held]}

    def holds_window_at(self, columns: int) -> bool:
        """Whether the window as it was after ``columns`` columns is still held."""
        return columns <= self.cumulative_length and columns - self._kept(columns) >= self.first_column

    def freeze(self) -> None:
        """Never write the columns seen now again: they are about to be stored."""
        self.frozen_columns = max(self.frozen_columns, self.cumulative_length)

    def let_go(self, before: int) -> None:
        """Columns below ``before`` are stored: forget those the window has passed, once they are many."""
        self.needed_from = max(self.needed_from, before)
        end = self.cumulative_length
        keep_from = min(self.needed_from, end - self._kept(end))
        if self._key_buffer is None or self._value_buffer is None or self.record_past:
            return
        if keep_from - self.first_column > max(end - keep_from, HEADROOM_TOKENS):
            held = slice(keep_from - self.first_column, end - self.first_column)
            keys, values = self._key_buffer, self._value_buffer
            moved = (
                _moved(keys, keys, held, held.stop - held.start),
                _moved(values, values, held, held.stop - held.start),
            )
            self.adopt(*moved, keep_from, end)

    def cut_to(self, columns: int) -> None:
        """Show the layer as it was after ``columns`` columns; see `holds_window_at`."""
        if columns < self.cumulative_length and self._key_buffer is not None and self._value_buffer is not None:
            self.needed_from = min(self.needed_from, columns)
            self.adopt(self._key_buffer, self._value_buffer, self.first_column, columns)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``abs(tokens_to_remove)`` tokens.

        Raises:
            RuntimeError: the window at that length has been let go of.
        """
        left = self.cumulative_length - abs(tokens_to_remove)
        if self._key_buffer is None:
            super().crop(tokens_to_remove)
        elif self.holds_window_at(left):
            self.cut_to(left)
        else:
            raise RuntimeError(f"the window after {left} of {self.cumulative_length} tokens is no longer held")

    def reset(self) -> None:
        """Forget everything, buffers too."""
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0
        self._forget_buffers()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select rows for beam search; only the window is kept of them."""
        self._select(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        self._select(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._select(lambda state: state[indices, ...])

    def _select(self, rows: Any) -> None:
        if self.cumulative_length:
            self.keys, self.values = rows(self.keys), rows(self.values)
            self._forget_buffers()
            self.first_column = self.cumulative_length - self.keys.shape[-2]

    def _forget_buffers(self) -> None:
        self._key_buffer = self._value_buffer = None
        self.first_column = self.frozen_columns = self.needed_from = 0

    def _kept(self, columns: int) -> int:
        return min(columns, self.sliding_window - 1)

    def _continues(self, buffer: torch.Tensor, like: torch.Tensor, start: int, end: int) -> bool:
        is_same_kind = buffer.dtype == like.dtype and buffer.device == like.device
        is_same_shape = buffer.shape[:2] == like.shape[:2] and buffer.shape[3] == like.shape[3]
        is_writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
        has_room = self.frozen_columns <= start and end - self.first_column <= buffer.shape[2]
        return is_same_kind and is_same_shape and is_writable and has_room


class WindowSlices:
    """See `Slices`; for `WindowLayer`."""

    def specs(self, layer: WindowLayer) -> tuple[TensorSpec, ...]:
        """See `Slices.specs`."""
        return keys_values_specs(layer)

    def columns(self, layer: WindowLayer) -> int:
        """See `Slices.columns`."""
        return layer.cumulative_length

    def origin(self, layer: WindowLayer) -> int:
        """See `Slices.origin`."""
        return layer.first_column

    def tensors(self, layer: WindowLayer) -> Mapping[str, torch.Tensor]:
        """See `Slices.tensors`."""
        return layer.history()

    def freeze(self, layer: WindowLayer) -> None:
        """See `Slices.freeze`."""
        layer.freeze()

    def writable(self, layer: WindowLayer, have: int, columns: int) -> tuple[Mapping[str, torch.Tensor], int]:
        """See `Slices.writable`."""
        keys, values, origin = layer.writable(layer.keys, layer.values, have, columns)
        return {"keys": keys, "values": values}, origin

    def show(self, layer: WindowLayer, tensors: Mapping[str, torch.Tensor], columns: int, *, origin: int) -> None:
        """See `Slices.show`."""
        layer.adopt(tensors["keys"], tensors["values"], origin, columns)

    def can_cut_to(self, layer: WindowLayer, columns: int) -> bool:
        """See `Slices.can_cut_to`."""
        return layer.holds_window_at(columns)

    def cut_to(self, layer: WindowLayer, columns: int) -> None:
        """See `Slices.cut_to`."""
        layer.cut_to(columns)

    def let_go(self, layer: WindowLayer, before: int) -> None:
        """See `Slices.let_go`."""
        layer.let_go(before)


def _moved(state: torch.Tensor, like: torch.Tensor, held: slice, columns: int) -> torch.Tensor:
    rows, heads, _, dim = like.shape
    buffer = torch.empty((rows, heads, room_for(columns), dim), dtype=like.dtype, device=like.device)
    if held.stop > held.start:
        buffer[:, :, : held.stop - held.start] = state[:, :, held]
    return buffer
