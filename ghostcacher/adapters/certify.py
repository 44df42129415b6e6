"""A one-time test of a model type outside the proven table: is restored state as good as computed?"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from ghostcacher.adapters.full import FullCapture, Landing
from ghostcacher.adapters.layers import GrowingLayer
from ghostcacher.adapters.probe import Shape, run
from ghostcacher.index import Candidate
from ghostcacher.keys import Namespace, PrefixChain

PROBE_TOKENS = 48
CUT_TOKENS = 24
_BLOCK_TOKENS = 16
_SEED = 20
_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1


def certify(module: Any, shape: Shape) -> str | None:
    """Why prompts must run cold, or None if restored state gave what computing it gave.

    Runs 48 random tokens whole, in two pieces, and with the first 24 restored from a *different, longer* run. The
    logits must agree within 1e-3 of the largest (0.1 in half precision). Changes neither model nor random state.
    """
    vocabulary = module.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator)
    other = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator)
    other[:, :CUT_TOKENS] = ids[:, :CUT_TOKENS]
    whole = run(module, ids, _cache(module))
    restored = run(module, ids[:, CUT_TOKENS:], _restored(module, shape, other), CUT_TOKENS)
    difference = float((whole - restored).abs().max())
    allowed = _TOLERANCES.get(module.dtype, _HALF_TOLERANCE) * max(1.0, float(whole.abs().max()))
    if difference <= allowed:
        return None
    return f"a probe gave other logits with restored state (difference {difference:.2g}, allowed {allowed:.2g})"


def _cache(module: Any) -> DynamicCache:
    cache = DynamicCache(config=module.config)
    cache.layers[:] = [GrowingLayer() for _ in cache.layers]
    return cache


def _restored(module: Any, shape: Shape, donor_ids: torch.Tensor) -> DynamicCache:
    donor, cache = _cache(module), _cache(module)
    run(module, donor_ids, donor)
    chain = PrefixChain.of(donor_ids[0, :CUT_TOKENS].tolist(), Namespace(bytes(32)), _BLOCK_TOKENS)
    capture = FullCapture.of(donor.layers, shape.layout, 0, 0, chain, (), CUT_TOKENS)
    keys = capture.keys()
    landing = Landing(cache.layers, shape.layout, shape.devices, 1, 0, PROBE_TOKENS)
    landing.expect([Candidate(key, key.length) for key in keys], (0,), 0)
    for key in keys:
        landing.place(capture.block(key))
    landing.commit(CUT_TOKENS)
    return cache
