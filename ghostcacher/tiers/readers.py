"""A small pool that reads and places blocks on several threads at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

READER_THREADS = 4
"""At most; no more than there are processors. They share Python's lock, and torch's own threads."""

_Item = TypeVar("_Item")


class Readers:
    """A `Spread` over a pool that is started on first use and again after a fork."""

    def __init__(self, threads: int = READER_THREADS) -> None:
        self._threads = min(threads, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def __call__(self, function: Callable[[_Item], None], items: Sequence[_Item], /) -> None:
        """See `Spread`."""
        if len(items) < 2 or self._threads < 2:  # noqa: PLR2004 (nothing to share out)
            for item in items:
                function(item)
            return
        if self._pool is None or self._process != os.getpid():
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ghostcacher-reader")
            self._process = os.getpid()
        futures = [self._pool.submit(function, item) for item in items]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Stop the threads; a later call starts them again."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None
