"""Numbers to state: mean + slope x number in fp32, turned, in the state's dtype, head by head."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from ghostcacher.blocks import Turn
from ghostcacher.codecs.orders import Order, Views


class _Own(threading.local):
    """What each thread restores layers in: flat memory, and views of it by how many layers and phases they have."""

    def __init__(self) -> None:
        self.memory: list[torch.Tensor] = []
        self.views: dict[tuple[int, int], Views] = {}


class Lines:
    """Restores into ``decoded`` ``[layers, heads of all groups, tokens or more, channels]``, some layers at a time.

    Threads may work on different layers at once, each in memory of its own. ``mean`` is ``[layers, groups, w]``, in
    `Heads.order`, and so is ``slope``, or ``[layers, 1, 1]``.
    """

    def __init__(self, order: Order, mean: torch.Tensor, slope: torch.Tensor, decoded: torch.Tensor) -> None:
        self._order, self._decoded = order, decoded
        self._mean, self._slope = mean.to(decoded.device), slope.to(decoded.device)
        self._slopes = [self._slope[None, ..., None, None, None, None, :]] * len(order.heads.shapes)
        if slope.shape[-1] > 1:
            self._slopes = order.over_tokens(self._slope)
        self._offsets: dict[int, Sequence[torch.Tensor]] = {}
        self._angles: dict[int, Sequence[torch.Tensor]] = {}
        self._own = _Own()

    def room(self, layers: slice, phases: int = 1) -> torch.Tensor:
        """Where numbers of ``layers`` go before `write`, in the order: fp32 ``[n]``.

        It is the calling thread's, and used again and again.
        """
        return self._views(layers, phases).numbers

    def write(self, layers: slice, phases: int = 1, added: int = 0) -> None:
        """Restore ``layers``, whose numbers are where `room` said, with something ``added`` to each."""
        views, begin, count = self._views(layers, phases), layers.start, layers.stop - layers.start
        for offset, slope, block in zip(self._offset_by(added), self._slopes, views.blocks, strict=True):
            torch.addcmul(offset.narrow(1, begin, count), block, slope.narrow(1, begin, count), out=block)
        if (turn := self._order.heads.turn) is not None:
            self._turn(turn, views, phases)
        # Cast first, then put by head: torch is slow at both at once.
        for number, cast in enumerate(views.casts):
            cast.copy_(views.planes[number])
        self._order.put(views, self._decoded[layers, :, : self._order.heads.tokens])

    def _offset_by(self, added: int) -> Sequence[torch.Tensor]:
        if added not in self._offsets:
            self._offsets[added] = self._order.over_tokens(torch.sub(self._mean, self._slope, alpha=added))
        return self._offsets[added]

    def _views(self, layers: slice, phases: int) -> Views:
        own, count, heads = self._own, layers.stop - layers.start, self._order.heads
        if (count, phases) not in own.views:
            size = count * heads.groups * heads.tokens * sum(heads.widths)
            if not own.memory or len(own.memory[0]) < size:
                own.views, own.memory = {}, self._memory(size)
            own.views[count, phases] = self._order.views(count, phases, *(each[:size] for each in own.memory))
        return own.views[count, phases]

    def _memory(self, size: int) -> list[torch.Tensor]:
        turned = 0 if self._order.heads.turn is None else size // 2
        sizes = (size, torch.float32), (turned, torch.float32), (size, self._decoded.dtype)
        return [torch.empty(count, dtype=dtype, device=self._decoded.device) for count, dtype in sizes]

    def _turn(self, turn: Turn, views: Views, phases: int) -> None:
        """Put turned first channels into a plane of their own, leave second ones in place."""
        if phases not in self._angles:
            self._angles[phases] = self._order.angles(turn, phases, self._decoded.device)
        cosine, sine = self._angles[phases]
        first, second = views.blocks[0].unbind(3)
        torch.mul(first, cosine, out=views.planes[0]).addcmul_(second, sine, value=-1)
        second.mul_(cosine).addcmul_(first, sine)
