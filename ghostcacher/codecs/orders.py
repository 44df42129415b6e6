"""Orders in which numbers lie before they are state: what a codec unpacks, and views of it by plane.

Views are ``[phases, layers, groups, planes, heads, spans, tokens of a span, channels]``, whatever the order in memory;
those of one plane lack that axis. A phase is every so many-th token: neighbours in time, which are alike, are in
different ones, and can share a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from ghostcacher.blocks import Turn
from ghostcacher.codecs.heads import Heads

SPAN_TOKENS = 8
"""So many tokens of a head share one row of offsets: torch starts anew on each row, and a token's is short."""

KEPT_ANGLES = 2**17
"""Of blocks with at most so many angles cosine and sine are kept: a mebibyte each, of the latest 32."""


@dataclass(frozen=True, slots=True)
class Views:
    """Of memory for some layers: ``blocks`` are where ``numbers`` lie.

    ``planes`` are what is cast, the first one apart from its block if it is turned; ``casts`` are where to. ``done``
    are blocks of what is put into state, casts, or numbers if there are none; ``pieces`` the same by phase and plane
    if that is the order of a head's channels.
    """

    numbers: torch.Tensor
    blocks: Sequence[torch.Tensor]
    planes: Sequence[torch.Tensor]
    casts: Sequence[torch.Tensor]
    done: Sequence[torch.Tensor]
    pieces: tuple[torch.Tensor, ...] = ()


class Order(Protocol):
    """How numbers of ``heads`` lie in memory."""

    heads: Heads

    def over_tokens(self, columns: torch.Tensor) -> list[torch.Tensor]:
        """What all tokens have in common, ``[layers, groups, w]``, as a view of each block is."""

    def angles(self, turn: Turn, phases: int, device: torch.device) -> Sequence[torch.Tensor]:
        """Cosine and sine, as a view of a plane is."""

    def views(self, layers: int, phases: int, numbers: torch.Tensor, turned: torch.Tensor, cast: torch.Tensor) -> Views:
        """Of flat memory for all channels of as many layers, ``turned`` for half; ``cast`` is in the state's dtype."""

    def put(self, views: Views, into: torch.Tensor) -> None:
        """Put what is done into state ``[layers, groups * heads, tokens, channels]``."""


class TokenByToken:
    """``[layers, groups, tokens, w]``: all of a token side by side, as a product of matrices gives it. One phase."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def over_tokens(self, columns: torch.Tensor) -> list[torch.Tensor]:
        """See `Order`."""
        return [part[None, ..., None, None, :] for part in self.heads.by_plane(columns)]

    def angles(self, turn: Turn, phases: int, device: torch.device) -> Sequence[torch.Tensor]:
        """See `Order`. Each head has its own: the rows of all of them are one long row."""
        found = _angles(turn, phases, self.heads.heads, device)
        return [each.transpose(1, 2)[:, None, None, :, :, None] for each in found]

    def views(self, layers: int, phases: int, numbers: torch.Tensor, turned: torch.Tensor, cast: torch.Tensor) -> Views:
        """See `Order`."""
        blocks, done = self._blocks(layers, numbers), self._blocks(layers, cast)
        planes = _planes(blocks)
        if self.heads.turn is not None:
            shape = (layers, self.heads.groups, self.heads.tokens, self.heads.heads, -1)
            planes[0] = turned[: planes[0].numel()].view(shape).transpose(2, 3)[None, ..., None, :]
        return Views(numbers, blocks, planes, _planes(done), done)

    def put(self, views: Views, into: torch.Tensor) -> None:
        """See `Order`."""
        _copy(self.heads, views.done, into)

    def _blocks(self, layers: int, memory: torch.Tensor) -> list[torch.Tensor]:
        lines = memory.view(layers, self.heads.groups, self.heads.tokens, -1)
        return [block.permute(0, 1, 3, 4, 2, 5)[None, ..., None, :] for block in self.heads.by_plane(lines)]


class PhaseByPhase:
    """``[phases, layers, w * tokens of a phase]``: block by block, plane by plane, head by head. One group.

    A head's tokens of a phase lie as state does.
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def arranged(self, columns: torch.Tensor, phases: int) -> torch.Tensor:
        """``columns`` ``[layers, tokens * w]``, a token's in `Heads.order`, in this order."""
        by_phase = columns.view(len(columns), -1, phases, sum(self.heads.widths))
        blocks = [block.permute(2, 0, 3, 4, 1, 5).flatten(2) for block in self.heads.by_plane(by_phase)]
        return torch.cat(blocks, dim=-1)

    def over_tokens(self, columns: torch.Tensor) -> list[torch.Tensor]:
        """See `Order`; repeated for the tokens of a span."""
        parts = [part[None, ..., None, None, :] for part in self.heads.by_plane(columns)]
        return [part.expand(*part.shape[:-2], SPAN_TOKENS, -1).contiguous() for part in parts]

    def angles(self, turn: Turn, phases: int, device: torch.device) -> Sequence[torch.Tensor]:
        """See `Order`."""
        spans = [torch.unflatten(each[:, :, 0], 1, (-1, SPAN_TOKENS)) for each in _angles(turn, phases, 1, device)]
        return [each[:, None, None, None] for each in spans]

    def views(self, layers: int, phases: int, numbers: torch.Tensor, turned: torch.Tensor, cast: torch.Tensor) -> Views:
        """See `Order`. What is not turned is cast into its place at once."""
        blocks = self._blocks(numbers.view(phases, layers, -1))
        planes = _planes(blocks)
        if (turn := self.heads.turn) is None:
            return Views(numbers, blocks, planes, [], blocks)
        planes[0] = turned[: planes[0].numel()].view(planes[0].shape)
        # Plane after plane: what is put together must lie together.
        flat = zip(torch.split(cast, [block.numel() for block in blocks]), blocks, strict=True)
        done = [part.view(block.movedim(3, 0).shape).movedim(0, 3) for part, block in flat]
        casts = _planes(done)
        if turn.interleaved:
            return Views(numbers, blocks, planes, casts, done)
        pieces = tuple(cast[phase, :, 0].flatten(2, 3) for phase in range(phases) for cast in casts)
        return Views(numbers, blocks, planes, casts, done, pieces)

    def put(self, views: Views, into: torch.Tensor) -> None:
        """See `Order`."""
        layers, heads, _, channels = into.shape
        if views.pieces and into.stride()[2:] == (channels, 1):
            # Twice as fast as copying rows that are as short.
            torch.cat(views.pieces, dim=-1, out=into.view(layers, heads, -1, len(views.blocks[0]) * channels))
        else:
            _copy(self.heads, views.done, into)

    def _blocks(self, lines: torch.Tensor) -> list[torch.Tensor]:
        tokens = self.heads.tokens // len(lines)
        parts = torch.split(lines, [width * tokens for width in self.heads.widths], dim=-1)
        return [
            torch.unflatten(part, -1, (planes, self.heads.heads, -1, SPAN_TOKENS, channels))[:, :, None]
            for part, (planes, channels) in zip(parts, self.heads.shapes, strict=True)
        ]


def _planes(blocks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [plane for block in blocks for plane in block.unbind(3)]


def _copy(heads: Heads, blocks: Sequence[torch.Tensor], into: torch.Tensor) -> None:
    """See `Order.put`."""
    phases, span = blocks[0].shape[0], blocks[0].shape[6]
    by_span = torch.unflatten(torch.unflatten(into, 1, (heads.groups, heads.heads)), 3, (-1, span, phases))
    for place, block in zip(heads.blocks(by_span), blocks, strict=True):
        place.permute(5, 0, 1, 6, 2, 3, 4, 7).copy_(block)


def _angles(turn: Turn, phases: int, heads: int, device: torch.device) -> Sequence[torch.Tensor]:
    """Cosine and sine ``[tokens, pairs]`` as ``[phases, tokens of a phase, heads, pairs]``; small ones are kept."""
    is_small = turn.cosine.numel() * heads <= KEPT_ANGLES
    return (_kept_angles if is_small else _spread_angles)(turn, phases, heads, device)


def _spread_angles(turn: Turn, phases: int, heads: int, device: torch.device) -> Sequence[torch.Tensor]:
    # Computed on the CPU: a copy to a device has ended when it returns, whatever stream asks for it next.
    by_phase = [each.view(-1, phases, 1, each.shape[1]).transpose(0, 1) for each in (turn.cosine, turn.sine)]
    return [each.expand(-1, -1, heads, -1).contiguous().to(device) for each in by_phase]


_kept_angles = lru_cache(maxsize=32)(_spread_angles)
