"""What a store knows of a prompt, without running the model: for routers and schedulers; and making it forget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ghostcacher.adapters.base import ModelAdapter, base_module
from ghostcacher.adapters.unserved import UnservedError
from ghostcacher.errors import ConfigurationError
from ghostcacher.hooks import hooks_of
from ghostcacher.keys import PrefixChain
from ghostcacher.tiers.opening import default_store
from ghostcacher.tiers.stack import TierStack

NEAR = frozenset({"device", "memory"})
"""Tiers whose content is at hand, or nearly."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """``tokens`` of ``prompt_tokens`` are known, down from ``tier`` (several: ``"memory+disk"``).

    ``near_tokens`` of them, from the first on, lie in RAM or on the device.
    ``load_seconds`` is what loading them would take, ``compute_seconds`` what computing the whole prompt would; None
    where nothing was measured yet, of that tier in the last minute, of this model in this process.
    """

    prompt_tokens: int
    tokens: int
    tier: str
    load_seconds: float | None
    compute_seconds: float | None
    near_tokens: int = 0


def lookup(model: Any, token_ids: Sequence[int], store: TierStack | None = None) -> Lookup:
    """Look for the longest known prefix of ``token_ids``, those of one prompt, as ``generate`` would.

    Asks remote tiers whether they have it, in one batch; loads nothing, changes nothing. A model that is not served, or
    not as it stands now, knows nothing.

    Raises:
        UnsupportedModelError: ``model`` cannot take a GhostCache at all.
        StoreError: only in a strict store.
    """
    asked = _Asked.of(model, token_ids, store)
    unknown = Lookup(len(asked.ids), 0, "", None, asked.adapter.prefill.seconds(len(asked.ids)))
    if asked.chain is None or asked.adapter.shape is None:
        return unknown
    found = asked.store.match(asked.chain, limit_tokens=asked.limit, snapshots=asked.adapter.has_states)
    legs = asked.store.legs(found, asked.adapter.shape.layout)
    if not legs:
        return unknown
    seconds = [leg.seconds for leg in legs]
    known = None if any(each is None for each in seconds) else sum(each or 0.0 for each in seconds)
    tokens = max(leg.end_tokens for leg in legs)
    near = [leg.end_tokens for leg in itertools.takewhile(lambda leg: leg.tier in NEAR, legs)]
    return Lookup(
        len(asked.ids), tokens if asked.limit is None else min(tokens, asked.limit),
        "+".join(dict.fromkeys(leg.tier for leg in legs)), known, unknown.compute_seconds, max(near, default=0),
    )  # fmt: skip


def forget(
    model: Any, token_ids: Sequence[int] | str, store: TierStack | None = None, *, keep_tokens: int = 0,
    tokenizer: Any = None,
) -> int:  # fmt: skip
    """Delete what ``store`` holds of a prompt, of its answers, and of every prompt that goes on from it.

    The prompt is token ids, or text and the ``tokenizer`` that made ids of it, called with nothing but the text: what a
    chat template puts around it must be in it.

    In the namespace of ``model`` as it stands now and of the store's salt and block size. What the first
    ``keep_tokens`` tokens make, such as a system prompt that others share, stays, in whole blocks. How many blocks and
    snapshots were deleted.

    Raises:
        UnsupportedModelError: ``model`` cannot take a GhostCache at all.
        ConfigurationError: the model is not served as it stands now: it has no namespace; or text without a tokenizer.
        StoreError: a store did not answer, or an entry still stands; try again.
    """
    asked = _Asked.of(model, _ids_of(token_ids, tokenizer), store)
    if asked.chain is None:
        raise ConfigurationError(f"nothing is known of {len(asked.ids)} tokens of this model as it stands now")
    return asked.store.forget(asked.chain, keep_tokens=keep_tokens)


def _ids_of(prompt: Sequence[int] | str, tokenizer: Any) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ConfigurationError("a text is known by its token ids alone: give tokenizer=, or the ids")
    ids: Sequence[int] = tokenizer(prompt)["input_ids"]
    return ids


@dataclass(frozen=True, slots=True)
class _Asked:
    """A prompt as the store knows it; no ``chain`` if it cannot know it. ``limit`` is how far its state is shared."""

    ids: list[int]
    adapter: ModelAdapter
    store: TierStack
    chain: PrefixChain | None = None
    limit: int | None = None

    @classmethod
    def of(cls, model: Any, token_ids: Sequence[int], store: TierStack | None) -> _Asked:
        ids, opened = [int(token) for token in token_ids], store if store is not None else default_store()
        module = base_module(model)
        hooks = hooks_of(module)
        hooks.prepare()
        adapter = hooks.adapter
        if adapter.shape is None or adapter.refusal or not ids:
            return cls(ids, adapter, opened)
        try:
            identity = adapter.identify(module, opened.config, "sampled", len(ids))
            limit = identity.shared_columns(len(ids), 1)
        except (UnservedError, ValueError):
            return cls(ids, adapter, opened)
        chain = PrefixChain.of(ids, identity.namespace, opened.config.block_tokens)
        return cls(ids, adapter, opened, chain, limit)
