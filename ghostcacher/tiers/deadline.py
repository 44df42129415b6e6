"""Deadlines for clients that have none of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

from ghostcacher.errors import StoreError, StoreTimeoutError
from ghostcacher.stores.base import Blob, Buffer, Store, StoredEntry, close

CALLS_LIMIT = 8
_Result = TypeVar("_Result")


class DeadlineStore:
    """A store whose every call ends within its ``timeout_seconds``, whatever the wrapped client does.

    A call that overruns is abandoned on its daemon thread. With 8 of them abandoned and unfinished, further calls
    fail at once.
    """

    def __init__(self, store: Store) -> None:
        self.name = store.name
        self._store = store
        self._free = threading.Semaphore(CALLS_LIMIT)

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`; raises StoreTimeoutError when time is up."""
        return self._within(
            timeout_seconds,
            lambda: self._store.get_many(keys, limit_bytes=limit_bytes, timeout_seconds=timeout_seconds),
        )

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """See `Store.put_many`; raises StoreTimeoutError when time is up."""
        return self._within(
            timeout_seconds, lambda: self._store.put_many(items, timeout_seconds=timeout_seconds, replace=replace)
        )

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`; raises StoreTimeoutError when time is up."""
        return self._within(timeout_seconds, lambda: self._store.contains_many(keys, timeout_seconds=timeout_seconds))

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`; raises StoreTimeoutError when time is up."""
        self._within(timeout_seconds, lambda: self._store.delete_many(keys, timeout_seconds=timeout_seconds))

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`; raises StoreTimeoutError when time is up."""
        return iter(
            self._within(timeout_seconds, lambda: list(self._store.list_keys(prefix, timeout_seconds=timeout_seconds)))
        )

    def close(self) -> None:
        """Close the wrapped store's connections."""
        close(self._store)

    def _within(self, timeout_seconds: float, call: Callable[[], _Result]) -> _Result:
        if not self._free.acquire(blocking=False):
            raise StoreTimeoutError(f"{CALLS_LIMIT} calls to tier {self.name} hang; not starting another")
        answers: SimpleQueue[_Result | Exception] = SimpleQueue()

        def run() -> None:
            try:
                answers.put(call())
            except Exception as error:  # noqa: BLE001 (raised again on the caller's thread)
                answers.put(error)
            finally:
                self._free.release()

        threading.Thread(target=run, name=f"ghostcacher-{self.name}", daemon=True).start()
        try:
            answer = answers.get(timeout=timeout_seconds)
        except Empty:
            raise StoreTimeoutError(f"tier {self.name} did not answer within {timeout_seconds:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer
