"""Counters that several threads add to."""

from __future__ import annotations

import threading
from collections import Counter


class Counts:
    """Named integers, added to under one lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        """Add ``amount`` to ``name``."""
        with self._lock:
            self._values[name] += amount

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def beginning(self, prefix: str) -> dict[str, int]:
        """Counters whose name begins with ``prefix``, without it."""
        with self._lock:
            return {name.removeprefix(prefix): n for name, n in self._values.items() if name.startswith(prefix)}
