"""A prefix computed once, coded and put back: what the model then says of the tokens that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ghostcacher.adapters.base import base_module
from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.capture import Row, RowCapture
from ghostcacher.adapters.landing import Landing
from ghostcacher.adapters.probe import Shape, input_device, shape_of
from ghostcacher.blocks import KVBlock
from ghostcacher.errors import ConfigurationError
from ghostcacher.index import Candidate
from ghostcacher.keys import Namespace, PrefixChain


@dataclass(frozen=True, slots=True)
class Replay:
    """One text: the blocks of its prefix as they were computed, the rest of it, and the exact logits of the rest.

    ``prefix`` and ``rest`` are ``[1, tokens]``, ``logits`` ``[tokens, vocabulary]`` in fp32.
    """

    module: Any
    shape: Shape
    blocks: tuple[KVBlock, ...]
    prefix: torch.Tensor
    rest: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def of(cls, model: Any, text: torch.Tensor, prefix_tokens: int, block_tokens: int) -> Replay:
        """Run ``text`` ``[1, tokens]``: ``prefix_tokens`` of it, then the rest.

        Raises:
            ConfigurationError: the text is too short, or the prefix is not made of whole blocks.
            UnsupportedModelError: the model's cache cannot be taken apart.
        """
        if tuple(text.shape[:-1]) != (1,) or text.shape[-1] <= prefix_tokens:
            raise ConfigurationError(f"a text of shape {list(text.shape)}; [1, more than {prefix_tokens}] is needed")
        if prefix_tokens % block_tokens:
            raise ConfigurationError(f"prefix_tokens={prefix_tokens} is no multiple of block_tokens={block_tokens}")
        module = base_module(model)
        shape = shape_of(module)
        text = text.to(input_device(module))
        cache = _cache(module, shape)
        _logits(module, text[:, :prefix_tokens], cache)
        state = shape.state_of(cache.layers)
        taken = {prefix_tokens: found} if (found := state.snapshot() if state.has_states else None) is not None else {}
        chain = PrefixChain.of(text[0, :prefix_tokens].tolist(), Namespace(bytes(32)), block_tokens)
        capture = RowCapture.of(state.frozen(), shape.layout, 0, Row(0, chain), (), prefix_tokens, snapshots=taken)
        blocks = tuple(_own(capture.block(key)) for key in list(capture.keys()))
        rest = text[:, prefix_tokens:]
        return cls(module, shape, blocks, text[:, :prefix_tokens], rest, _logits(module, rest, cache))

    def again(self, blocks: tuple[KVBlock, ...]) -> torch.Tensor:
        """Logits of the rest ``[tokens, vocabulary]`` with these blocks in place of the computed ones."""
        cache = _cache(self.module, self.shape)
        end = max(block.key.end for block in blocks)
        landing = Landing(self.shape.state_of(cache.layers), self.shape, 1, 0, end + self.rest.shape[1])
        landing.expect([Candidate(block.key, block.key.length) for block in blocks], (0,), 0)
        for block in blocks:
            landing.place(block)
        landing.commit(end)
        return _logits(self.module, self.rest, cache)

    def through(self, cache: Cache) -> torch.Tensor:
        """Logits of the rest ``[tokens, vocabulary]`` after the prefix went through an empty ``cache`` of any kind."""
        _logits(self.module, self.prefix, cache)
        return _logits(self.module, self.rest, cache)


def _own(block: KVBlock) -> KVBlock:
    return KVBlock(block.key, block.layout, tuple(tensor.clone() for tensor in block.tensors))


def _cache(module: Any, shape: Shape) -> DynamicCache:
    cache = DynamicCache(config=module.config)
    cache.layers[:] = shape.blank()
    return cache


def _logits(module: Any, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    reader = CallReader(module)
    begin = int(cache.get_seq_length())
    given = {reader.cache_name: cache, "use_cache": True, "return_dict": True}
    if reader.takes_positions:
        given["position_ids"] = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
    with torch.inference_mode():
        logits: torch.Tensor = module(ids, **given).logits[0]
    return logits.float().cpu()
