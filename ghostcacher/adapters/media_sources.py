"""Where a forward call keeps its images and videos: as encoded features, or as pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from ghostcacher.adapters.identity import whole_config
from ghostcacher.adapters.positions import Span
from ghostcacher.adapters.unserved import UnservedError

ENCODED = "mm_encoder_outputs"
PIXELS = "pixel_values"
PER_IMAGE = ("image_grid_thw", "image_position_ids", "image_sizes", "pixel_attention_mask")
MODALITIES = ("image", "video")
_WITH_IMAGE_AXIS = 5


class Source(Protocol):
    """The media of one call."""

    units: Sequence[Span]
    """Columns that must not be parted, each within one row."""

    def content(self, span: Span) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that decides what stands at ``span``, named."""
        ...

    def between(self, first: int, last: int) -> dict[str, Any]:
        """The call's media arguments for columns ``first`` to ``last`` alone; None for those with nothing left."""
        ...


class Encoded:
    """Features that ``generate`` encoded beforehand (transformers 5.24): the n-th row fills the n-th placeholder."""

    def __init__(self, outputs: Mapping[str, Any], places: Mapping[str, torch.Tensor], spans: Sequence[Span]) -> None:
        """``places`` are ``[rows, tokens]`` per modality: the number of the feature row that a column takes, or -1."""
        self.units = spans
        self._outputs = {name: output for name, output in outputs.items() if output is not None}
        self._places = places
        self._features = {name: _features(output) for name, output in self._outputs.items()}
        for name, layers in self._features.items():
            if any(len(rows) != int((places[name] >= 0).sum()) for rows in layers):
                raise UnservedError(f"{name} features do not fit their placeholders")

    def content(self, span: Span) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Source.content`: the features themselves, of the embedding and of deeper layers."""
        for name, layers in self._features.items():
            numbers = self._places[name][span.row, span.start : span.end]
            for depth, rows in enumerate(layers):
                yield f"{name} {depth}", rows[numbers[numbers >= 0].to(rows.device)]

    def between(self, first: int, last: int) -> dict[str, Any]:
        """See `Source.between`."""
        kept = {}
        for name, output in self._outputs.items():
            numbers = self._places[name][:, first:last]
            numbers = numbers[numbers >= 0]
            if len(numbers):
                kept[name] = self._cut(name, output, numbers)
        return {ENCODED: kept or None}

    def _cut(self, name: str, output: Any, numbers: torch.Tensor) -> Any:
        pooled, *deeper = [rows[numbers.to(rows.device)] for rows in self._features[name]]
        # Models take a list of images, or a tensor with a batch axis: the container that they made themselves.
        is_tensor = isinstance(output["pooler_output"], torch.Tensor)
        cut: dict[str, Any] = {"pooler_output": pooled[None] if is_tensor else [pooled]}
        if deeper:
            cut["deepstack_features"] = [[rows] for rows in deeper]
        return type(output)(**cut)


class Pixels:
    """Images before they are encoded: told apart where each placeholder run takes one, otherwise one whole."""

    def __init__(self, arguments: Mapping[str, Any], spans: Sequence[Span], config: Any) -> None:
        """``config`` is the model's: it decides what the encoder makes of the same pixels."""
        names = [name for name in (PIXELS, *PER_IMAGE) if arguments.get(name) is not None]
        self._given: dict[str, torch.Tensor] = {name: arguments[name] for name in names}
        self._spans = list(spans)
        self._encoder = json.dumps(whole_config(config), sort_keys=True).encode()
        self._images = _per_image(self._given, [span.end - span.start for span in self._spans])
        self.units: Sequence[Span] = self._spans if self._images else _hull(self._spans)

    def content(self, span: Span) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Source.content`."""
        yield "encoder", torch.frombuffer(bytearray(self._encoder), dtype=torch.uint8)
        number = self._spans.index(span)
        if self._images:
            yield from self._images[number].items()
            return
        yield "number", torch.tensor(number)
        yield from self._given.items()

    def between(self, first: int, last: int) -> dict[str, Any]:
        """See `Source.between`."""
        inside = [n for n, span in enumerate(self._spans) if span.start >= first and span.end <= last]
        if not inside:
            return dict.fromkeys(self._given)
        if self._images is None or len(inside) == len(self._spans):
            return dict(self._given)
        kept = {name: torch.cat([self._images[n][name] for n in inside]) for name in self._given}
        if self._given[PIXELS].dim() == _WITH_IMAGE_AXIS:
            kept = {name: tensor[None] for name, tensor in kept.items()}
        return kept


def _features(output: Any) -> list[torch.Tensor]:
    """``[placeholders, width]`` of the embedding, then of each deeper layer that is given some."""
    layers = [output["pooler_output"], *(output.get("deepstack_features") or ())]
    if any(not isinstance(rows, torch.Tensor) for layer in layers for rows in layer):
        raise UnservedError("media features of an unknown form")
    return [torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in layer]) for layer in layers]


def _per_image(given: Mapping[str, torch.Tensor], lengths: Sequence[int]) -> list[dict[str, torch.Tensor]] | None:
    """The tensors of each image, with an axis of images in front, or None if they cannot be told apart.

    ``lengths`` are those of the placeholder runs: features fill them one after another, so an image belongs to a run
    only if all runs are as long as their images are large.
    """
    images = len(lengths)
    if "image_grid_thw" in given:
        sizes = given["image_grid_thw"].prod(dim=-1).tolist()
        pixels = given[PIXELS]
        if set(given) != {PIXELS, "image_grid_thw"} or len(sizes) != images or sum(sizes) != len(pixels):
            return None
        if any(size * lengths[0] != sizes[0] * length for size, length in zip(sizes, lengths, strict=True)):
            return None
        grids = torch.split(given["image_grid_thw"], 1)
        return [{PIXELS: p, "image_grid_thw": g} for p, g in zip(torch.split(pixels, sizes), grids, strict=True)]
    flat = {name: t.flatten(0, 1) for name, t in given.items()} if given[PIXELS].dim() == _WITH_IMAGE_AXIS else given
    if len(set(lengths)) > 1 or any(len(t) != images for t in flat.values()) or _has_blank(flat[PIXELS]):
        return None
    return [{name: tensor[n : n + 1] for name, tensor in flat.items()} for n in range(images)]


def _has_blank(pixels: torch.Tensor) -> bool:
    """Whether an image is all zeros: idefics3 fills up rows with such, and takes no features of them."""
    return bool((pixels.flatten(1) == 0).all(dim=1).any())


def _hull(spans: Sequence[Span]) -> list[Span]:
    first, last = min(span.start for span in spans), max(span.end for span in spans)
    return [Span(0, first, last)]
