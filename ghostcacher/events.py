"""What happened, as records; who listens, as a one-method protocol."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from ghostcacher.units import format_bytes, format_seconds

logger = logging.getLogger("ghostcacher")

EventKind = Literal["hit", "miss", "bypass", "stored", "dropped", "evicted", "rejected", "error"]


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """One thing that happened. ``reason`` is a fixed word or short phrase, never prompt text."""

    kind: EventKind
    reason: str = ""
    tier: str = ""
    tokens: int = 0
    size_bytes: int = 0
    seconds: float = 0.0


class Observer(Protocol):
    """Receives every event, on the thread where it happened. Must be quick; what it raises is logged."""

    def __call__(self, event: CacheEvent, /) -> None:
        """Take one event."""
        ...


def tell(observers: Iterable[Observer], event: CacheEvent) -> None:
    """Hand ``event`` to every observer; one that raises is logged, and has no say in what goes on."""
    for observer in observers:
        try:
            observer(event)
        except Exception:
            logger.exception("an observer failed")


class LogObserver:
    """Writes events to the ``ghostcacher`` logger: the first of each trouble as a warning, the rest as debug."""

    _TROUBLE = frozenset({"bypass", "rejected", "error", "dropped"})

    def __init__(self) -> None:
        self._seen: set[tuple[str, str, str]] = set()

    def __call__(self, event: CacheEvent, /) -> None:
        """Log ``event``; changes only the set of troubles already warned about."""
        identity = (event.kind, event.reason, event.tier)
        is_news = event.kind in self._TROUBLE and identity not in self._seen
        if is_news:
            self._seen.add(identity)
        logger.log(logging.WARNING if is_news else logging.DEBUG, "%s", _sentence(event))


def _sentence(event: CacheEvent) -> str:
    where = f" in tier {event.tier}" if event.tier else ""
    why = f": {event.reason}" if event.reason else ""
    return f"{event.kind}{where}{why}"


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What the cache did for one prompt; ``str()`` is one sentence.

    Token counts are those of the longest row of the batch: a batch saves what its coldest row saves.
    """

    prompt_tokens: int
    cached_tokens: int
    tier: str
    seconds: float
    bytes: int
    reason: str
    rows: int = 1
    lossy: bool = False

    def __str__(self) -> str:
        if not self.cached_tokens:
            return f"reused none of {self.prompt_tokens:,} prompt tokens ({self.reason})"
        rows = f" in each of {self.rows} rows" if self.rows > 1 else ""
        lossy = ", through a lossy codec" if self.lossy else ""
        return (
            f"reused {self.cached_tokens:,} of {self.prompt_tokens:,} prompt tokens{rows} from {self.tier} "
            f"({format_bytes(self.bytes)}) in {format_seconds(self.seconds)}{lossy}"
        )
