"""Memory that blocks are decoded into again and again: fresh pages cost more than most codecs."""

from __future__ import annotations

from itertools import count
from math import prod

import torch

from ghostcacher.transfers import Sending


class Scratch:
    """A `Room` on ``device`` for one block at a time: what it gave is overwritten after `reuse`.

    Several threads may ask for memory at once.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sending = Sending()
        self._buffers: dict[int, torch.Tensor] = {}
        self._numbers = count()

    def reuse(self) -> None:
        """The latest block has been placed: its memory may be given again."""
        self._numbers = count()
        self._sending.sent(self._device)

    def settle(self) -> None:
        """Wait until what this thread computed is done: other threads may compute on other streams."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Room`."""
        size_bytes, number = prod(shape) * dtype.itemsize, next(self._numbers)
        buffer = self._buffers.get(number)
        if buffer is None or len(buffer) < size_bytes:
            buffer = self._buffers[number] = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        return buffer[:size_bytes].view(dtype).view(shape)
