"""What a store counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ghostcacher.tiers.base import TierStats


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts of one store since it was opened. ``audited`` are blocks that were computed once more and compared."""

    tiers: tuple[TierStats, ...]
    prompts: int
    hits: int
    prompt_tokens: int
    cached_tokens: int
    bypassed: dict[str, int]
    queued: int
    dropped: int
    failed: int
    healthy: bool
    audited: int = 0
    disproved: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For printing as JSON."""
        return asdict(self)
