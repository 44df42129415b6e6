"""Channels of heads in the order in which state is coded.

Rope turns channels in pairs. Where keys are coded before it, the first channels of all heads' pairs make one plane, the
second ones another, and channels that are not turned a block of their own: turning then runs over whole planes, not
over pieces of half a head, of which there are too many to start on each.
"""

from __future__ import annotations

import torch

from ghostcacher.blocks import Turn


class Heads:
    """``tokens`` of ``heads`` heads of ``channels`` side by side, in each of some ``groups``; ``turn`` is of keys.

    ``shapes`` are planes and channels of each block: of what is turned, and of what is not. ``widths`` are how many
    columns each has.
    """

    def __init__(self, tokens: int, heads: int, channels: int, turn: Turn | None, *, groups: int = 1) -> None:
        self.tokens, self.heads, self.channels, self.turn, self.groups = tokens, heads, channels, turn, groups
        self._turned = 0 if turn is None else 2 * turn.cosine.shape[1]
        shapes = [(2, self._turned // 2), (1, channels - self._turned)]
        self.shapes = [shape for shape in shapes if shape[1]]
        self.widths = [heads * planes * channels for planes, channels in self.shapes]

    @property
    def order(self) -> torch.Tensor:
        """Which channel stands in each column, head * channels + channel: by block, plane, head."""
        return self.columns(torch.arange(self.heads * self.channels, device="cpu"))

    def blocks(self, state: torch.Tensor) -> list[torch.Tensor]:
        """What of ``state`` ``[…, channels]`` is in each block, ``[…, planes, channels]``; views."""
        plain = [state[..., None, self._turned :]] if self._turned < self.channels else []
        return plain if self.turn is None else [self.turn.pairs(state[..., : self._turned]), *plain]

    def columns(self, state: torch.Tensor) -> torch.Tensor:
        """``state`` ``[…, heads * channels]`` in `order`, as a copy."""
        by_head = torch.unflatten(state, -1, (self.heads, self.channels))
        return torch.cat([block.transpose(-3, -2).flatten(-3) for block in self.blocks(by_head)], dim=-1)

    def by_plane(self, columns: torch.Tensor) -> list[torch.Tensor]:
        """What of ``columns`` ``[…, w]``, in `order`, is in each block, ``[…, planes, heads, channels]``; views."""
        parts = torch.split(columns, self.widths, dim=-1)
        return [
            torch.unflatten(part, -1, (planes, self.heads, channels))
            for part, (planes, channels) in zip(parts, self.shapes, strict=True)
        ]
