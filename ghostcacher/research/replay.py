"""A prefix computed once, coded and put back: what the model then says of the tokens that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ghostcacher.adapters.base import base_module
from ghostcacher.adapters.guard import ReplayCache, logits_after
from ghostcacher.adapters.landing import Landing
from ghostcacher.adapters.probe import Shape, input_device, shape_of
from ghostcacher.adapters.rerun import taken
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
        cache = ReplayCache(module, shape)
        logits_after(module, text[:, :prefix_tokens], cache)
        chain = PrefixChain.of(text[0, :prefix_tokens].tolist(), Namespace(bytes(32)), block_tokens)
        blocks = taken(shape, cache, chain)
        rest = text[:, prefix_tokens:]
        return cls(module, shape, blocks, text[:, :prefix_tokens], rest, logits_after(module, rest, cache))

    def again(self, blocks: tuple[KVBlock, ...]) -> torch.Tensor:
        """Logits of the rest ``[tokens, vocabulary]`` with these blocks in place of the computed ones."""
        return logits_after(self.module, self.rest, filled(self.module, self.shape, blocks, self.rest.shape[1]))

    def through(self, cache: Cache) -> torch.Tensor:
        """Logits of the rest ``[tokens, vocabulary]`` after the prefix went through an empty ``cache`` of any kind."""
        logits_after(self.module, self.prefix, cache)
        return logits_after(self.module, self.rest, cache)


def filled(module: Any, shape: Shape, blocks: Sequence[KVBlock], more_tokens: int) -> ReplayCache:
    """A cache that holds ``blocks``, the whole front of a text, with room for ``more_tokens``."""
    cache, end = ReplayCache(module, shape), max(block.key.end for block in blocks)
    landing = Landing(shape.state_of(cache.layers), shape, 1, 0, end + more_tokens)
    landing.expect([Candidate(block.key, block.key.length) for block in blocks], (0,), 0)
    for block in blocks:
        landing.place(block)
    landing.commit(end)
    return cache
