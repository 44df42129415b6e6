"""What coding a prefix does to the model, measured on its own last tokens: they are run again on what was coded."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import Cache

from ghostcacher.adapters.calls import CallReader
from ghostcacher.adapters.landing import Landing
from ghostcacher.adapters.probe import QuietCache, Shape, input_device
from ghostcacher.blocks import KVBlock
from ghostcacher.index import Candidate
from ghostcacher.keys import PrefixChain, unpack_tokens

REPLAY_TOKENS = 32


class ReplayCache(QuietCache):
    """An empty cache of the model's kinds of layers."""

    def __init__(self, module: Any, shape: Shape) -> None:
        super().__init__(config=module.config)
        self.layers[:] = shape.blank()


class Trial:
    """A cache to be filled with blocks of ``chain``, and the logits of the tokens after the first ``prefix_tokens``."""

    def __init__(self, module: Any, shape: Shape, chain: PrefixChain, prefix_tokens: int, end: int) -> None:
        self._module = module
        self._ids = torch.tensor([unpack_tokens(chain.run(prefix_tokens, end))])
        self._prefix_tokens = prefix_tokens
        self._cache = ReplayCache(module, shape)
        self._landing = Landing(shape.state_of(self._cache.layers), shape, 1, 0, end)
        self.keys = tuple(key for key in chain.covering(0, end) if key.start < prefix_tokens)
        needed = [Candidate(key, min(key.length, prefix_tokens - key.start)) for key in self.keys]
        self._landing.expect(needed, (0,), 0)

    def place(self, block: KVBlock) -> None:
        """Take one of `keys`; all must have been placed before `logits`."""
        self._landing.place(block)

    def logits(self) -> torch.Tensor:
        """``[tokens, vocabulary]`` in fp32, on the CPU."""
        self._landing.commit(self._prefix_tokens)
        return logits_after(self._module, self._ids, self._cache)


class Guard:
    """Makes trials of one model, without keeping it alive."""

    def __init__(self, module: Any, shape: Shape) -> None:
        self._module = weakref.ref(module)
        self.shape = shape

    def trial(self, chain: PrefixChain, end: int) -> Trial | None:
        """Of the tokens before ``end``, the last 32 to be run; None if that cannot be done.

        There are too few tokens, or the model is not `runnable`.
        """
        module, prefix_tokens = self.runnable(chain, end), end - REPLAY_TOKENS
        return None if module is None or prefix_tokens <= 0 else Trial(module, self.shape, chain, prefix_tokens, end)

    def runnable(self, chain: PrefixChain, end: int) -> Any | None:
        """The model, if it can be run on the tokens before ``end``.

        It is not gone, being trained or compiled in place, and no token stands for an image.
        """
        module = self._module()
        if module is None or module.training:
            return None
        if module._compiled_call_impl is not None:  # noqa: SLF001 (what nn.Module.compile() sets has no public name)
            return None
        is_text = max(unpack_tokens(chain.run(0, end))) < module.get_input_embeddings().num_embeddings
        return module if is_text else None


def logits_after(module: Any, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]`` in fp32 on the CPU of ``ids`` ``[1, tokens]``, after what ``cache`` holds."""
    reader = CallReader(module)
    begin, ids = int(cache.get_seq_length()), ids.to(input_device(module))
    given = {reader.cache_name: cache, "use_cache": True, "return_dict": True}
    if reader.takes_positions:
        given["position_ids"] = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
    with torch.inference_mode():
        logits: torch.Tensor = module(ids, **given).logits[0]
    return logits.float().cpu()
