"""Rotary positions whose frequencies depend on how long the sequence is.

`dynamic` grows its frequencies beyond the trained length and keeps them: keys there depend on every prompt before.
`longrope` has two sets of frequencies and chooses by the total length. All other types give a token the same key
whatever follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ghostcacher.adapters.unserved import UnservedError


@dataclass(frozen=True, slots=True)
class RopeRule:
    """Up to ``limit_tokens`` keys are a function of the prefix; beyond, ``rope_type`` decides."""

    rope_type: str
    limit_tokens: int

    def regime(self, tokens: int) -> str:
        """Which frequencies a prompt of ``tokens`` tokens is computed with: part of the namespace.

        Raises:
            UnservedError: they depend on earlier prompts.
        """
        if tokens <= self.limit_tokens:
            return "short"
        if self.rope_type == "dynamic":
            raise UnservedError(f"rope type 'dynamic' beyond {self.limit_tokens} tokens depends on earlier prompts")
        return "long"

    def storable_tokens(self, tokens: int) -> int | None:
        """How far the state of a prompt of ``tokens`` tokens, and what is generated after it, may be stored."""
        return self.limit_tokens if tokens <= self.limit_tokens else None


def rope_rule(config: Any) -> RopeRule | None:
    """The rule of a text config, or None if its keys never depend on what follows."""
    rules = [
        RopeRule(rope_type, _limit(config, parameters, rope_type))
        for parameters in _parameters(config)
        if (rope_type := str(parameters.get("rope_type", "default"))) in {"dynamic", "longrope"}
    ]
    return min(rules, key=lambda rule: (rule.rope_type, rule.limit_tokens), default=None)


def is_frequencies(buffer_name: str) -> bool:
    """Whether a buffer holds the frequencies in use, which such types change in a forward."""
    return buffer_name.endswith("inv_freq") and not buffer_name.endswith("original_inv_freq")


def _parameters(config: Any) -> Iterator[dict[str, Any]]:
    given = getattr(config, "rope_parameters", None) or {}
    yield given
    yield from (value for value in given.values() if isinstance(value, dict))


def _limit(config: Any, parameters: dict[str, Any], rope_type: str) -> int:
    if rope_type == "dynamic":
        # At exactly this length the model neither grows nor resets its frequencies.
        return int(config.max_position_embeddings) - 1
    original = parameters.get("original_max_position_embeddings")
    return int(original or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)
