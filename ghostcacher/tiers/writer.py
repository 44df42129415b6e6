"""The one thread that stores: a bounded queue of jobs, behind ``generate``, never in its way."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ghostcacher.events import CacheEvent, Observer

QUEUE_LIMIT_JOBS = 1024
EXIT_DRAIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Job:
    """Work for the writer: ``run`` is called once, ``size_bytes`` is what it keeps alive until then."""

    run: Callable[[], None]
    size_bytes: int
    tokens: int = 0


class Writer:
    """Runs jobs in order on one daemon thread, started with the first job.

    When the queue is full a job is dropped and counted. A job that raises is counted and forgotten. At
    interpreter exit the queue is drained for at most 2 s. After a fork the child begins with an empty queue.
    """

    def __init__(self, limit_bytes: int, observe: Observer) -> None:
        self.limit_bytes = limit_bytes
        self._observe = observe
        self._begin()
        ours = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (method := ours()) and method())
        drain = weakref.WeakMethod(self.drain)
        atexit.register(lambda: (method := drain()) and method(EXIT_DRAIN_SECONDS))

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._queued_bytes = 0
        self._running = False
        self._thread: threading.Thread | None = None
        self._closed = False
        self.dropped = 0
        self.failed = 0

    @property
    def queued(self) -> int:
        """Jobs not finished yet."""
        return len(self._jobs) + self._running

    @property
    def is_healthy(self) -> bool:
        """Whether the thread runs, or has not been needed yet."""
        return self._thread is None or self._thread.is_alive()

    def submit(self, job: Job) -> bool:
        """Queue ``job``; returns at once, False if it was dropped."""
        with self._changed:
            is_full = len(self._jobs) >= QUEUE_LIMIT_JOBS or self._queued_bytes + job.size_bytes > self.limit_bytes
            if not self._closed and not (is_full and self._jobs):
                self._jobs.append(job)
                self._queued_bytes += job.size_bytes
                self._ensure_thread()
                self._changed.notify_all()
                return True
            self.dropped += 1
            is_closed = self._closed
        if not is_closed:
            self._observe(CacheEvent("dropped", "backpressure", "writer", job.tokens, job.size_bytes))
        return False

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until every job submitted so far has run; False if time ran out."""
        with self._changed:
            if self._jobs:
                self._ensure_thread()
            return self._changed.wait_for(lambda: not self._jobs and not self._running, timeout_seconds)

    def close(self) -> None:
        """Run what is queued, then stop the thread. Later jobs are dropped."""
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _ensure_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=_run, args=(weakref.ref(self), self._changed), name="ghostcacher-writer", daemon=True
            )
            self._thread.start()

    def _next(self) -> Job | None:
        with self._changed:
            if not self._jobs and not self._closed:
                self._changed.wait(1.0)
            if not self._jobs:
                return None
            self._running = True
            return self._jobs.popleft()

    def _finish(self, job: Job) -> None:
        try:
            job.run()
        except BaseException as error:  # noqa: BLE001 (the thread must outlive any job, a SystemExit in it too)
            self.failed += 1
            self._observe(CacheEvent("error", f"cannot store: {type(error).__name__}: {error}", "writer", job.tokens))
        finally:
            with self._changed:
                self._running = False
                self._queued_bytes -= job.size_bytes
                self._changed.notify_all()


def _run(writer_ref: weakref.ref[Writer], _changed: threading.Condition) -> None:
    while True:
        writer = writer_ref()
        if writer is None or threading.current_thread() is not writer._thread:  # noqa: SLF001 (the thread's own loop)
            return
        job = writer._next()  # noqa: SLF001 (the thread's own loop)
        if job is not None:
            writer._finish(job)  # noqa: SLF001 (the thread's own loop)
        elif writer._closed:  # noqa: SLF001 (the thread's own loop)
            return
        del job, writer
        time.sleep(0)
