"""Rows in which state is coded, and back into heads, keys turned as the model had them.

Rope turns channels in pairs. Where keys are coded before it, the first channels of all heads' pairs make one plane, the
second ones another, and channels that are not turned a third: turning then runs over whole planes, not over pieces of
half a head, of which there are too many to start on each.
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
    def order(self) -> torch.Tensor:
        """Which channel stands in each column, head * channels + channel: plane after plane."""
        natural = torch.arange(self.heads * self.channels, device="cpu").view(self.heads, self.channels)
        return torch.cat([part.flatten() for part in self.parts(natural)])

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
        """Where each plane goes in ``[layers, heads, tokens, channels]``; see `Lines.write`."""
        return [part for part in self.parts(torch.unflatten(state, 1, (self.groups, -1))) if part.numel()]


class Lines:
    """Numbers to state: mean + slope * number in fp32, turned, by head, into ``decoded``, some layers at a time.

    ``mean`` and ``slope`` are ``[layers, groups, w]``, channels plane after plane; ``decoded`` is
    ``[layers, heads, at least the tokens, channels]``.
    """

    def __init__(
        self, heads: Heads, mean: torch.Tensor, slope: torch.Tensor, tokens: int, decoded: torch.Tensor
    ) -> None:
        self._heads, self._tokens, self._device = heads, tokens, decoded.device
        self._mean, self._slope = mean.to(decoded.device), slope.to(decoded.device)
        self._dtype, self._places = decoded.dtype, heads.places(decoded[:, :, :tokens])
        self._rows = torch.empty(0, device="cpu")
        self._turns = None
        if heads.turn is not None:
            turns = (heads.turn.cosine, heads.turn.sine)
            self._turns = tuple(part.to(decoded.device).repeat(1, heads.heads) for part in turns)

    def room(self, layers: slice) -> torch.Tensor:
        """Where numbers of ``layers`` go before `write`: fp32 ``[layers, groups, tokens, w]``, used again and again."""
        count = layers.stop - layers.start
        if len(self._rows) != count:
            self._make_room(count)
        return self._rows

    def write(self, layers: slice) -> None:
        """Restore ``layers``, whose numbers are where `room` said."""
        torch.addcmul(self._mean[layers, :, None], self._rows, self._slope[layers, :, None], out=self._rows)
        if self._turns is None:
            self._casts[0].copy_(self._planes[0])
        else:
            self._turn(*self._turns)
        for place, by_head in zip(self._places, self._by_head, strict=True):
            place[layers].copy_(by_head)

    def _make_room(self, layers: int) -> None:
        heads, whole = self._heads, torch.contiguous_format
        shape = (layers, heads.groups, self._tokens, sum(heads.sizes))
        self._rows = torch.empty(shape, dtype=torch.float32, device=self._device)
        self._planes = torch.split(self._rows, heads.sizes, dim=-1)
        # Cast in one piece, then put by head: torch is slow at both at once.
        self._casts = [torch.empty_like(plane, dtype=self._dtype, memory_format=whole) for plane in self._planes]
        self._by_head = [torch.unflatten(cast, 3, (heads.heads, -1)).transpose(2, 3) for cast in self._casts]
        self._turned = torch.empty_like(self._planes[0], memory_format=whole)

    def _turn(self, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        first, second, *rest = self._planes
        torch.mul(first, cosine, out=self._turned).addcmul_(second, sine, value=-1)
        self._casts[0].copy_(self._turned)
        torch.mul(second, cosine, out=self._turned).addcmul_(first, sine)
        self._casts[1].copy_(self._turned)
        for cast, plane in zip(self._casts[2:], rest, strict=True):
            cast.copy_(plane)
