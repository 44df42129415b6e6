"""Whether a call counts its tokens as every cold prompt would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_TEXT_AND_ROPE = 4
_ROWS_TOKENS = 2
_PLANES_ROWS_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Span:
    """A run of media placeholders: columns ``start`` to ``end`` of ``row``."""

    row: int
    start: int
    end: int


def planes_of(positions: torch.Tensor) -> torch.Tensor:
    """``position_ids`` as ``[planes, rows, tokens]``: one plane, or several where rope counts time, height, width."""
    return positions[None] if positions.dim() == _ROWS_TOKENS else positions


def last_positions(positions: object) -> torch.Tensor | None:
    """The last of each row and plane, ``[planes, rows, 1]``, if positions are given."""
    return planes_of(positions)[..., -1:].detach() if isinstance(positions, torch.Tensor) else None


def follow(positions: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Whether ``position_ids`` count on by ones from ``last`` `last_positions`; a scalar on their device.

    One plane, or one row, may stand for several; positions of any other shape do not follow.
    """
    planes = planes_of(positions)
    sizes = zip(planes.shape[:-1], last.shape[:-1], strict=False)
    if planes.dim() != last.dim() or any(1 not in pair and pair[0] != pair[1] for pair in sizes):
        return torch.zeros((), dtype=torch.bool, device=planes.device)
    first = planes[..., :1] - last.to(planes.device)
    return (first == 1).all() & (planes.diff(dim=-1) == 1).all()


def are_plain(positions: object, pads: Sequence[int], past: int, width: int, spans: Sequence[Span] = ()) -> bool:
    """Whether ``positions``, if given, follow from the tokens: 0, 1, 2, … from each row's first token.

    Inside ``spans`` the planes of a multi-dimensional rope are free (they are part of the media's identity); the text
    after one goes on at the highest position so far plus one (Qwen2-VL, https://arxiv.org/abs/2409.12191).
    """
    if positions is None:
        return True
    if not isinstance(positions, torch.Tensor):
        return False
    planes = planes_of(positions)
    if planes.dim() != _PLANES_ROWS_TOKENS or planes.shape[-1] != width:
        return False
    columns = torch.arange(past, past + width, device=planes.device)[None]
    expected = columns - torch.tensor(tuple(pads), device=planes.device)[:, None]
    is_real = expected >= 0
    if not spans or len(planes) == 1:
        return bool(((planes == expected) | ~is_real).all())
    counts_text = len(planes) == _TEXT_AND_ROPE
    if counts_text and not bool(((planes[0] == expected) | ~is_real).all()):
        return False
    rope = planes[1:] if counts_text else planes
    is_text = is_real.clone()
    for span in spans:
        is_text[span.row, span.start : span.end] = False
    return bool(((rope == _after_highest(rope, is_real)) | ~is_text).all())


def _after_highest(rope: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    highest = rope.amax(dim=0).masked_fill(~is_real, -1).cummax(dim=-1).values
    return torch.nn.functional.pad(highest[:, :-1], (1, 0), value=-1) + 1
