r"""Images and videos in a prompt: what stands behind the placeholder tokens is part of the prefix's identity.

A placeholder's token id says nothing of the image. In its place the key takes an id of 2^30 or more out of

    SHAKE-256("ghostcacher/media/1\0" | SHA-256 of the media's tensors, of their positions and token types)

so equal ids with other images never share a block. A run of placeholders is never cut: part of an image is not a
prefix where its tokens see each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ghostcacher.adapters.fingerprint import bytes_of
from ghostcacher.adapters.media_sources import ENCODED, MODALITIES, PER_IMAGE, PIXELS, Encoded, Pixels, Source
from ghostcacher.adapters.positions import Span, planes_of
from ghostcacher.adapters.unserved import UnservedError

MEDIA_DOMAIN = b"ghostcacher/media/1\0"
FIRST_MEDIA_ID = 2**30
LEAST_TOKENS = 4
"""Placeholders a run must have: each gives 30 bits of the identity."""

MEDIA_ARGUMENTS = frozenset({ENCODED, PIXELS, *PER_IMAGE})
MEDIA_CONTENT = (ENCODED, PIXELS)
"""Those without which the others mean nothing."""
TYPE_ARGUMENTS = ("token_type_ids", "mm_token_type_ids")
_ID_BYTES = 4


@dataclass(frozen=True, slots=True)
class Media:
    """The media of one call and the placeholder runs they fill."""

    source: Source
    spans: tuple[Span, ...]
    types: Mapping[str, torch.Tensor]
    positions: torch.Tensor | None = None

    def keyed(self, ids: list[list[int]]) -> list[list[int]]:
        """Token ids of all columns with those of placeholders replaced by what identifies their content."""
        keyed = [list(row) for row in ids]
        for span in self.spans:
            keyed[span.row][span.start : span.end] = _media_ids(self._digest(span), span.end - span.start)
        return keyed

    def floor(self, column: int) -> int:
        """The last column at or before ``column`` at which no row is cut inside its media."""
        while cut := [unit.start for unit in self.source.units if unit.start < column < unit.end]:
            column = min(cut)
        return column

    def between(self, first: int, last: int) -> dict[str, Any]:
        """The arguments that a forward over columns ``first`` to ``last`` alone needs of these.

        Token types are read by position, so they reach back to column 0.
        """
        return {**self.source.between(first, last), **{name: types[..., :last] for name, types in self.types.items()}}

    def _digest(self, span: Span) -> bytes:
        digest = hashlib.sha256()
        for name, tensor in (*self.source.content(span), *self._seen_as(span)):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
            digest.update(bytes_of(tensor))
        return digest.digest()

    def _seen_as(self, span: Span) -> Iterator[tuple[str, torch.Tensor]]:
        for name, types in self.types.items():
            yield name, types[span.row, span.start : span.end]
        if self.positions is not None and len(self.positions) > 1:
            yield "positions", self.positions[:, span.row, span.start : span.end]


def media_of(arguments: Mapping[str, Any], ids: torch.Tensor, config: Any) -> Media | None:
    """The media of a call with these arguments and ids ``[rows, tokens]``, or None if it has none.

    Raises:
        UnservedError: the media do not fit the placeholders, or cannot be told from what the call says; or token
            types mark tokens that are none.
    """
    types = {name: arguments[name] for name in TYPE_ARGUMENTS if isinstance(arguments.get(name), torch.Tensor)}
    encoded, has_pixels = arguments.get(ENCODED) or {}, arguments.get(PIXELS) is not None
    present = [name for name in MODALITIES if encoded.get(name) is not None or (name == "image" and has_pixels)]
    marks = {name: ids == _placeholder(config, name) for name in present}
    is_media = torch.stack(list(marks.values())).any(dim=0) if marks else torch.zeros_like(ids, dtype=torch.bool)
    if any(_marks_text(tensor, is_media) for tensor in types.values()):
        raise UnservedError("token types other than 0 outside of media")
    if not present:
        return None
    if set(encoded) - set(MODALITIES) or (encoded and has_pixels):
        raise UnservedError("media of an unknown form")
    spans = _runs(is_media)
    if not spans or any(span.end - span.start < LEAST_TOKENS for span in spans):
        raise UnservedError(f"media of fewer than {LEAST_TOKENS} tokens")
    source = Pixels(arguments, spans, config) if has_pixels else _encoded(encoded, marks, spans)
    positions = arguments.get("position_ids")
    if isinstance(positions, torch.Tensor):
        positions = planes_of(positions).expand(-1, len(ids), -1)
    return Media(source, spans, types, positions)


def _marks_text(types: torch.Tensor, is_media: torch.Tensor) -> bool:
    return types.shape != is_media.shape or bool((types.to(is_media.device)[~is_media] != 0).any())


def _encoded(outputs: Mapping[str, Any], marks: Mapping[str, torch.Tensor], spans: Sequence[Span]) -> Encoded:
    places = {
        name: torch.where(mask, mask.flatten().cumsum(0).view_as(mask) - 1, -1).cpu() for name, mask in marks.items()
    }
    return Encoded(outputs, places, spans)


def _placeholder(config: Any, modality: str) -> int:
    token = getattr(config, f"{modality}_token_id", None)
    if not isinstance(token, int):
        raise UnservedError(f"the config names no placeholder for {modality}s")
    return token


def _runs(marks: torch.Tensor) -> tuple[Span, ...]:
    """Runs of True in ``[rows, tokens]``, row by row."""
    edges = torch.nn.functional.pad(marks.int(), (1, 1)).diff(dim=-1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return tuple(Span(row, start, end) for (row, start), (_, end) in zip(starts, ends, strict=True))


def _media_ids(digest: bytes, count: int) -> list[int]:
    stream = hashlib.shake_256(MEDIA_DOMAIN + digest).digest(_ID_BYTES * count)
    numbers = (int.from_bytes(stream[n : n + _ID_BYTES], "little") for n in range(0, len(stream), _ID_BYTES))
    return [FIRST_MEDIA_ID + number % FIRST_MEDIA_ID for number in numbers]
