"""A one-time test of a model type outside the proven table: is restored state as good as computed?"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from ghostcacher.adapters.capture import Row, RowCapture
from ghostcacher.adapters.landing import Landing
from ghostcacher.adapters.probe import Shape, run
from ghostcacher.index import Candidate
from ghostcacher.keys import Namespace, PrefixChain

PROBE_TOKENS = 48
CUT_TOKENS = 24
_BLOCK_TOKENS = 16
_PADS = 5
_SEED = 20
_TOLERANCE = 1e-3
_HALF_TOLERANCE = 0.1
_HALF_DTYPES = frozenset({torch.float16, torch.bfloat16})


def certify(module: Any, shape: Shape, *, one_at_a_time: bool = False) -> str | None:
    """Why prompts must run cold, or None if restored state gave what computing it gave.

    Runs 48 random tokens whole, and with the first 24 restored from a *different* run (a longer one, where the kind
    of state allows). The logits must agree within 1e-3 of the largest (0.1 in half precision). With
    ``one_at_a_time`` the other 24 go in singly. Changes neither model nor random state.
    """
    ids, other = _random_ids(module), _random_ids(module, seed=_SEED + 1)
    other[:, :CUT_TOKENS] = ids[:, :CUT_TOKENS]
    whole = run(module, ids, _cache(module, shape))
    cache = _restored(module, shape, other)
    step = 1 if one_at_a_time else PROBE_TOKENS - CUT_TOKENS
    for start in range(CUT_TOKENS, PROBE_TOKENS, step):
        restored = run(module, ids[:, start : start + step], cache, start)
    difference, allowed = _difference(module, whole, restored)
    if difference <= allowed:
        return None
    return f"a probe gave other logits with restored state (difference {difference:.2g}, allowed {allowed:.2g})"


def pads_change_rows(module: Any, shape: Shape) -> bool:
    """Whether the model answers a left-padded row otherwise than the same tokens without padding."""
    ids = _random_ids(module)
    padded = ids.clone()
    padded[:, :_PADS] = ids[:, _PADS : 2 * _PADS]
    alone = run(module, ids[:, _PADS:], _cache(module, shape))
    try:
        difference, allowed = _difference(module, alone, run(module, padded, _cache(module, shape), pads=_PADS))
    except Exception:  # noqa: BLE001 (a model that cannot be given padding is not served with it)
        return True
    return difference > allowed


def _difference(module: Any, left: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    tolerance = _HALF_TOLERANCE if module.dtype in _HALF_DTYPES else _TOLERANCE
    return float((left - right).abs().max()), tolerance * max(1.0, float(left.abs().max()))


def _random_ids(module: Any, seed: int = _SEED) -> torch.Tensor:
    vocabulary = module.get_input_embeddings().weight.shape[0]
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator, device="cpu")


def _cache(module: Any, shape: Shape) -> DynamicCache:
    cache = DynamicCache(config=module.config)
    cache.layers[:] = shape.blank()
    return cache


def _restored(module: Any, shape: Shape, donor_ids: torch.Tensor) -> DynamicCache:
    donor, cache = _cache(module, shape), _cache(module, shape)
    state = shape.state_of(donor.layers)
    run(module, donor_ids[:, :CUT_TOKENS], donor)
    snapshot = state.snapshot() if state.has_states else None
    if not state.needs_pieces:
        run(module, donor_ids[:, CUT_TOKENS:], donor, CUT_TOKENS)
    chain = PrefixChain.of(donor_ids[0, :CUT_TOKENS].tolist(), Namespace(bytes(32)), _BLOCK_TOKENS)
    taken = {CUT_TOKENS: snapshot} if snapshot is not None else {}
    capture = RowCapture.of(state.frozen(), shape.layout, 0, Row(0, chain), (), CUT_TOKENS, snapshots=taken)
    keys = capture.keys()
    landing = Landing(shape.state_of(cache.layers), shape, 1, 0, PROBE_TOKENS)
    landing.expect([Candidate(key, key.length) for key in keys], (0,), 0)
    for key in keys:
        landing.place(capture.block(key))
    landing.commit(CUT_TOKENS)
    return cache
