"""Filling an empty front of a cache from a store: match, fetch into private buffers, commit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ghostcacher.adapters.capture import Row
from ghostcacher.adapters.landing import Landing
from ghostcacher.adapters.probe import Shape
from ghostcacher.adapters.state import CacheState
from ghostcacher.gate import LEAST_WAIT_SECONDS, Leg, Line, worth_tokens
from ghostcacher.index import Candidate
from ghostcacher.keys import BlockKey
from ghostcacher.tiers.stack import Fetched, TierStack

Floor = Callable[[int], int]
Agree = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Served:
    """What a fill reached: ``columns`` from the front hold the rows' tokens; where the fetched ones came from.

    ``promised`` is how many columns the indexes had said would be there, ``is_declined`` whether some were known but
    not worth loading.
    """

    columns: int
    promised: int
    tier: str = ""
    size_bytes: int = 0
    lossy: bool = False
    is_declined: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """Equal rows, which are looked up and read once."""

    row: Row
    numbers: tuple[int, ...]
    candidates: tuple[Candidate, ...]

    def reach(self, candidates: Sequence[Candidate]) -> int:
        """Columns covered by ``candidates``, a leading run of this plan's."""
        return self.row.pads + (candidates[-1].key.start + candidates[-1].tokens if candidates else 0)

    def missing(self, have: int, target: int) -> list[Candidate]:
        """Candidates that hold any of the columns from ``have`` to ``target``."""
        first, last = have - self.row.pads, target - self.row.pads
        held = [c for c in self.candidates if not c.key.is_snapshot]
        snapshots = [c for c in self.candidates if c.key.is_snapshot]
        return [c for c in held if c.key.start < last and c.key.start + c.tokens > first] + snapshots


def fill(
    store: TierStack, shape: Shape, state: CacheState, rows: Sequence[Row], *, have: int, limit: int, width: int,
    floor: Floor, prefill: Line, agree: Agree | None = None,
) -> Served:  # fmt: skip
    """Make the cache hold the longest known front of ``rows``, at least ``have`` columns and at most ``limit``.

    A batch reaches as far as its coldest row; where layers need snapshots, as far as a length at which every row has
    one. The layers change in one step per attempt, once everything of it is verified; after an exception the caller
    cuts them back. ``width`` is how many columns will be needed, ``floor`` the last column at or before another at
    which the rows may be cut. ``prefill`` is what computing takes, by tokens of all rows: what takes longer to load is
    not loaded, and no tier is waited for longer than that. ``agree`` is asked twice in one attempt, for columns beyond
    ``have``: before fetching and before committing; the least of what all ranks say is what every one does.
    """
    gate = _Gate(store, shape, prefill, width, len(rows))
    if agree is None:  # ranks that waited for each other's claims would wait for themselves
        store.wait_for_flight(rows[0].chain)
    began = time.perf_counter()
    served = _attempt(state, rows, have=have, limit=limit, floor=floor, gate=gate, agree=agree)
    if agree is not None:
        return served
    is_patient = time.perf_counter() - began < (gate.patience_seconds(have) or math.inf) / 2
    if served.columns < served.promised and is_patient:
        # A block went away between match and fetch: replaced by a longer one, perhaps. Once more, from there.
        again = _attempt(state, rows, have=served.columns, limit=limit, floor=floor, gate=gate)
        if again.columns > served.columns:
            tier = "+".join(dict.fromkeys(filter(None, [*served.tier.split("+"), *again.tier.split("+")])))
            size_bytes, lossy = served.size_bytes + again.size_bytes, served.lossy or again.lossy
            return Served(again.columns, again.promised, tier, size_bytes, lossy)
    return served


def _attempt(
    state: CacheState, rows: Sequence[Row], *, have: int, limit: int, floor: Floor, gate: _Gate,
    agree: Agree | None = None,
) -> Served:  # fmt: skip
    store, shape, patience = gate.store, gate.shape, gate.patience_seconds(have)
    plans = _agreed(gate, rows, limit, floor, patience) if state.has_states else _plans(gate, rows, patience)
    target = floor(min([limit, *(plan.reach(plan.candidates) for plan in plans)]))
    known = target
    if target > have:
        worth = gate.worth_columns(plans, have, target, is_whole=state.has_states)
        target = target if worth >= target else floor(worth)
    if agree is not None:
        target = have + agree(max(0, target - have))
    if target <= have:
        return Served(have, have, is_declined=known > have)
    landing = Landing(state, shape, len(rows), have, gate.width)
    wanted: dict[bytes, BlockKey] = {}
    for plan in plans:
        missing = plan.missing(have, target)
        landing.expect(missing, plan.numbers, plan.row.pads)
        wanted.update({c.key.digest: c.key for c in missing})
    try:
        fetched = store.fetch(
            list(wanted.values()), shape.layout, landing.place, timeout_seconds=patience, device=landing.device
        )
    finally:
        landing.settle()
    reached = floor(min(target, *(_reached(plan, fetched, have, target) for plan in plans)))
    if agree is not None:
        reached = have + agree(max(0, reached - have))
    if reached <= have or (state.has_states and reached < target):
        return Served(have, target)
    for number, row in enumerate(rows):
        landing.pad(number, min(row.pads, reached))
    landing.commit(reached)
    store.touch(list(wanted.values()))
    names = set(fetched.sources.values())
    tier = "+".join(tier.name for tier in store.tiers if tier.name in names)
    size_bytes = (reached - have) * shape.layout.token_bytes() + shape.layout.snapshot_bytes(reached)
    return Served(reached, target, tier, size_bytes, bool(fetched.lossy))


@dataclass(frozen=True, slots=True)
class _Gate:
    """What loading is worth for a batch of ``rows`` rows of ``width`` columns."""

    store: TierStack
    shape: Shape
    prefill: Line
    width: int
    rows: int

    def patience_seconds(self, have: int) -> float | None:
        """How long to wait at most: what computing all columns after ``have`` takes; None if that is not known."""
        cold = self.prefill.seconds((self.width - have) * self.rows)
        return None if cold is None else max(cold, LEAST_WAIT_SECONDS)

    def worth_columns(self, plans: Sequence[_Plan], have: int, target: int, *, is_whole: bool) -> int:
        """Up to which column at most ``target`` to load; ``is_whole``: all of it or nothing.

        What several rows have in common is loaded once, the rest one after the other.
        """
        columns, layout = (self.width - have) * self.rows, self.shape.layout
        by_plan = [plan.missing(have, target) for plan in plans]
        every = {c.key.digest: layout.bytes_of(c.key) for missing in by_plan for c in missing}
        worth = []
        for plan, missing in zip(plans, by_plan, strict=True):
            if not missing:
                continue
            share = sum(every.values()) / max(1, sum(layout.bytes_of(c.key) for c in missing))
            legs = [
                replace(
                    leg, end_tokens=(min(target, plan.row.pads + leg.end_tokens) - have) * self.rows,
                    seconds=None if leg.seconds is None else leg.seconds * share,
                )
                for leg in self.store.legs(missing, layout)
            ]  # fmt: skip
            worth.append(have + worth_tokens(_as_one(legs) if is_whole else legs, columns, self.prefill) // self.rows)
        return min(worth, default=target)


def _as_one(legs: Sequence[Leg]) -> list[Leg]:
    seconds = [leg.seconds for leg in legs]
    total = None if None in seconds else sum(each or 0.0 for each in seconds)
    return [Leg("", max(leg.end_tokens for leg in legs), 0, total)] if legs else []


def _plans(gate: _Gate, rows: Sequence[Row], patience: float | None, limit: int | None = None) -> list[_Plan]:
    alike: dict[tuple[int, bytes], list[int]] = {}
    for number, row in enumerate(rows):
        alike.setdefault((row.pads, row.chain.tokens), []).append(number)
    return [_Plan(rows[n[0]], tuple(n), _match(gate.store, rows[n[0]], patience, limit)) for n in alike.values()]


def _match(store: TierStack, row: Row, patience: float | None, limit: int | None) -> tuple[Candidate, ...]:
    if limit is None:
        return store.match(row.chain, timeout_seconds=patience)
    limit_tokens = limit - row.pads
    return store.match(row.chain, limit_tokens=limit_tokens, snapshots=True, timeout_seconds=patience)


def _agreed(gate: _Gate, rows: Sequence[Row], limit: int, floor: Floor, patience: float | None) -> list[_Plan]:
    """Plans that all reach the same column, as state without a token axis needs; the highest such column."""
    while True:
        plans = _plans(gate, rows, patience, limit)
        reaches = {plan.reach(plan.candidates) for plan in plans}
        limit = floor(min(reaches))
        if reaches == {limit}:
            return plans


def _reached(plan: _Plan, fetched: Fetched, have: int, target: int) -> int:
    missing = plan.missing(have, target)
    run = fetched.leading(missing)
    if len(run) == len(missing):
        return target
    return max(have, plan.reach(run)) if run else have
