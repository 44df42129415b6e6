"""Memory that blocks are decoded into again and again: fresh pages cost more than most codecs."""

from __future__ import annotations

from math import prod

import torch

from ghostcacher.transfers import Sending


class Scratch:
    """A `Room` on ``device`` for one thread: what it gave for a block is overwritten after `reuse`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sending = Sending()
        self._buffers: list[torch.Tensor] = []
        self._taken = 0

    def reuse(self) -> None:
        """The latest block has been placed: its memory may be given again."""
        self._taken = 0
        self._sending.sent(self._device)

    def settle(self) -> None:
        """Wait until what this thread computed is done: other threads may compute on other streams."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Room`."""
        size_bytes = prod(shape) * dtype.itemsize
        if self._taken == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8, device=self._device))
        if len(self._buffers[self._taken]) < size_bytes:
            self._buffers[self._taken] = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        self._taken += 1
        return self._buffers[self._taken - 1][:size_bytes].view(dtype).view(shape)
