"""Rows in which state is coded, and back into heads, keys turned as the model had them.

Rope turns channels in pairs. Where keys are coded before it, the first channels of all heads' pairs make one plane, the
second ones another, and channels that are not turned a third: turning then runs over whole planes. Head by head, in
pieces of half a head, it took as long as everything else that decoding does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ghostcacher.blocks import Turn


@dataclass(frozen=True, slots=True)
class Heads:
    """``heads`` heads of ``channels`` side by side, in each of some ``groups``; ``turn`` is how keys are turned."""

    heads: int
    channels: int
    turn: Turn | None
    groups: int = 1

    @property
    def planes(self) -> list[torch.Tensor]:
        """Of each plane, which channels it holds: head * channels + channel."""
        natural = torch.arange(self.heads * self.channels, device="cpu").view(self.heads, self.channels)
        return [part.flatten() for part in self.parts(natural) if part.numel()]

    @property
    def sizes(self) -> list[int]:
        """How many channels each plane holds."""
        if self.turn is None:
            return [self.heads * self.channels]
        pairs = self.turn.cosine.shape[1]
        return [self.heads * each for each in (pairs, pairs, self.channels - 2 * pairs) if each]

    def parts(self, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What of ``state`` ``[…, channels]`` is in each plane, as views: first, second, rest; or all of it."""
        if self.turn is None:
            return (state,)
        turned = 2 * self.turn.cosine.shape[1]
        return (*self.turn.halves(state[..., :turned]), state[..., turned:])

    def places(self, state: torch.Tensor) -> list[torch.Tensor]:
        """Where each plane goes in ``[layers, heads, tokens, channels]``; see `Rows.write`."""
        return [part for part in self.parts(torch.unflatten(state, 1, (self.groups, -1))) if part.numel()]

    def rows(
        self, old: Rows | None, layers: slice, tokens: int, dtype: torch.dtype, *, is_joined: bool = False
    ) -> Rows:
        """Room for the rows of ``layers``: ``old``, if it has that many."""
        count = layers.stop - layers.start
        return old if old and old.layers == count else Rows(self, count, tokens, dtype, is_joined=is_joined)


class Rows:
    """Room for some layers' rows in fp32, filled and written again and again.

    ``planes`` are ``[layers, parts, tokens, the plane's channels]``, apart from each other, or views of one tensor of
    all channels if ``is_joined``; ``all`` is that memory.
    """

    def __init__(self, heads: Heads, layers: int, tokens: int, dtype: torch.dtype, *, is_joined: bool) -> None:
        parts = heads.groups
        sizes = heads.sizes
        self.layers = layers
        self.all = torch.empty((layers, parts * tokens * sum(sizes)), dtype=torch.float32, device="cpu")
        if is_joined:
            self.planes = torch.split(self.all.view(layers, parts, tokens, -1), sizes, dim=-1)
        else:
            apart = torch.split(self.all, [parts * tokens * size for size in sizes], dim=1)
            self.planes = tuple(plane.view(layers, parts, tokens, -1) for plane in apart)
        whole = torch.contiguous_format
        self._turn = heads.turn
        self._casts = [torch.empty_like(plane, dtype=dtype, memory_format=whole) for plane in self.planes]
        self._by_head = [torch.unflatten(cast, 3, (heads.heads, -1)).transpose(2, 3) for cast in self._casts]
        if heads.turn is not None:
            self._turned = torch.empty_like(self.planes[0], memory_format=whole)
            self._cosine, self._sine = (part.repeat(1, heads.heads) for part in (heads.turn.cosine, heads.turn.sine))

    def write(self, into: list[torch.Tensor]) -> None:
        """Turn the planes and write them to views ``[layers, parts, heads, tokens, channels]`` of their places."""
        if self._turn is None:
            self._casts[0].copy_(self.planes[0])
        else:
            first, second, *rest = self.planes
            torch.mul(first, self._cosine, out=self._turned).addcmul_(second, self._sine, value=-1)
            self._casts[0].copy_(self._turned)
            torch.mul(second, self._cosine, out=self._turned).addcmul_(first, self._sine)
            self._casts[1].copy_(self._turned)
            for cast, plane in zip(self._casts[2:], rest, strict=True):
                cast.copy_(plane)
        for place, by_head in zip(into, self._by_head, strict=True):
            place.copy_(by_head)
