"""Lines in which state is coded, and back into heads, keys turned as the model had them.

Rope turns channels in pairs. Where keys are coded before it, the first channels of all heads' pairs make one plane, the
second ones another, and channels that are not turned a block of their own: turning then runs over whole planes, not
over pieces of half a head, of which there are too many to start on each. In the planes of `ec` all tokens of one phase,
every fourth one, stand together: neighbours in time, which are alike, can share a byte, and unpacking runs over long
pieces.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from math import gcd

import torch

from ghostcacher.blocks import Turn

KEPT_ANGLES = 2**17
"""Of blocks with at most so many angles cosine and sine are kept: a mebibyte each, of the latest 32."""


class Heads:
    """``tokens`` of ``heads`` heads of ``channels`` side by side, in each of some ``groups``; ``turn`` is of keys.

    ``shapes`` are planes and channels of each block: of what is turned, and of what is not. ``widths`` are how many
    columns each has. Lines are columns token by token, or where there are ``phases``, plane by plane.
    """

    def __init__(
        self, tokens: int, heads: int, channels: int, turn: Turn | None, *, groups: int = 1, phases: int = 1
    ) -> None:
        self.tokens, self.heads, self.channels, self.turn = tokens, heads, channels, turn
        self.groups, self.phases = groups, phases
        self._turned = 0 if turn is None else 2 * turn.cosine.shape[1]
        shapes = [(2, self._turned // 2), (1, channels - self._turned)]
        self.shapes = [shape for shape in shapes if shape[1]]
        self.widths = [heads * planes * channels for planes, channels in self.shapes]

    @property
    def order(self) -> torch.Tensor:
        """Which channel stands in each column, head * channels + channel: by block, plane, head."""
        return self.columns(torch.arange(self.heads * self.channels, device="cpu"))

    @property
    def apart(self) -> int:
        """How far from a code in `lines` the next token's is; of several blocks, what divides all their distances."""
        return self.tokens // self.phases * self.heads * gcd(*(channels for _, channels in self.shapes))

    def blocks(self, state: torch.Tensor) -> list[torch.Tensor]:
        """What of ``state`` ``[…, channels]`` is in each block, ``[…, planes, channels]``; views."""
        plain = [state[..., None, self._turned :]] if self._turned < self.channels else []
        return plain if self.turn is None else [self.turn.pairs(state[..., : self._turned]), *plain]

    def columns(self, state: torch.Tensor) -> torch.Tensor:
        """``state`` ``[…, heads * channels]`` in `order`, as a copy."""
        by_head = torch.unflatten(state, -1, (self.heads, self.channels))
        return torch.cat([block.transpose(-3, -2).flatten(-3) for block in self.blocks(by_head)], dim=-1)

    def by_block(self, lines: torch.Tensor) -> list[torch.Tensor]:
        """Views of ``lines`` ``[…, tokens * w]``: ``[…, planes, phases, tokens of a phase, heads * channels]`` each."""
        if self.phases == 1:
            return self.of_columns(torch.unflatten(lines, -1, (self.tokens, -1)))
        parts = zip(self.of_widths(lines, self.tokens), self.shapes, strict=True)
        per_phase = self.phases, self.tokens // self.phases
        return [
            part.view(*part.shape[:-1], planes, *per_phase, self.heads * channels) for part, (planes, channels) in parts
        ]

    def of_widths(self, columns: torch.Tensor, tokens: int = 1) -> list[torch.Tensor]:
        """What of ``columns`` ``[…, tokens * w]`` is in each block; views."""
        if len(self.widths) == 1:
            return [columns]
        return list(torch.split(columns, [tokens * width for width in self.widths], dim=-1))

    def of_columns(self, columns: torch.Tensor) -> list[torch.Tensor]:
        """The same views of ``columns`` ``[…, tokens, w]``, in `order`."""
        parts = self.of_widths(columns)
        return [
            torch.unflatten(self.by_phase(part), -1, (planes, -1)).transpose(-4, -2)
            for part, (planes, _) in zip(parts, self.shapes, strict=True)
        ]

    def lines(self, columns: torch.Tensor) -> torch.Tensor:
        """``columns`` ``[layers, tokens, w]``, in `order`, as ``[layers, tokens * w]``."""
        return torch.cat([block.flatten(1) for block in self.of_columns(columns)], dim=1)

    def by_phase(self, columns: torch.Tensor) -> torch.Tensor:
        """``[…, tokens, w]`` as ``[…, tokens of a phase, phases, w]``; a view."""
        return torch.unflatten(columns, -2, (-1, self.phases))


class _Own(threading.local):
    """What each thread restores layers in: ``lines`` of numbers, and views of it and what follows, by block."""

    def __init__(self) -> None:
        self.lines = torch.empty(0, device="cpu")
        self.blocks: list[torch.Tensor] = []
        self.planes: list[torch.Tensor] = []
        self.casts: list[torch.Tensor] = []
        self.by_head: list[torch.Tensor] = []


class Lines:
    """Numbers to state: mean + slope * number in fp32, turned, by head, into ``decoded``, some layers at a time.

    Threads may work on different layers at once, each in memory of its own. ``mean`` is ``[layers, groups, w]``, in
    `Heads.order`, and so is ``slope``, or ``[layers, 1, 1]``; ``decoded`` is
    ``[layers, heads, at least the tokens, channels]``.
    """

    def __init__(self, heads: Heads, mean: torch.Tensor, slope: torch.Tensor, decoded: torch.Tensor) -> None:
        self._heads, self._device, self._dtype = heads, decoded.device, decoded.dtype
        self._mean, self._slope = mean.to(self._device), slope.to(self._device)
        self._slopes = self._by_plane(self._slope)
        self._offsets: dict[int, list[torch.Tensor]] = {}
        self._places = heads.blocks(torch.unflatten(decoded[:, :, : heads.tokens], 1, (heads.groups, heads.heads)))
        self._own = _Own()
        if heads.turn is not None:
            self._cosine, self._sine = _over_heads(heads.turn, heads.heads, heads.phases, self._device)

    def room(self, layers: slice) -> torch.Tensor:
        """Where numbers of ``layers`` go before `write`: fp32 ``[layers, groups, tokens * w]``; see `Heads.by_block`.

        It is the calling thread's, and used again and again.
        """
        count = layers.stop - layers.start
        if len(self._own.lines) != count:
            self._make_room(count)
        return self._own.lines

    def write(self, layers: slice, added: int = 0) -> None:
        """Restore ``layers``, whose numbers are where `room` said, with something ``added`` to each."""
        own = self._own
        for offset, slope, block in zip(self._offset_by(added), self._slopes, own.blocks, strict=True):
            torch.addcmul(offset[layers], block, slope[layers], out=block)
        if self._heads.turn is not None:
            self._turn(own.blocks[0], own.planes[0])
        # Cast first, then put by head: torch is slow at both at once.
        for cast, plane in zip(own.casts, own.planes, strict=True):
            cast.copy_(plane)
        for place, by_head in zip(self._places, own.by_head, strict=True):
            place[layers].copy_(by_head)

    def _offset_by(self, added: int) -> list[torch.Tensor]:
        if added not in self._offsets:
            self._offsets[added] = self._by_plane(torch.sub(self._mean, self._slope, alpha=added))
        return self._offsets[added]

    def _by_plane(self, columns: torch.Tensor) -> list[torch.Tensor]:
        """``[layers, groups, planes, 1, 1, heads * channels]`` of each block, or what stands for all."""
        if columns.shape[-1] == 1:
            return [columns[..., None, None, None]] * len(self._heads.shapes)
        parts = zip(self._heads.of_widths(columns), self._heads.shapes, strict=True)
        return [part.reshape(*part.shape[:2], planes, 1, 1, -1) for part, (planes, _) in parts]

    def _make_room(self, layers: int) -> None:
        heads, own = self._heads, self._own
        shape = (layers, heads.groups, heads.tokens * sum(heads.widths))
        own.lines = torch.empty(shape, dtype=torch.float32, device=self._device)
        own.blocks = heads.by_block(own.lines)
        own.planes = [plane for block in own.blocks for plane in block.unbind(2)]
        if heads.turn is not None:
            own.planes[0] = torch.empty_like(own.planes[0], memory_format=torch.contiguous_format)
        own.casts, own.by_head = [], []
        for (planes, channels), width in zip(heads.shapes, heads.widths, strict=True):
            cast = torch.empty((*shape[:2], heads.tokens, width), dtype=self._dtype, device=self._device)
            by_phase = cast.view(*shape[:2], -1, heads.phases, planes, heads.heads * channels)
            own.casts += by_phase.permute(0, 1, 4, 3, 2, 5).unbind(2)
            by_head = cast.view(*shape[:2], heads.tokens, planes, heads.heads, channels)
            own.by_head.append(by_head.permute(0, 1, 4, 2, 3, 5))

    def _turn(self, block: torch.Tensor, turned: torch.Tensor) -> None:
        """Put turned first channels into a plane of their own, leave second ones in place."""
        first, second = block.unbind(2)
        torch.mul(first, self._cosine, out=turned).addcmul_(second, self._sine, value=-1)
        second.mul_(self._cosine).addcmul_(first, self._sine)


def _over_heads(turn: Turn, heads: int, phases: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``[tokens, pairs]`` as ``[phases, tokens of a phase, heads * pairs]``; small ones are kept."""
    is_small = turn.cosine.numel() * heads <= KEPT_ANGLES
    return (_kept_over_heads if is_small else _spread_over_heads)(turn, heads, phases, device)


def _spread_over_heads(turn: Turn, heads: int, phases: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Computed on the CPU: a copy to a device has ended when it returns, whatever stream asks for it next.
    def spread(angles: torch.Tensor) -> torch.Tensor:
        by_phase = angles.view(-1, phases, angles.shape[1]).transpose(0, 1)
        return torch.cat([by_phase] * heads, dim=-1).to(device)

    return spread(turn.cosine), spread(turn.sine)


_kept_over_heads = lru_cache(maxsize=32)(_spread_over_heads)
