"""A prefix computed again from nothing, beside whoever else uses the model: for auditing what a store holds."""

from __future__ import annotations

from typing import Any

import torch

from ghostcacher.adapters.capture import Row, RowCapture
from ghostcacher.adapters.guard import Guard, ReplayCache, logits_after
from ghostcacher.adapters.probe import Shape
from ghostcacher.blocks import KVBlock
from ghostcacher.keys import PrefixChain, unpack_tokens


def recomputed(guard: Guard, chain: PrefixChain) -> tuple[KVBlock, ...]:
    """The blocks of ``chain`` as the model computes them now; none if it cannot be run."""
    module = guard.runnable(chain, len(chain))
    if module is None:
        return ()
    cache = ReplayCache(module, guard.shape)
    logits_after(module, torch.tensor([unpack_tokens(chain.tokens)]), cache)
    return taken(guard.shape, cache, chain)


def taken(shape: Shape, cache: Any, chain: PrefixChain, first_token: int = 0) -> tuple[KVBlock, ...]:
    """The blocks of ``chain`` from ``first_token`` on, and the snapshot at its end, from a cache that holds it."""
    state = shape.state_of(cache.layers)
    found = state.snapshot() if state.has_states else None
    snapshots = {len(chain): found} if found is not None else {}
    capture = RowCapture.of(
        state.frozen(), shape.layout, 0, Row(0, chain), (), len(chain), first_token=first_token, snapshots=snapshots
    )
    return tuple(_own(capture.block(key)) for key in list(capture.keys()))


def _own(block: KVBlock) -> KVBlock:
    return KVBlock(block.key, block.layout, tuple(tensor.clone() for tensor in block.tensors))
