"""Short runs of the user's own model: to learn what its cache is made of, and to certify it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.full import layer_spec
from ghostcacher.blocks import KVLayout


@dataclass(frozen=True, slots=True)
class Shape:
    """What a probe of one token showed of a model's cache: its layout and the device of each layer."""

    layout: KVLayout
    devices: tuple[torch.device, ...]


def shape_of(module: Any) -> Shape:
    """Run one token through a fresh cache and look at what it holds. Changes neither model nor random state.

    Raises:
        ValueError: a layer's state is not that of full attention.
    """
    cache = DynamicCache(config=module.config)
    run(module, torch.zeros((1, 1), dtype=torch.long), cache)
    specs = [layer_spec(layer) for layer in cache.layers]
    return Shape(KVLayout(tuple(specs)), tuple(layer.keys.device for layer in cache.layers))


def run(module: Any, ids: torch.Tensor, cache: DynamicCache, start: int = 0) -> torch.Tensor:
    """One forward of ``ids`` ``[1, tokens]`` at position ``start``, on ``cache``; the last logits in fp32."""
    reader = CallReader(module)
    ids = ids.to(input_device(module))
    arguments = {"input_ids": ids, reader.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
    if reader.takes_positions:
        arguments["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    with torch.no_grad(), _evaluating(module):
        logits: torch.Tensor = module(**arguments, return_dict=True).logits[:, -1]
    return logits.float()


def input_device(module: Any) -> torch.device:
    """Where token ids belong: the embedding's device, or the CPU for weights that are offloaded."""
    weight: torch.Tensor = module.get_input_embeddings().weight
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


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
