"""Which half of a cluster's nodes is read: masters, or their replicas, which may lag and never differ."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

AT_ONCE_SECONDS = 1.0
"""A read that failed within it is tried once more: a node that is gone refuses, a hanging one does not."""

NAMES_ASKED_SECONDS = 10.0
"""A cluster does not name replicas that have nothing yet, or has none: it is not asked for them at every read."""

_WHOLE_CLUSTER = frozenset({"ClusterDownError", "TryAgainError"})
"""Said at once, by every node alike, for the second or two in which a cluster elects a master or moves slots."""


class Halves:
    """Masters, until a read of them fails at once or outlasts its caller; then replicas, until they do; and so on.

    Safe to share between threads.
    """

    def __init__(self) -> None:
        self.are_replicas = False
        self._lock = threading.Lock()
        self._reading: dict[object, tuple[float, bool]] = {}
        self._ask_again_at_seconds = 0.0

    @contextlib.contextmanager
    def reading(self, timeout_seconds: float) -> Iterator[bool]:
        """Whether to read replicas; within it, a read that its caller gives up on after ``timeout_seconds``.

        A node that hangs tells nobody: the read after one that is overdue goes to the other half.
        """
        read = object()
        with self._lock:
            self._leave_if_overdue(time.monotonic())
            chosen = self.are_replicas
            self._reading[read] = (time.monotonic() + timeout_seconds, chosen)
        try:
            yield chosen
        finally:
            with self._lock:
                self._reading.pop(read, None)

    def asks_for_names(self) -> bool:
        """Whether a read of replicas, of which none is known, asks who they are; every ten seconds one does."""
        with self._lock:
            now = time.monotonic()
            asks = now >= self._ask_again_at_seconds
            if asks:
                self._ask_again_at_seconds = now + NAMES_ASKED_SECONDS
            return asks

    def _leave_if_overdue(self, now: float) -> None:
        overdue = [read for read, (due, half) in self._reading.items() if due < now and half == self.are_replicas]
        for read in overdue:
            del self._reading[read]
        if overdue:
            self.are_replicas = not self.are_replicas


def is_of_all(error: Exception) -> bool:
    """Whether every node of a cluster would say so now, whoever has what."""
    return type(error).__name__ in _WHOLE_CLUSTER


def asks_others(failed: Sequence[Exception], until: float) -> bool:
    """Whether other nodes may know what these did not say, and there is time to ask them."""
    return bool(failed) and not any(map(is_of_all, failed)) and time.monotonic() < until
