"""The tiers of one store, nearest first, and the writer that fills them: what ``open_store`` returns."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from ghostcacher.blocks import CPU, KVBlock, KVLayout
from ghostcacher.config import StoreConfig
from ghostcacher.errors import ConfigurationError
from ghostcacher.events import CacheEvent, CacheReport, EventKind, Observer, tell
from ghostcacher.gate import RETRY_SECONDS, Leg
from ghostcacher.index import Candidate, cut_to_snapshot, longest_prefix
from ghostcacher.keys import BlockKey, PrefixChain, common_tokens
from ghostcacher.tiers.admission import SecondSight
from ghostcacher.tiers.auditing import Auditing
from ghostcacher.tiers.base import Place, Tier
from ghostcacher.tiers.costs import Costs
from ghostcacher.tiers.counts import Counts
from ghostcacher.tiers.decoded import DecodedTier
from ghostcacher.tiers.encoded import EncodedTier
from ghostcacher.tiers.flights import Flights
from ghostcacher.tiers.forgetting import forget, purge
from ghostcacher.tiers.readers import Readers
from ghostcacher.tiers.shelf import Shelf
from ghostcacher.tiers.stats import StoreStats
from ghostcacher.tiers.storing import Capture, Storing
from ghostcacher.tiers.writer import Job, Writer

PENDING_WAIT_SECONDS = 0.5
_LIKENESS_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Fetched:
    """Outcome of one fetch: the blocks that were placed, by digest, with the tier each came from."""

    sources: Mapping[bytes, str]
    lossy: frozenset[bytes]

    def leading(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """The run of ``candidates`` before the first that was not placed: what comes after a hole is no prefix."""
        placed = self.sources
        hole = next((n for n, c in enumerate(candidates) if c.key.digest not in placed), len(candidates))
        return candidates[:hole]


class TierStack:
    """Several tiers as one. ``match`` is a hint; ``fetch`` may give less; ``submit`` returns at once."""

    def __init__(
        self, config: StoreConfig, tiers: Sequence[Tier], writer: Writer, readers: Readers, observers: list[Observer],
        shelf: Shelf, flights: Flights | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.tiers = tuple(tiers)
        self.observers = observers
        self.shelf = shelf
        self._writer = writer
        self._readers = readers
        second_sight = SecondSight() if config.admit == "second-sight" else None
        self._storing = Storing(tiers, shelf, self.observe, second_sight)
        self._has_near = any(isinstance(tier, DecodedTier) for tier in tiers)
        self._exact_only = not any(tier.is_lossy for tier in tiers)
        self._flights = flights
        self.auditing = Auditing(
            tiers, config.audit_share, writer.submit, self.observe, deletes=config.role != "reader"
        )
        self._counts = Counts()
        self._costs = Costs(shelf)
        self._pending: list[Capture] = []
        self._pending_changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<ghostcacher store: {', '.join(tier.name for tier in self.tiers) or 'no tiers'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def has_budget(self) -> bool:
        """Whether any tier is told what its blocks may cost, rather than a codec."""
        return self._storing.has_budget

    def match(
        self, chain: PrefixChain, *, limit_tokens: int | None = None, snapshots: bool = False,
        timeout_seconds: float | None = None,
    ) -> tuple[Candidate, ...]:  # fmt: skip
        """Blocks that cover the longest known prefix of ``chain``, down to the token. A hint: reads verify.

        With ``snapshots`` the prefix ends where a snapshot of it is held, at ``limit_tokens`` at most; that snapshot
        comes last. Waits at most 0.5 s for the writer if it is about to store state of the same beginning. No remote
        tier is waited for longer than ``timeout_seconds``, or asked if it takes longer as a rule.
        """
        self._await_pending(chain)
        for tier in self.tiers:
            if tier.is_local:
                tier.refresh(chain, snapshots=snapshots)
        limit = chain.reusable_tokens if limit_tokens is None else min(limit_tokens, chain.reusable_tokens)
        found = self._longest(chain, limit, snapshots=snapshots)
        if _covered(found) < limit and self._ask_remotes(chain, timeout_seconds, snapshots=snapshots):
            found = self._longest(chain, limit, snapshots=snapshots)
        return tuple(found)

    def wait_for_flight(self, chain: PrefixChain) -> None:
        """In a store that flies singly: wait, within its bound, for who computes what comes after the known prefix.

        If nobody does, say that it is computed here; what is stored of ``chain`` takes that back.
        """
        if self._flights is not None:
            self._flights.wait(chain, _covered(self.match(chain)))

    def known_tokens(self, chain: PrefixChain) -> int:
        """Leading tokens of ``chain`` that the indexes of the tiers know, whatever can be made of them."""
        return _covered(longest_prefix((tier.index for tier in self.tiers), chain, exact_only=self._exact_only))

    def _longest(self, chain: PrefixChain, limit: int, *, snapshots: bool) -> list[Candidate]:
        indexes = [tier.index for tier in self.tiers]
        found = longest_prefix(indexes, chain, exact_only=self._exact_only)
        if snapshots:
            return cut_to_snapshot(indexes, chain, found, limit, exact_only=self._exact_only)
        return found

    def legs(self, candidates: Sequence[Candidate], layout: KVLayout) -> list[Leg]:
        """Who would serve ``candidates``, which follow one another, and in what time as far as was measured lately."""
        sources = [next((tier for tier in self.tiers if c.key.digest in tier.index), None) for c in candidates]
        legs = []
        for tier, run in itertools.groupby(zip(sources, candidates, strict=True), key=lambda pair: pair[0]):
            held = [candidate for _, candidate in run]
            size_bytes = sum(layout.bytes_of(candidate.key) for candidate in held)
            seconds: float | None = 0.0
            if tier is not None and tier.loading is not None:
                seconds = tier.loading.seconds(size_bytes, RETRY_SECONDS)
            legs.append(Leg(tier.name if tier else "", held[-1].key.start + held[-1].tokens, size_bytes, seconds))
        return legs

    def fetch(
        self, keys: Sequence[BlockKey], layout: KVLayout, place: Place, *, timeout_seconds: float | None = None,
        device: torch.device = CPU,
    ) -> Fetched:  # fmt: skip
        """Hand the verified blocks of ``keys`` to ``place``, on any thread, in any order, each tier in one call.

        What is decoded is decoded on ``device``, where it is wanted. May give fewer than asked for; see
        `Fetched.leading` for what is a prefix. No tier is waited for longer than ``timeout_seconds``, or its own limit.

        Raises:
            StoreError: only in a strict store.
        """
        sources: dict[bytes, str] = {}
        lossy: set[bytes] = set()

        def noting(block: KVBlock) -> None:
            place(block)
            if block.lossy:
                lossy.add(block.key.digest)

        if keys:
            self._costs.note(keys[0].namespace, layout.weights)
        for tier in self.tiers:
            held = [key for key in keys if key.digest not in sources and key.digest in tier.index]
            if held:
                placed = tier.fetch(
                    held, layout, noting, exact_only=self._exact_only, timeout_seconds=timeout_seconds, device=device
                )
                sources.update(dict.fromkeys(placed, tier.name))
        return Fetched(sources, frozenset(lossy))

    def submit(self, capture: Capture, *, model: str = "") -> bool:
        """Store what ``capture`` holds, later, on the writer's thread. Returns at once, False if dropped."""
        self._costs.note(capture.begun.namespace.digest, capture.layout.weights)
        with self._pending_changed:
            self._pending.append(capture)
        job = Job(lambda: self._store(capture, model), capture.size_bytes, len(capture.begun))
        if self._writer.submit(job):
            return True
        self._settle(capture)
        self._land(capture)
        return False

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Mark blocks as used, in every tier, on the writer's thread."""
        held = list(keys)

        def touch() -> None:
            for tier in self.tiers:
                tier.touch(held)

        self._writer.submit(Job(touch, 0))

    def offer(self, block: KVBlock, *, model: str = "") -> bool:
        """Store one block now, in every tier that lacks it; whether any tier took it."""
        self._costs.note(block.key.namespace, block.layout.weights)
        return self._storing.offer(block, model)

    def forget(self, chain: PrefixChain, *, keep_tokens: int = 0) -> int:
        """Delete what any tier holds of ``chain`` after its first ``keep_tokens`` tokens, and all that goes on from it.

        Waits for the writer first. Whole blocks are deleted. How many blocks and snapshots were.

        Raises:
            ConfigurationError: the store was opened as a reader.
            StoreError: a store did not answer, or an entry still stands; try again.
        """
        self._refuse_readers()
        self.flush()
        return forget(self.tiers, chain, keep_tokens)

    def purge(self, namespace: bytes) -> int:
        """Delete everything of a namespace, by its digest. How many blocks and snapshots were. Raises as `forget`."""
        self._refuse_readers()
        self.flush()
        return purge(self.tiers, namespace)

    def _refuse_readers(self) -> None:
        if self.config.role == "reader":
            raise ConfigurationError("role='reader' deletes nothing; open the store as a writer")

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything submitted so far is stored; False if ``timeout_seconds`` ran out first."""
        return self._writer.drain(timeout_seconds)

    def close(self) -> None:
        """Store what is queued and stop the threads. The store can still be read; nothing more is stored."""
        self._writer.close()
        self._readers.close()
        if self._flights is not None:
            self._flights.close()
        for tier in self.tiers:
            if isinstance(tier, EncodedTier):
                tier.close()

    def stats(self) -> StoreStats:
        """Counts since the store was opened; sizes are of the namespaces looked at so far.

        Asks the store for what the models' calibrations say, if blocks are lossy.
        """
        c = self._counts
        return StoreStats(
            self._costs.stats_of(self.tiers), c["prompts"], c["hits"], c["prompt_tokens"],
            c["cached_tokens"], c.beginning("bypass: "), self._writer.queued, self._writer.dropped,
            self._writer.failed, self._writer.is_healthy, self.auditing.audited, self.auditing.disproved,
        )  # fmt: skip

    def note(self, report: CacheReport) -> None:
        """Count one prompt and tell the observers."""
        outcome, _, why = report.reason.partition(": ")
        self._counts.add("prompts")
        self._counts.add("prompt_tokens", report.prompt_tokens)
        self._counts.add("cached_tokens", report.cached_tokens)
        self._counts.add("hits", int(outcome == "hit"))
        if outcome == "bypass":
            self._counts.add(report.reason)
        kind: EventKind = "hit" if outcome == "hit" else "bypass" if outcome == "bypass" else "miss"
        self.observe(CacheEvent(kind, why, report.tier, report.cached_tokens, report.bytes, report.seconds))

    def observe(self, event: CacheEvent) -> None:
        """Hand ``event`` to every observer."""
        tell(self.observers, event)

    def _ask_remotes(self, chain: PrefixChain, timeout_seconds: float | None, *, snapshots: bool) -> bool:
        remotes = [tier for tier in self.tiers if not tier.is_local]
        for tier in remotes:
            usual = tier.asking.seconds(1, RETRY_SECONDS) if tier.asking is not None else None
            if timeout_seconds is None or usual is None or usual <= timeout_seconds:
                tier.refresh(chain, snapshots=snapshots, timeout_seconds=timeout_seconds)
        return bool(remotes)

    def _store(self, capture: Capture, model: str) -> None:
        try:
            self._store_settling(capture, model)
        finally:
            self._land(capture)

    def _store_settling(self, capture: Capture, model: str) -> None:
        """Prompts of the same beginning wait until the first tier that gives it back to this process has it."""
        try:
            keys = self._storing.store_near(capture, model)
            if not self._has_near:
                self._storing.store_far(capture, keys, model)
        finally:
            self._settle(capture)
        if self._has_near:
            self._storing.store_far(capture, keys, model)

    def _land(self, capture: Capture) -> None:
        if self._flights is not None:
            self._flights.land(capture.begun)

    def _settle(self, capture: Capture) -> None:
        with self._pending_changed:
            if capture in self._pending:
                self._pending.remove(capture)
            self._pending_changed.notify_all()

    def _await_pending(self, chain: PrefixChain) -> None:
        def is_settled() -> bool:
            return not any(_alike(capture.begun, chain) for capture in self._pending)

        with self._pending_changed:
            self._pending_changed.wait_for(is_settled, PENDING_WAIT_SECONDS)


def _alike(left: PrefixChain, right: PrefixChain) -> bool:
    shared = common_tokens(left.tokens, right.tokens)
    return left.namespace == right.namespace and shared >= min(_LIKENESS_TOKENS, len(left), len(right))


def _covered(candidates: Sequence[Candidate]) -> int:
    return candidates[-1].key.start + candidates[-1].tokens if candidates else 0
