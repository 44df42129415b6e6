"""Short runs of the user's own model: to learn what its cache is made of, and to certify it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache

from ghostcacher.adapters.autocast import noted_within
from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.kinds import kind_of, settled
from ghostcacher.adapters.parts import Kind
from ghostcacher.adapters.rotation import PROBE_TOKENS, rotation_of
from ghostcacher.adapters.state import CacheState
from ghostcacher.blocks import KVLayout
from ghostcacher.errors import UnsupportedModelError


class QuietCache(DynamicCache):
    """A cache that nobody serves or stores from, whoever is attached: its forwards are our own."""


@dataclass(frozen=True)
class Shape:
    """What a probe showed of a model's cache: its layout, and the kind and device of each layer.

    ``autocasts`` are those that the model's ``forward`` itself turns on.
    """

    layout: KVLayout
    kinds: tuple[Kind, ...]
    devices: tuple[torch.device, ...]
    config: Any
    extra: tuple[Any, ...] = ()
    autocasts: tuple[str, ...] = ()

    @cached_property
    def stock_classes(self) -> list[type]:
        """Classes of the layers that transformers begins with."""
        return [type(layer) for layer in DynamicCache(config=self.config).layers]

    @cached_property
    def classes(self) -> list[type]:
        """Classes of `blank` layers."""
        return [type(layer) for layer in self.blank()]

    def blank(self) -> list[Any]:
        """Empty layers of these kinds. ``extra`` ones are those that the model's forward appends."""
        return self.made_from(DynamicCache(config=self.config).layers)

    def made_from(self, stock: list[Any]) -> list[Any]:
        """`blank` layers, given the empty ones that transformers begins with."""
        return [kind.make(layer) for kind, layer in zip(self.kinds, [*stock, *self.extra], strict=True)]

    def state_of(self, layers: list[Any]) -> CacheState:
        """The state over a cache's list of ``layers``, which must be `blank` ones, filled or not."""
        return CacheState(layers, self.kinds, self.blank)


def shape_of(module: Any) -> Shape:
    """Run a few equal tokens through a fresh cache and look at it. Changes neither model nor random state.

    Compressed layers need as many tokens as make their first entry; how keys are turned shows in eight.

    Raises:
        UnsupportedModelError: a layer's class is not known, or the model appends layers that cannot be made anew.
        ValueError: a layer's state is not that of its class.
    """
    cache = QuietCache(config=module.config)
    stock = len(cache.layers)
    cache.layers[:] = [kind_of(layer).make(layer) for layer in cache.layers]
    tokens = max(PROBE_TOKENS, 1 + max((getattr(layer, "compress_rate", 0) for layer in cache.layers), default=0))
    with noted_within(module) as noted:
        run(module, torch.zeros((1, tokens), dtype=torch.long), cache)
    kinds = [settled(layer) for layer in cache.layers]
    extra = cache.layers[stock:]
    if any(kind.make(layer) is layer for kind, layer in zip(kinds[stock:], extra, strict=True)):
        raise UnsupportedModelError("its forward appends cache layers of a class that cannot be made anew")
    pairs = list(zip(kinds, cache.layers, strict=True))
    keys = [kind.slices.tensors(layer)["keys"] for kind, layer in pairs if kind.slices and kind.name != "latent"]
    layout = KVLayout(tuple(kind.spec(layer) for kind, layer in pairs), rotation_of(module, keys))
    devices = tuple(_device(*pair) for pair in pairs)
    return Shape(layout, tuple(kinds), devices, module.config, tuple(extra), noted[0] if noted else ())


def run(module: Any, ids: torch.Tensor, cache: DynamicCache, start: int = 0, pads: int = 0) -> torch.Tensor:
    """One forward of ``ids`` ``[1, tokens]`` at position ``start``, on ``cache``; the last logits in fp32.

    The first ``pads`` of the ids are padding.
    """
    reader = CallReader(module)
    ids = ids.to(input_device(module))
    arguments = {"input_ids": ids, reader.cache_name: cache, "use_cache": True, **reader.last_logits}
    if reader.takes_positions:
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None] - pads
        arguments["position_ids"] = positions.clamp(min=0)
    if pads:
        arguments["attention_mask"] = (torch.arange(ids.shape[1], device=ids.device)[None] >= pads).long()
    with torch.no_grad(), _evaluating(module):
        logits: torch.Tensor = module(**arguments, return_dict=True).logits[:, -1]
    return logits.float()


def input_device(module: Any) -> torch.device:
    """Where token ids belong: the embedding's device, or the CPU for weights that are offloaded."""
    weight: torch.Tensor = module.get_input_embeddings().weight
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


def _device(kind: Kind, layer: Any) -> torch.device:
    slices = kind.slices.tensors(layer) if kind.slices else {}
    states = (kind.states.ago(layer, 0) or {}) if kind.states else {}
    return next((tensor.device for tensor in [*slices.values(), *states.values()]), torch.device("cpu"))


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    trained = [part for part in module.modules() if part.training]
    for part in trained:
        part.training = False
    try:
        yield
    finally:
        for part in trained:
            part.training = True
