"""A full-attention cache layer that grows in place instead of being concatenated anew at every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

HEADROOM_TOKENS = 256
HEADROOM_SHARE = 8


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` over buffers with spare room: ``keys`` and ``values`` are views of their front.

    What transformers' own methods put into ``keys`` and ``values`` (crop, beam selection) is noticed at the next
    ``update``: a shorter view of the same buffer is continued in place, anything else is copied into a new one.
    Columns below ``frozen_tokens`` have been captured for storing and are never written again.
    """

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self) -> None:
        super().__init__()
        self._key_buffer: torch.Tensor | None = None
        self._value_buffer: torch.Tensor | None = None
        self.frozen_tokens = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[rows, heads, tokens, dim]`` states; returns all keys and values. See `DynamicLayer.update`."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return updated
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        keys, values = self.writable(key_states, value_states, start, end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.adopt(keys, values, end)
        return self.keys, self.values

    def writable(
        self, keys_like: torch.Tensor, values_like: torch.Tensor, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers that hold this layer's first ``start`` columns and have room for ``end``.

        Shaped, typed and placed like the given states. Does not change what the layer shows: see `adopt`.
        """
        keys, values = self._key_buffer, self._value_buffer
        if keys is not None and values is not None and self._continues(keys, keys_like, start, end):
            return keys, values
        keys, values = _with_room(keys_like, end), _with_room(values_like, end)
        if start:
            keys[:, :, :start] = self.keys[:, :, :start]
            values[:, :, :start] = self.values[:, :, :start]
        return keys, values

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """Show the first ``tokens`` columns of these buffers as the layer's state."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if keys is not self._key_buffer:
            self.frozen_tokens = 0
        self._key_buffer, self._value_buffer = keys, values
        self.keys, self.values = keys[:, :, :tokens], values[:, :, :tokens]

    def cut_to(self, tokens: int) -> None:
        """Show only the first ``tokens`` columns."""
        if self.get_seq_length() > tokens:
            self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]

    def freeze(self) -> None:
        """Never write the columns shown now again: they are about to be stored."""
        self.frozen_tokens = max(self.frozen_tokens, self.get_seq_length())

    def reset(self) -> None:
        """Forget everything, buffers too."""
        self.keys = self.values = None
        self.is_initialized = False
        self._key_buffer = self._value_buffer = None
        self.frozen_tokens = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select rows, any number of them, into fresh buffers with the same room."""
        tokens = self.get_seq_length()
        if not tokens or self._key_buffer is None or self._value_buffer is None:
            super().reorder_cache(beam_idx)
            return
        rows = beam_idx.to(self.keys.device)
        keys, values = _with_room(self.keys, tokens, len(rows)), _with_room(self.values, tokens, len(rows))
        torch.index_select(self.keys, 0, rows, out=keys[:, :, :tokens])
        torch.index_select(self.values, 0, rows, out=values[:, :, :tokens])
        self.adopt(keys, values, tokens)

    def _continues(self, buffer: torch.Tensor, like: torch.Tensor, start: int, end: int) -> bool:
        is_front = start == 0 or (self.keys.data_ptr() == buffer.data_ptr() and self.keys.stride() == buffer.stride())
        is_same_kind = buffer.dtype == like.dtype and buffer.device == like.device
        is_same_shape = buffer.shape[:2] == like.shape[:2] and buffer.shape[3] == like.shape[3]
        is_writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
        has_room = self.frozen_tokens <= start and end <= buffer.shape[2]
        return is_front and is_same_kind and is_same_shape and is_writable and has_room


def room_for(tokens: int) -> int:
    """Columns to allocate for ``tokens``: an eighth more, at least 256, to grow into."""
    return tokens + max(HEADROOM_TOKENS, tokens // HEADROOM_SHARE)


def _with_room(like: torch.Tensor, tokens: int, rows: int | None = None) -> torch.Tensor:
    given, heads, _, dim = like.shape
    return torch.empty((rows or given, heads, room_for(tokens), dim), dtype=like.dtype, device=like.device)
