"""Which blocks a tier holds: a prefix tree in memory. A hint, never an answer: reads verify."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ghostcacher.eviction import Entry, EvictionPolicy
from ghostcacher.keys import TOKEN_BYTES, BlockKey, PrefixChain, common_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """A block (or snapshot) that shares its first ``tokens`` tokens with what was asked for."""

    key: BlockKey
    tokens: int


class PrefixIndex:
    """Blocks of one tier by key, by parent and by last use. Safe to share between threads."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._entries: dict[bytes, Entry] = {}
        self._children: defaultdict[bytes, dict[bytes, dict[bytes, BlockKey]]] = defaultdict(dict)
        self._snapshots: Counter[bytes] = Counter()
        self._namespaces: Counter[bytes] = Counter()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._entries

    def get(self, digest: bytes) -> Entry | None:
        """The entry of ``digest``, or None."""
        return self._entries.get(digest)

    def entries(self) -> list[Entry]:
        """All entries, in no order."""
        with self._lock:
            return list(self._entries.values())

    def add(
        self, key: BlockKey, size_bytes: int, *, lossy: bool = False, codec: str = "", kl: float | None = None,
        used_at_seconds: float | None = None,
    ) -> list[BlockKey]:  # fmt: skip
        """Note a block; returns the shorter tail blocks that it makes superfluous, which stay until removed.

        ``codec`` and ``kl`` are those of `Entry`.
        """
        with self._lock:
            entry = self._forget(key.digest) or Entry(key, 0, 0.0)  # which stays pinned while it is read
            entry.size_bytes, entry.lossy, entry.codec, entry.kl = size_bytes, lossy, codec, kl
            entry.used_at_seconds = self._clock() if used_at_seconds is None else used_at_seconds
            entry.children = sum(len(run) for run in self._children.get(key.digest, {}).values())
            self._entries[key.digest] = entry
            self._weigh(key, size_bytes)
            self._children[key.parent].setdefault(key.tokens[:TOKEN_BYTES], {})[key.digest] = key
            if parent := self._entries.get(key.parent):
                parent.children += 1
            return self._outgrown_by(key)

    def learn(self, digest: bytes, size_bytes: int, *, lossy: bool, codec: str, kl: float | None) -> None:
        """Note what reading a block has told that was only named before. No use of it, and no change of others."""
        with self._lock:
            if (entry := self._entries.get(digest)) is not None and not entry.codec:
                self._weigh(entry.key, size_bytes - entry.size_bytes)
                entry.size_bytes, entry.lossy, entry.codec, entry.kl = size_bytes, lossy, codec, kl

    def remove(self, digest: bytes) -> Entry | None:
        """Forget a block; returns what was known of it."""
        with self._lock:
            return self._forget(digest)

    def touch(self, digests: Iterable[bytes]) -> None:
        """Mark as used now, the first given as the most recent, so that parents outlive children."""
        with self._lock:
            now = self._clock()
            for age, digest in enumerate(digests):
                if entry := self._entries.get(digest):
                    entry.used_at_seconds = max(entry.used_at_seconds, now - age * 1e-6)

    @contextmanager
    def pinned(self, digests: Iterable[bytes]) -> Iterator[None]:
        """Keep blocks from being evicted while they are read."""
        held = [entry for digest in digests if (entry := self._entries.get(digest))]
        with self._lock:
            for entry in held:
                entry.pins += 1
        try:
            yield
        finally:
            with self._lock:
                for entry in held:
                    entry.pins -= 1

    def best_child(self, parent: bytes, tokens: bytes, *, exact_only: bool) -> Candidate | None:
        """The block after ``parent`` that shares the most leading tokens with ``tokens`` (packed)."""
        with self._lock:
            best: Candidate | None = None
            for digest, key in self._children.get(parent, {}).get(tokens[:TOKEN_BYTES], {}).items():
                if key.is_snapshot or (exact_only and self._entries[digest].lossy):
                    continue
                shared = common_tokens(key.tokens, tokens)
                if best is None or shared > best.tokens or (shared == best.tokens and key.length < best.key.length):
                    best = Candidate(key, shared)
            return best

    def best_snapshot(self, parent: bytes, tokens: bytes, *, exact_only: bool) -> Candidate | None:
        """The longest snapshot after ``parent`` whose tokens all stand at the front of ``tokens`` (packed)."""
        with self._lock:
            fitting = [
                key for digest, key in self._children.get(parent, {}).get(tokens[:TOKEN_BYTES], {}).items()
                if key.is_snapshot and tokens.startswith(key.tokens) and _usable(self, digest, exact_only=exact_only)
            ]  # fmt: skip
            best = max(fitting, key=lambda key: key.length, default=None)
            return None if best is None else Candidate(best, best.length)

    def covers(self, key: BlockKey, *, exact_only: bool) -> bool:
        """Whether this block, or a longer one that begins with it, is held; of snapshots, exactly this one."""
        if key.is_snapshot:
            return _usable(self, key.digest, exact_only=exact_only)
        found = self.best_child(key.parent, key.tokens, exact_only=exact_only)
        return found is not None and found.tokens == key.length

    def longest(self, chain: PrefixChain, *, exact_only: bool = False) -> list[Candidate]:
        """Blocks of this index that cover the longest prefix of ``chain``, down to the token.

        Leaves at least one token of the prompt outside. Does not change the index.
        """
        return longest_prefix([self], chain, exact_only=exact_only)

    def may_displace(self, key: BlockKey) -> bool:
        """Whether others may be evicted for ``key``: not for a block whose parent is not held, which is no prefix."""
        return key.start == 0 or key.parent in self._entries

    def snapshot_bytes(self, namespace: bytes | None = None) -> int:
        """Bytes of all snapshots, or of one namespace's (its digest)."""
        return self._snapshots.total() if namespace is None else self._snapshots[namespace]

    def namespace_bytes(self, namespace: bytes) -> int:
        """Bytes of everything of one namespace, by its digest."""
        return self._namespaces[namespace]

    def snapshot_victims(self, namespace: bytes, needed_bytes: int, policy: EvictionPolicy) -> Iterator[Entry]:
        """Snapshots of ``namespace`` in the policy's order until ``needed_bytes`` would be free; removes none."""
        with self._lock:
            held = [e for e in self._entries.values() if e.key.is_snapshot and e.key.namespace == namespace]
        for entry in sorted(held, key=policy):
            if needed_bytes <= 0:
                return
            if entry.is_evictable:
                needed_bytes -= entry.size_bytes
                yield entry

    def victims(self, needed_bytes: int, policy: EvictionPolicy, namespace: bytes | None = None) -> Iterator[Entry]:
        """Evictable leaves in the policy's order until ``needed_bytes`` would be free. Does not remove them.

        Of all namespaces, or of one. A parent becomes a candidate as soon as its last child has been handed out.
        """
        with self._lock:
            order = itertools.count()
            left = {digest: entry.children for digest, entry in self._entries.items()}
            heap = [
                (policy(entry), next(order), entry) for entry in self._entries.values()
                if entry.is_evictable and namespace in {None, entry.key.namespace}
            ]  # fmt: skip
            heapq.heapify(heap)
        while heap and needed_bytes > 0:
            entry = heapq.heappop(heap)[2]
            if entry.pins:
                continue
            needed_bytes -= entry.size_bytes
            yield entry
            parent = self._entries.get(entry.key.parent)
            if parent is not None and parent.key.digest in left:
                left[parent.key.digest] -= 1
                if left[parent.key.digest] == 0 and parent.pins == 0:
                    heapq.heappush(heap, (policy(parent), next(order), parent))

    def _outgrown_by(self, key: BlockKey) -> list[BlockKey]:
        if key.is_snapshot:
            return []
        siblings = self._children[key.parent].get(key.tokens[:TOKEN_BYTES], {}).values()
        shorter = [
            other for other in siblings
            if not other.is_snapshot and other.length < key.length and key.tokens.startswith(other.tokens)
        ]  # fmt: skip
        return [other for other in shorter if self._entries[other.digest].is_evictable]

    def _weigh(self, key: BlockKey, more_bytes: int) -> None:
        self.size_bytes += more_bytes
        self._namespaces[key.namespace] += more_bytes
        if key.is_snapshot:
            self._snapshots[key.namespace] += more_bytes

    def _forget(self, digest: bytes) -> Entry | None:
        entry = self._entries.pop(digest, None)
        if entry is None:
            return None
        self._weigh(entry.key, -entry.size_bytes)
        runs = self._children[entry.key.parent]
        run = runs[entry.key.tokens[:TOKEN_BYTES]]
        del run[digest]
        if not run:
            del runs[entry.key.tokens[:TOKEN_BYTES]]
        if not runs:
            del self._children[entry.key.parent]
        if parent := self._entries.get(entry.key.parent):
            parent.children -= 1
        return entry


def longest_prefix(indexes: Iterable[PrefixIndex], chain: PrefixChain, *, exact_only: bool = False) -> list[Candidate]:
    """Blocks of any of ``indexes`` that cover the longest prefix of ``chain``, in order.

    Whole blocks are found by key; where they end, the block that shares the most tokens completes the prefix. The
    last candidate's ``tokens`` may be fewer than its block holds.
    """
    held = list(indexes)
    found: list[Candidate] = []
    limit = chain.reusable_tokens
    position = 0
    while position + chain.block_tokens <= limit:
        key = chain.block(position // chain.block_tokens)
        if not any(_usable(index, key.digest, exact_only=exact_only) for index in held):
            break
        found.append(Candidate(key, key.length))
        position = key.end
    rest = chain.run(position, min(limit, position + chain.block_tokens))
    if rest:
        parent = chain.parent_of(position // chain.block_tokens)
        partial = [c for index in held if (c := index.best_child(parent, rest, exact_only=exact_only)) and c.tokens]
        if partial:
            found.append(max(partial, key=lambda candidate: candidate.tokens))
    return found


def cut_to_snapshot(
    indexes: Iterable[PrefixIndex], chain: PrefixChain, found: list[Candidate], limit: int, *, exact_only: bool = False
) -> list[Candidate]:
    """The part of ``found`` (a prefix of ``chain``) up to its longest snapshot within ``limit`` tokens, and that one.

    Empty if there is none: blocks without a snapshot after them are of no use to layers that need one.
    """
    held = list(indexes)
    covered = min(limit, found[-1].key.start + found[-1].tokens if found else 0)
    for number in range(-(-covered // chain.block_tokens) - 1, -1, -1):
        start = number * chain.block_tokens
        run = chain.run(start, min(covered, start + chain.block_tokens))
        parent = chain.parent_of(number)
        fitting = [c for index in held if (c := index.best_snapshot(parent, run, exact_only=exact_only))]
        if fitting:
            best = max(fitting, key=lambda candidate: candidate.tokens)
            kept = [c for c in found if c.key.start < best.key.end]
            last = Candidate(kept[-1].key, best.key.end - kept[-1].key.start)
            return [*kept[:-1], last, best]
    return []


def _usable(index: PrefixIndex, digest: bytes, *, exact_only: bool) -> bool:
    entry = index.get(digest)
    return entry is not None and not (exact_only and entry.lossy)
