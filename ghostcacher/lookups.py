"""What a store knows of a prompt, without loading it: for routers and schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ghostcacher.adapters.base import base_module
from ghostcacher.adapters.unserved import UnservedError
from ghostcacher.errors import UnsupportedModelError
from ghostcacher.hooks import hooks_of
from ghostcacher.keys import PrefixChain
from ghostcacher.tiers.opening import default_store
from ghostcacher.tiers.stack import TierStack


@dataclass(frozen=True, slots=True)
class Lookup:
    """``tokens`` of ``prompt_tokens`` are known, down from ``tier`` (several: ``"memory+disk"``).

    ``load_seconds`` is what loading them would take, ``compute_seconds`` what computing the whole prompt would; None
    where nothing was measured yet, of that tier in the last minute, of this model in this process.
    """

    prompt_tokens: int
    tokens: int
    tier: str
    load_seconds: float | None
    compute_seconds: float | None


def lookup(model: Any, token_ids: Sequence[int], store: TierStack | None = None) -> Lookup:
    """Look for the longest known prefix of ``token_ids``, those of one prompt, as ``generate`` would.

    Asks remote tiers whether they have it, in one batch; loads nothing, changes nothing. A model that is not served, or
    not as it stands now, knows nothing.

    Raises:
        UnsupportedModelError: ``model`` cannot take a GhostCache at all.
    """
    module, opened = base_module(model), store if store is not None else default_store()
    hooks = hooks_of(module)
    hooks.prepare()
    adapter = hooks.adapter
    unknown = Lookup(len(token_ids), 0, "", None, adapter.prefill.seconds(len(token_ids)))
    if adapter.shape is None or adapter.refusal or not token_ids:
        return unknown
    try:
        identity = adapter.identify(module, opened.config, "sampled", len(token_ids))
    except (UnservedError, UnsupportedModelError, ValueError):
        return unknown
    chain = PrefixChain.of(token_ids, identity.namespace, opened.config.block_tokens)
    found = opened.match(chain, snapshots=adapter.has_states)
    legs = opened.legs(found, adapter.shape.layout)
    if not legs:
        return unknown
    seconds = [leg.seconds for leg in legs]
    known = None if any(each is None for each in seconds) else sum(each or 0.0 for each in seconds)
    tier = "+".join(dict.fromkeys(leg.tier for leg in legs))
    return Lookup(len(token_ids), max(leg.end_tokens for leg in legs), tier, known, unknown.compute_seconds)
