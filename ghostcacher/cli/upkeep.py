"""Looking after a directory of blocks without a model: what is there, is it sound, what may go."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ghostcacher.codecs.header import HEADER_LIMIT_BYTES, BlockHeader, check_digest
from ghostcacher.codecs.spoken import spoken
from ghostcacher.errors import BlockError, StoreError, StoreForgedError
from ghostcacher.keys import FLIGHTS, TABLES, holds_no_block
from ghostcacher.stores.base import Buffer, StoredEntry
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.sealed import SealedDirectory

_TIMEOUT_SECONDS = 60.0
_HEAD_BYTES = 8192
_WHOLE_BYTES = 2**32
_NOBODY = "?"

SEALED = "sealed"
"""The reason of what a key might open, if there was one."""

Progress = Callable[[int], None]
Directory = DirectoryStore | SealedDirectory


@dataclass(frozen=True, slots=True)
class NamespaceSummary:
    """What one namespace holds; times in seconds since the epoch. ``model`` and ``codec`` are those of one block."""

    namespace: str
    model: str
    codec: str
    blocks: int
    size_bytes: int
    used_at_seconds: float


@dataclass(frozen=True, slots=True)
class Unsound:
    """A stored entry that does not verify, and why (a `BlockError.reason`, or ``unreadable``).

    ``is_named``: ``key`` is the name of a sealed entry, whose true key nobody knows.
    """

    key: str
    reason: str
    size_bytes: int
    is_named: bool = False


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """Entries to remove, children before parents. Nothing happens before `execute`.

    ``sealed`` is how many were left alone because nobody can tell what they are without a key.
    """

    entries: tuple[StoredEntry, ...]
    sealed: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes that would be freed."""
        return sum(entry.size_bytes for entry in self.entries)

    def execute(self, store: Directory) -> None:
        """Remove the entries.

        Raises:
            StoreError: one of them still stands.
        """
        store.delete_many([entry.key for entry in self.entries], timeout_seconds=_TIMEOUT_SECONDS)


def summaries(store: Directory) -> list[NamespaceSummary]:
    """Every namespace, the largest first. Reads one header per namespace."""
    found = []
    for namespace in store.namespaces():
        if holds_no_block(namespace):
            continue
        entries = list(store.list_keys(f"{namespace}/", timeout_seconds=_TIMEOUT_SECONDS))
        if entries:
            model, codec = _described(store, entries)
            size_bytes = sum(entry.size_bytes for entry in entries)
            used_at_seconds = max(entry.modified_seconds for entry in entries)
            found.append(NamespaceSummary(namespace, model, codec, len(entries), size_bytes, used_at_seconds))
    return sorted(found, key=lambda summary: -summary.size_bytes)


def _described(store: Directory, entries: Sequence[StoredEntry]) -> tuple[str, str]:
    """Model and codec of the first of four entries whose header can be read."""
    read = [read_header(store, entry.key) for entry in entries[:4]]
    if header := next((each for each in read if isinstance(each, BlockHeader)), None):
        return header.model, spoken(header.codec)
    is_sealed = any(isinstance(each, BlockError) and each.reason == SEALED for each in read)
    return (f"({SEALED})", _NOBODY) if is_sealed else (_NOBODY, _NOBODY)


def unsound(store: Directory, entries: Sequence[StoredEntry], progress: Progress) -> Iterator[Unsound]:
    """Read every entry in full; those whose name, header, key, digest or seal does not hold. ``progress`` gets bytes.

    Among them, with the reason `SEALED`, those that nobody can check without a key.
    """
    for entry in entries:
        reason = _why_unsound(store, entry)
        progress(entry.size_bytes)
        if reason is not None:
            yield Unsound(entry.key, reason, entry.size_bytes)
    if isinstance(store, SealedDirectory):
        yield from (Unsound(entry.key, "auth", entry.size_bytes, is_named=True) for entry in store.damaged())


def delete(store: Directory, entries: Sequence[Unsound]) -> None:
    """Remove what was found unsound.

    Raises:
        StoreError: one of them still stands.
    """
    store.delete_many([found.key for found in entries if not found.is_named], timeout_seconds=_TIMEOUT_SECONDS)
    if isinstance(store, SealedDirectory):
        store.delete_named([found.key for found in entries if found.is_named])


def plan_older_than(store: Directory, seconds: float, progress: Progress, now: float | None = None) -> RemovalPlan:
    """Everything unused for ``seconds``, except what newer blocks chain from."""
    limit = (time.time() if now is None else now) - seconds
    order, sealed = _children_first(store, progress)
    return RemovalPlan(tuple(entry for entry in order if entry.modified_seconds < limit), sealed)


def plan_down_to(store: Directory, size_bytes: int, progress: Progress) -> RemovalPlan:
    """The least recently used leaves, until at most ``size_bytes`` are left."""
    order, sealed = _children_first(store, progress)
    excess_bytes = sum(entry.size_bytes for entry in order) - size_bytes
    chosen = []
    for entry in order:
        if excess_bytes <= 0:
            break
        chosen.append(entry)
        excess_bytes -= entry.size_bytes
    return RemovalPlan(tuple(chosen), sealed)


def plan_namespace(store: Directory, prefix: str) -> RemovalPlan:
    """Everything in the namespaces that begin with ``prefix``."""
    return RemovalPlan(tuple(store.list_keys(prefix, timeout_seconds=_TIMEOUT_SECONDS)))


def read_header(store: Directory, key: str) -> BlockHeader | BlockError | StoreError | None:
    """The header of one entry, or what is wrong with it, or None if it is gone."""
    for limit_bytes in (_HEAD_BYTES, HEADER_LIMIT_BYTES + _HEAD_BYTES):
        value = store.get_many([key], limit_bytes=limit_bytes, timeout_seconds=_TIMEOUT_SECONDS).get(key)
        if value is None or isinstance(value, StoreError):
            return value
        try:
            return BlockHeader.parse(value)
        except BlockError as error:
            found = error
        if len(value) < limit_bytes:
            break
    return found


def _children_first(store: Directory, progress: Progress) -> tuple[list[StoredEntry], int]:
    """All entries by last use, a parent never before its children, and how many are sealed and left out.

    A parent counts as used when its children were. Claims of a single flight are entries without children.
    """
    listed = store.list_keys(timeout_seconds=_TIMEOUT_SECONDS)
    entries = {entry.key: entry for entry in listed if not entry.key.startswith(TABLES.hex)}
    parents, depths, sealed = {}, {}, 0
    for key in list(entries):
        header = read_header(store, key)
        progress(1)
        if isinstance(header, BlockError) and header.reason == SEALED:
            del entries[key]
            sealed += 1
        if isinstance(header, BlockHeader):
            parents[key] = f"{key[:64]}/{header.key.parent.hex()}"
            depths[key] = header.key.start
    used = {key: entry.modified_seconds for key, entry in entries.items()}
    for key in sorted(parents, key=lambda key: -depths[key]):
        if parents[key] in used:
            used[parents[key]] = max(used[parents[key]], used[key])
    order = sorted(entries, key=lambda key: (used[key], -depths.get(key, 0)))
    return [StoredEntry(key, entries[key].size_bytes, used[key]) for key in order], sealed


def _why_unsound(store: Directory, entry: StoredEntry) -> str | None:
    value = store.get_many([entry.key], limit_bytes=_WHOLE_BYTES, timeout_seconds=_TIMEOUT_SECONDS).get(entry.key)
    if isinstance(value, StoreForgedError):
        return "auth"
    if value is None or isinstance(value, StoreError):
        return "unreadable"
    if entry.key.startswith(FLIGHTS.hex):
        return None
    if entry.key.startswith(TABLES.hex):
        return _why_no_table(entry.key, value)
    try:
        header = BlockHeader.parse(value)
        check_digest(value)
    except BlockError as error:
        return error.reason
    return None if header.key.store_key == entry.key else "key_echo"


def _why_no_table(key: str, value: Buffer) -> str | None:
    """An asset has its digest for a name; a shorter value names an asset."""
    is_name = len(value) == len(TABLES.hex) and set(bytes(value)) <= set(b"0123456789abcdef")
    return None if is_name or hashlib.sha256(value).hexdigest() == key.rpartition("/")[2] else "tables"
