"""Stores: bytes by key, and nothing else. They know no tensors, budgets or models.

A store is one object with five batch methods. Keys are ``<64 hex digits>/<64 hex digits>`` (namespace, block).
Every method takes a deadline; a store that cannot honour it (a blocking client) is wrapped by the tier.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ghostcacher.errors import ConfigurationError, StoreError

Buffer = bytes | bytearray | memoryview
Blob = Sequence[Buffer]
"""A value to be written: buffers that follow one another."""

WITHOUT_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""Errors of file systems that have no hard links: there the last of two writers at once may win."""

_KEY = re.compile(r"[0-9a-f]{64}/[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """One entry of a listing; times in seconds since the epoch."""

    key: str
    size_bytes: int
    modified_seconds: float


class Store(Protocol):
    """What every backend implements. All methods may be called from several threads at once."""

    name: str

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """The first ``limit_bytes`` of each value.

        Absent keys are left out; a key that could not be read maps to the error. The bytes are private: later
        writes to the store do not show through.

        Raises:
            StoreError: nothing could be read at all.
        """
        ...

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """Write every value whole or not at all, replacing what stood there. A reader sees the old or the new.

        Without ``replace`` what stands there stays, whoever was first; those keys are given back. Of several writers
        at once exactly one is the first, where the store can tell (`FilesystemStore` says where it cannot).

        Raises:
            StoreError: at least one was not written.
        """
        ...

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """Those of ``keys`` that are stored.

        Raises:
            StoreError: the store did not answer.
        """
        ...

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """Remove values; absent keys are no error.

        Raises:
            StoreError: at least one still stands.
        """
        ...

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """Every entry whose key begins with ``prefix``, in no order. Partial writes are not listed.

        Raises:
            StoreError: the store did not answer.
        """
        ...


def close(store: object) -> None:
    """Close the connections of a store that has any; a later call to it opens them again."""
    ending = getattr(store, "close", None)
    if ending is not None:
        ending()


def checked_key(key: str) -> str:
    """``key``, if it is two digests with a slash between: nothing else ever becomes a path or an object name.

    Raises:
        ConfigurationError: anything else.
    """
    if not _KEY.fullmatch(key):
        raise ConfigurationError(f"{key[:80]!r} is not a store key: 64 hex digits, a slash, 64 hex digits")
    return key


def is_key(text: str) -> bool:
    """Whether ``text`` may be a store key; see `checked_key`."""
    return _KEY.fullmatch(text) is not None


def relative_path(key: str) -> str:
    """``v1/<namespace>/<2 hex>/<key>.safetensors`` for ``<namespace>/<key>``; see `checked_key`."""
    namespace, digest = checked_key(key).split("/")
    return f"v1/{namespace}/{digest[:2]}/{digest}.safetensors"


def key_of_path(path: str) -> str | None:
    """The key that ``…/<namespace>/<2 hex>/<key>.safetensors`` stands for, or None for any other file."""
    parts = path.rsplit("/", 3)
    if len(parts) < 3 or not parts[-1].endswith(".safetensors"):  # noqa: PLR2004 (namespace, bucket, file)
        return None
    key = f"{parts[-3]}/{parts[-1].removesuffix('.safetensors')}"
    return key if _KEY.fullmatch(key) and parts[-2] == parts[-1][:2] else None
