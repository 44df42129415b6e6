"""Layers that have both a sliding window and convolutional states (inkling)."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import LinearAttentionAndSlidingWindowAttentionLayer

from ghostcacher.adapters.linear import ConvLayer
from ghostcacher.adapters.window import WindowLayer


class ConvWindowLayer(WindowLayer, ConvLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """A `LinearAttentionAndSlidingWindowAttentionLayer` that keeps its history and its inputs until stored."""

    def __init__(self, sliding_window: int, number_of_states: int = 1, **kwargs: Any) -> None:
        LinearAttentionAndSlidingWindowAttentionLayer.__init__(
            self, sliding_window=sliding_window, number_of_states=number_of_states, **kwargs
        )
        self.seen_inputs = {}
        self._forget_buffers()

    def reset(self) -> None:
        """Forget everything."""
        ConvLayer.reset(self)
        WindowLayer.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Select rows for beam search."""
        ConvLayer.reorder_cache(self, beam_idx)
        WindowLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; see both halves."""
        ConvLayer.crop(self, tokens_to_remove)
        WindowLayer.crop(self, tokens_to_remove)
