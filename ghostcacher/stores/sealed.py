"""A store whose names and values say nothing to who lacks the key, and take nothing from them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace as replaced

from ghostcacher.errors import StoreError, StoreForgedError
from ghostcacher.stores.base import Blob, Buffer, Store, StoredEntry, checked_key, close
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.envelope import HEAD_AT, OVERHEAD_BYTES, TAG_BYTES, Sealing, body_at

_WHOLE_BYTES = 2**30 + OVERHEAD_BYTES
_HEAD_LIMIT_BYTES = 2**21
_NAMESPACE_CHARS = 64
_LABELS_AT_ONCE = 1000


class SealedStore:
    """``store`` with every value in an envelope (`Sealing`) under a name drawn from its key.

    ``ring`` holds the sealings: the first seals, all of them open, so that a key can be replaced while what it sealed
    is still read. The head of a value is its first buffer, if it has more than one. Of a value that is longer than the
    limit of a read, the head alone is given where there is one.
    """

    def __init__(self, store: Store, ring: Sequence[Sealing]) -> None:
        self.name = store.name
        self._store = store
        self._ring = tuple(ring)
        self._keys: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"SealedStore({self._store!r})"

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`. What was not sealed with a key of the ring maps to StoreForgedError."""
        found: dict[str, Buffer | StoreError] = {}
        for sealing in self._ring:
            wanted = [key for key in keys if isinstance(found.get(key, StoreError()), StoreError)]
            names = {sealing.name(key): key for key in wanted}
            opened = self._opened(sealing, names, limit_bytes, timeout_seconds)
            # What opens with any key counts, whatever lies under the names of others.
            found |= {
                key: value for key, value in opened.items() if key not in found or not isinstance(value, StoreError)
            }
        return found

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """See `Store.put_many`. Not to replace looks at what the first key of the ring sealed.

        Raises:
            StoreRefusedError: a value of more than 2 GiB.
        """
        sealing = self._ring[0]
        names = {sealing.name(key): key for key in items}
        sealed = {name: _sealed(sealing, key, items[key]) for name, key in names.items()}
        stood = self._store.put_many(sealed, timeout_seconds=timeout_seconds, replace=replace)
        self._keys.update(names)
        old = [other.name(key) for other in self._ring[1:] for name, key in names.items() if name not in stood]
        if old:
            self._store.delete_many(old, timeout_seconds=timeout_seconds)
        return frozenset(names[name] for name in stood)

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`. By name alone: that it opens is seen when it is read."""
        names = {sealing.name(key): key for sealing in self._ring for key in keys}
        found = self._store.contains_many(list(names), timeout_seconds=timeout_seconds)
        return frozenset(names[name] for name in found)

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`."""
        names = [sealing.name(key) for sealing in self._ring for key in keys]
        self._store.delete_many(names, timeout_seconds=timeout_seconds)
        for name in names:
            self._keys.pop(name, None)

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`: what opens with a key of the ring; the sizes are of what was sealed."""
        namespace, slash, _ = prefix.partition("/")
        for place in [f"{sealing.namespace(namespace)}/" for sealing in self._ring] if slash else [""]:
            entries = list(self._store.list_keys(place, timeout_seconds=timeout_seconds))
            found = self.translated(entries, timeout_seconds=timeout_seconds)
            yield from (entry for entry in found if entry.key.startswith(prefix))

    def close(self) -> None:
        """Close the wrapped store's connections."""
        close(self._store)

    def translated(self, entries: Sequence[StoredEntry], *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """``entries`` of the wrapped store under their true keys; those that do not open are left out.

        Raises:
            StoreError: what an entry is could not be read.
        """
        unknown = [entry.key for entry in entries if entry.key not in self._keys]
        for begin in range(0, len(unknown), _LABELS_AT_ONCE):
            names = unknown[begin : begin + _LABELS_AT_ONCE]
            labels = self._store.get_many(names, limit_bytes=HEAD_AT, timeout_seconds=timeout_seconds)
            self._keys.update({name: key for name, value in labels.items() if (key := self._key_of(name, value))})
        for entry in entries:
            if key := self._keys.get(entry.key):
                yield replaced(entry, key=key, size_bytes=max(0, entry.size_bytes - OVERHEAD_BYTES))

    def damaged(self, entries: Sequence[StoredEntry]) -> list[StoredEntry]:
        """Those of ``entries`` of the wrapped store that say they were sealed with the ring, and do not open."""
        names = [entry.key for entry in entries if entry.key not in self._keys]
        heads = self._store.get_many(names, limit_bytes=HEAD_AT, timeout_seconds=0.0)
        claimed = {
            name for name, head in heads.items()
            if not isinstance(head, StoreError) and any(sealing.owns(head) for sealing in self._ring)
            and self._key_of(name, head) is None
        }  # fmt: skip
        return [entry for entry in entries if entry.key in claimed]

    def namespaces_of(self, namespace: str) -> list[str]:
        """Where the values of ``namespace`` lie, for each key of the ring; everywhere for an empty one."""
        return [sealing.namespace(namespace) for sealing in self._ring] if namespace else [""]

    def names_of(self, keys: Sequence[str]) -> list[str]:
        """The names under which ``keys`` may lie, in their order, for each key of the ring."""
        return [sealing.name(key) for key in keys for sealing in self._ring]

    def _key_of(self, name: str, envelope: Buffer | StoreError) -> str | None:
        if isinstance(envelope, StoreError):
            raise envelope
        for sealing in self._ring:
            if sealing.owns(envelope):
                try:
                    key = sealing.label(envelope)
                except StoreForgedError:
                    return None
                return key if sealing.name(key) == name else None
        return None

    def _opened(
        self, sealing: Sealing, names: Mapping[str, str], limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """Values by key, of those of ``names`` that stand; what a limited read cut off is read again if needed."""
        whole = limit_bytes + OVERHEAD_BYTES
        read = dict(self._store.get_many(list(names), limit_bytes=whole, timeout_seconds=timeout_seconds))
        cut = {name for name, value in read.items() if not isinstance(value, StoreError) and len(value) >= whole}
        # How much more to read stands in the value: nobody's word is taken for it before its label has opened.
        forged = {name for name in cut if not _is_of(sealing, names[name], read[name])}
        read |= dict.fromkeys(forged, StoreForgedError("a sealed value does not open"))
        for needed_bytes, again in _too_short(read, cut - forged, whole).items():
            more = self._store.get_many(again, limit_bytes=needed_bytes, timeout_seconds=timeout_seconds)
            read |= more
            cut -= {name for name, value in more.items() if isinstance(value, StoreError) or len(value) < needed_bytes}
        return {
            names[name]: value if isinstance(value, StoreError)
            else _value(sealing, names[name], value, limit_bytes, is_cut=name in cut)
            for name, value in read.items()
        }  # fmt: skip


class SealedDirectory:
    """A `DirectoryStore` behind a `SealedStore`, with what only a directory has: buckets, times of use, a root."""

    def __init__(self, store: DirectoryStore, ring: Sequence[Sealing]) -> None:
        self.name = store.name
        self.root = store.root
        self.lock_mode = store.lock_mode
        self._directory = store
        self._sealed = SealedStore(store, ring)
        self.get_many = self._sealed.get_many
        self.put_many = self._sealed.put_many
        self.contains_many = self._sealed.contains_many
        self.delete_many = self._sealed.delete_many
        self.list_keys = self._sealed.list_keys

    def buckets(self, namespace: str = "") -> Iterator[os.DirEntry[str]]:
        """See `DirectoryStore.buckets`; ``namespace`` is a whole one or none."""
        for place in self._sealed.namespaces_of(namespace):
            yield from self._directory.buckets(place)

    def entries_in(self, bucket: str) -> Iterator[StoredEntry]:
        """See `DirectoryStore.entries_in`: those that open, under their true keys."""
        yield from self._sealed.translated(list(self._directory.entries_in(bucket)), timeout_seconds=0.0)

    def touch_many(self, keys: Sequence[str]) -> None:
        """See `DirectoryStore.touch_many`."""
        self._directory.touch_many(self._sealed.names_of(keys))

    def namespaces(self) -> list[str]:
        """Hexadecimal digests of the namespaces that stand here and open."""
        entries = self.list_keys(timeout_seconds=0.0)
        return list(dict.fromkeys(entry.key[:_NAMESPACE_CHARS] for entry in entries))

    def damaged(self) -> list[StoredEntry]:
        """Entries that say they were sealed with a key of the ring and do not open, under the names they have."""
        listed = list(self._directory.list_keys(timeout_seconds=0.0))
        return self._sealed.damaged(listed)

    def delete_named(self, names: Sequence[str]) -> None:
        """Remove entries by the names they have in the directory. Raises as `Store.delete_many`."""
        self._directory.delete_many(names, timeout_seconds=0.0)


def _sealed(sealing: Sealing, key: str, blob: Blob) -> Blob:
    head, body = (blob[0], blob[1:]) if len(blob) > 1 else (b"", blob)
    return sealing.seal(checked_key(key), head, b"".join(body) if len(body) != 1 else body[0])


def _is_of(sealing: Sealing, key: str, envelope: Buffer | StoreError) -> bool:
    try:
        return not isinstance(envelope, StoreError) and sealing.label(envelope) == key
    except StoreForgedError:
        return False


def _too_short(
    read: Mapping[str, Buffer | StoreError], cut: Iterable[str], limit_bytes: int
) -> Mapping[int, list[str]]:
    """Those of ``cut``, by the bytes they need, whose heads end beyond ``limit_bytes``; all, if they have none."""
    needed: dict[int, list[str]] = {}
    for name in cut:
        value = read[name]
        end = 0 if isinstance(value, StoreError) else body_at(value)
        needed_bytes = _WHOLE_BYTES if end == HEAD_AT + TAG_BYTES else min(end, _HEAD_LIMIT_BYTES)
        if needed_bytes > limit_bytes:
            needed.setdefault(needed_bytes, []).append(name)
    return needed


def _value(sealing: Sealing, key: str, envelope: Buffer, limit_bytes: int, *, is_cut: bool) -> Buffer | StoreError:
    """What is in ``envelope``, at most ``limit_bytes``, or its head if it may be cut off; an error if it is forged."""
    try:
        value = _whole_or_head(sealing, key, envelope) if is_cut else sealing.value(key, envelope)
    except StoreForgedError as error:
        return error
    return value if len(value) <= limit_bytes else value[:limit_bytes]


def _whole_or_head(sealing: Sealing, key: str, envelope: Buffer) -> Buffer:
    """A read that ended where it had to may have got all there is: only opening it tells."""
    head = sealing.head(key, envelope)
    try:
        return sealing.value(key, envelope)
    except StoreForgedError:
        if not head:
            raise
        return head
