"""A few threads that read and decode blocks at once."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

READER_THREADS = 4
"""At most; no more than there are processors. They share Python's lock, and torch's own threads."""

_Item = TypeVar("_Item")


class Readers:
    """A `Spread`: the caller's own thread, and of a pool's those that are idle.

    Nobody waits for a thread to become idle, so that calls within calls cannot wait for each other. The pool is started
    on first use, and again after a fork.
    """

    def __init__(self, threads: int = READER_THREADS) -> None:
        self._helpers = min(threads, os.cpu_count() or 1) - 1
        self._pool: _Pool | None = None

    def __call__(self, function: Callable[[_Item], None], items: Sequence[_Item], /) -> None:
        """See `Spread`."""
        work = _Work(function, items)
        wanted = min(self._helpers, len(items) - 1)
        helping = self._started().help(work, wanted) if wanted > 0 else []
        try:
            work.run()
        finally:
            wait(helping)
        for future in helping:
            future.result()

    def close(self) -> None:
        """Stop the threads; a later call starts them again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _started(self) -> _Pool:
        pool = self._pool
        if pool is None or pool.process != os.getpid():
            pool = self._pool = _Pool(self._helpers)
        return pool


class _Work(Generic[_Item]):
    """Items that threads take one by one; an exception on any of them lets nothing more begin."""

    def __init__(self, function: Callable[[_Item], None], items: Sequence[_Item]) -> None:
        self._function = function
        self._left = deque(items)

    def run(self) -> None:
        """Take items until none is left."""
        try:
            while True:
                try:
                    item = self._left.popleft()
                except IndexError:
                    return
                self._function(item)
        finally:
            self._left.clear()


class _Pool:
    """Threads of this process, and how many of them are idle."""

    def __init__(self, threads: int) -> None:
        self.process = os.getpid()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="ghostcacher-reader")
        self._idle = threading.Semaphore(threads)

    def help(self, work: _Work[_Item], wanted: int) -> list[Future[None]]:
        """Let as many idle threads as are ``wanted``, and there are, run ``work``; none of a pool that is closed."""
        helping: list[Future[None]] = []
        while len(helping) < wanted and self._idle.acquire(blocking=False):
            try:
                helping.append(self._executor.submit(self._run, work))
            except RuntimeError:  # it was closed meanwhile, or the interpreter ends
                self._idle.release()
                break
        return helping

    def close(self) -> None:
        """Stop the threads of this process."""
        if self.process == os.getpid():
            self._executor.shutdown()

    def _run(self, work: _Work[_Item]) -> None:
        try:
            work.run()
        finally:
            self._idle.release()
