"""A model with its tokenizer and a store, as a server's replica or a batch worker holds it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import ghostcacher
from ghostcacher.integrations.routing import STEP_CHARACTERS, ReplicaState, prefix_hashes
from ghostcacher.lookups import Lookup
from ghostcacher.tiers.stack import TierStack

RECENT_PROMPTS = 64
FADING = 0.9

Load = Callable[[], tuple[Any, Any]]
"""Makes model and tokenizer, in the process where they are used."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one prompt; ``seconds`` are those of the whole call."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    tier: str
    seconds: float


class CachedModel:
    """Answers prompts one at a time, reusing what any holder of the same store computed."""

    def __init__(self, load: Load, store: Mapping[str, Any], generate: Mapping[str, Any] | None = None) -> None:
        """``store`` are arguments of `ghostcacher.open_store`, ``generate`` those of every ``model.generate``."""
        self.model, self.tokenizer = load()
        self.store: TierStack = ghostcacher.open_store(**store)
        self._options = {"do_sample": False, "max_new_tokens": 64, **(generate or {})}
        self._lock = threading.Lock()
        self._recent: OrderedDict[str, list[int]] = OrderedDict()
        self._service_seconds = 0.0

    def answer(self, prompt: str, **options: Any) -> Answer:
        """The model's continuation of ``prompt``, as text."""
        with self._lock:
            began = time.perf_counter()
            given = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
            cache = ghostcacher.GhostCache(self.model, self.store)
            with torch.no_grad():
                out = self.model.generate(**given, past_key_values=cache, **{**self._options, **options})
            tokens = given["input_ids"].shape[1]
            seconds = time.perf_counter() - began
            self._note(prompt, given["input_ids"][0].tolist(), seconds)
            text = self.tokenizer.decode(out[0, tokens:], skip_special_tokens=True)
            report = cache.report
            return Answer(text, tokens, report.cached_tokens, report.tier, seconds)

    def state(self) -> ReplicaState:
        """What a router wants to know: asks the store where each recent prompt's prefix lies now."""
        with self._lock:
            recent, service_seconds = list(self._recent.items()), self._service_seconds
        found = [(prompt, ghostcacher.lookup(self.model, ids, self.store)) for prompt, ids in recent]
        near = {hashed for prompt, each in found for hashed in _near_hashes(prompt, each)}
        fetches = [seconds for prompt, each in found if (seconds := _fetch_seconds(prompt, each)) is not None]
        return ReplicaState(frozenset(near), service_seconds, max(fetches, default=0.0))

    def close(self) -> None:
        """Store what is queued and close the store."""
        self.store.close()

    def _note(self, prompt: str, ids: list[int], seconds: float) -> None:
        self._recent[prompt] = ids
        self._recent.move_to_end(prompt)
        while len(self._recent) > RECENT_PROMPTS:
            self._recent.popitem(last=False)
        known = self._service_seconds or seconds
        self._service_seconds = FADING * known + (1 - FADING) * seconds


def _near_hashes(prompt: str, found: Lookup) -> list[str]:
    """Those of the part that is near, as if all tokens had equally many characters."""
    hashes = prefix_hashes(prompt)
    return hashes[: len(hashes) * found.near_tokens // max(1, found.prompt_tokens - 1)]


def _fetch_seconds(prompt: str, found: Lookup) -> float | None:
    """What a step of 256 characters takes to fetch, as far as a tier that is not near was measured."""
    far_tokens = found.tokens - found.near_tokens
    if far_tokens <= 0 or not found.load_seconds or len(prompt) < STEP_CHARACTERS:
        return None
    return found.load_seconds / (far_tokens / found.prompt_tokens * len(prompt) / STEP_CHARACTERS)
