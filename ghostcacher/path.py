"""The path of one prompt, top to bottom: from a forward call to what its cache holds before and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from transformers import Cache

from ghostcacher.adapters import table
from ghostcacher.adapters.base import FingerprintMode, ModelAdapter, UnservedError
from ghostcacher.adapters.calls import Call, continues, has_plain_positions, padding, why_not
from ghostcacher.adapters.full import Row
from ghostcacher.adapters.layers import GrowingLayer
from ghostcacher.config import is_disabled
from ghostcacher.events import CacheReport
from ghostcacher.keys import Namespace, PrefixChain
from ghostcacher.serving import Served, fill
from ghostcacher.session import Expected, Session
from ghostcacher.tiers.stack import TierStack


class Door(Protocol):
    """A way in: one `GhostCache`, or everything inside an ``attach``."""

    store: TierStack
    fingerprint: FingerprintMode

    def session_of(self, cache: Cache, layers: Sequence[GrowingLayer] | None) -> Session | None:
        """The session of ``cache``, made now if it is empty and may be served."""
        ...

    def publish(self, report: CacheReport, replaces: CacheReport | None) -> None:
        """Take the report of one prompt, in place of an earlier one of the same prompt."""
        ...


class OwnDoor(Door, Protocol):
    """A cache that is its own door, and counts what was asked of it between forwards."""

    was_asked: bool
    in_forward: int

    def empty(self) -> None:
        """Drop all state, keeping the layers' kinds."""
        ...


class Path:
    """One call on its way: `walk` answers how many of its columns the cache now holds already."""

    def __init__(self, adapter: ModelAdapter, module: Any, door: Door, own: OwnDoor | None, call: Call) -> None:
        self.adapter = adapter
        self.module = module
        self.door = door
        self.own = own
        self.call = call
        self.started = time.perf_counter()

    def walk(self) -> int:
        """Serve the call, or let it run cold, or note its tokens; how many of its columns need no computing."""
        past = _past(self.call.cache)
        if past and self._goes_on(past):
            return self._continue(past)
        if past and self.own is None:
            return 0
        if self.own is not None and past and growing(self.call.cache) is None:
            self.own.empty()
            past = 0
        reason = self._why_cold()
        layers = None if reason else self.adapter.growing_layers(self.call.cache)
        if reason is None and layers is None:
            reason = f"cache of kind {type(self.call.cache).__name__}"
        session = self.door.session_of(self.call.cache, layers)
        if reason is not None or layers is None or session is None:
            return self._run_cold(session, reason or "cache in use elsewhere", past)
        return self._begin(session, layers, past)

    def _goes_on(self, past: int) -> bool:
        """Whether this call is the next step of what the cache holds, rather than a new prompt.

        A cache of ours answers length 0 between forwards, so that ``generate`` always hands over the whole prompt.
        """
        if self.own is None or (self.call.width == 1 and not self.own.was_asked):
            return True
        said = continues(self.call, past) if self.call.is_tokens else None
        return not self.own.was_asked if said is None else said

    def _why_cold(self) -> str | None:
        if is_disabled():
            return "GHOSTCACHER_DISABLE is set"
        return self.adapter.refusal or why_not(self.call, self.module)

    def _run_cold(self, session: Session | None, reason: str, past: int) -> int:
        if self.own is not None and past:
            self.own.empty()
        if session is not None:
            session.forget()
        self._publish(
            session, CacheReport(_tokens(self.call), 0, "", self._seconds(), 0, f"bypass: {reason}", self.call.rows)
        )
        return 0

    def _begin(self, session: Session, layers: Sequence[GrowingLayer], past: int) -> int:
        pads = padding(self.call, 0)
        if pads is None or not has_plain_positions(self.call, pads, 0):
            return self._run_cold(
                session, "mask with holes or right padding" if pads is None else "custom position_ids", past
            )
        if any(pads) and self.adapter.model_type in table.NOT_IN_PADDED_BATCHES:
            return self._run_cold(session, "padded rows of this model type depend on their padding", past)
        try:
            rows = self._rows(pads)
            have = min(session.shared_columns(rows), past, self.call.width - self.call.kept_logits)
            _cut_all(layers, have)
            served = self._fill(session, layers, rows, have=have, base=0)
        except UnservedError as error:
            return self._run_cold(session, str(error), past)
        except Exception as error:
            _cut_all(layers, 0)
            if session.store.config.strict:
                raise
            return self._run_cold(session, f"internal error ({type(error).__name__}: {error})", past)
        is_lossy = served.lossy or (have > 0 and session.lossy_from is not None)
        session.forget()
        self._expect(session, rows, is_lossy=is_lossy)
        self._publish(session, self._report(rows, served, have, is_lossy=is_lossy))
        return served.columns

    def _continue(self, past: int) -> int:
        layers = growing(self.call.cache)
        session = self.door.session_of(self.call.cache, layers)
        if session is None or layers is None or session.rows is None:
            return 0
        if self.call.width == 1 or self.call.width <= self.call.kept_logits:
            session.note(self.call.input_ids, past, layers)
            return 0
        pads = padding(self.call, past)
        if why_not(self.call, self.module) or pads is None or past != session.columns:
            session.forget()
            return 0
        return self._extend(session, layers, past)

    def _extend(self, session: Session, layers: Sequence[GrowingLayer], past: int) -> int:
        """Several tokens at once after what the cache holds: a chunk of a prompt, or the next turn alone."""
        rows = tuple(
            Row(row.pads, row.chain.extended(ids))
            for row, ids in zip(session.read(), self.call.input_ids.tolist(), strict=True)
        )
        try:
            served = self._fill(session, layers, rows, have=past, base=past)
        except Exception:
            _cut_all(layers, past)
            if session.store.config.strict:
                raise
            served = Served(past, past)
        self._expect(session, rows, is_lossy=served.lossy or session.lossy_from is not None)
        if session.report is not None:
            cached = session.report.cached_tokens + served.columns - past
            update = replace(
                session.report, prompt_tokens=_longest(rows), cached_tokens=cached,
                tier=served.tier or session.report.tier,
                bytes=session.report.bytes + served.size_bytes, seconds=session.report.seconds + self._seconds(),
                reason="hit" if cached else session.report.reason, lossy=session.report.lossy or served.lossy,
            )  # fmt: skip
            self._publish(session, update)
        return served.columns - past

    def _rows(self, pads: tuple[int, ...]) -> tuple[Row, ...]:
        namespace = self.adapter.namespace(self.module, self.door.store.config, self.door.fingerprint)
        return tuple(
            Row(pad, self._chain(ids[pad:], namespace))
            for pad, ids in zip(pads, self.call.input_ids.tolist(), strict=True)
        )

    def _chain(self, ids: list[int], namespace: Namespace) -> PrefixChain:
        return PrefixChain.of(ids, namespace, self.door.store.config.block_tokens)

    def _fill(
        self, session: Session, layers: Sequence[GrowingLayer], rows: Sequence[Row], *, have: int, base: int
    ) -> Served:
        width = base + self.call.width
        shape = self.adapter.shape
        if shape is None:
            return Served(have, have)
        return fill(session.store, shape, layers, rows, have=have, limit=width - self.call.kept_logits, width=width)

    def _expect(self, session: Session, rows: tuple[Row, ...], *, is_lossy: bool) -> None:
        session.expected = Expected(rows, rows[0].columns)
        session.lossy_from = 0 if is_lossy else None

    def _report(self, rows: Sequence[Row], served: Served, have: int, *, is_lossy: bool) -> CacheReport:
        cached = max(0, served.columns - min(row.pads for row in rows))
        tier = "+".join(name for name in ("live" if have else "", served.tier) if name)
        reason = "hit" if cached else "miss: first seen"
        return CacheReport(
            _longest(rows), cached, tier, self._seconds(), served.size_bytes, reason, len(rows), is_lossy
        )

    def _publish(self, session: Session | None, report: CacheReport) -> None:
        earlier = session.report if session is not None and session.expected is not None else None
        if session is not None:
            session.report = report
        self.door.publish(report, earlier)

    def _seconds(self) -> float:
        return time.perf_counter() - self.started


def settle(session: Session, layers: Sequence[GrowingLayer], *, ended_well: bool) -> None:
    """Learn what a forward left in the cache, and hand it to the store."""
    expected, session.expected = session.expected, None
    if expected is None:
        return
    if not ended_well or any(layer.get_seq_length() != expected.columns for layer in layers):
        session.forget()
        return
    session.know(expected.rows)
    session.capture(layers)


def growing(cache: Cache) -> Sequence[GrowingLayer] | None:
    """The layers of ``cache`` if they all grow in place, else None."""
    layers: Sequence[GrowingLayer] = cache.layers
    return layers if layers and all(isinstance(layer, GrowingLayer) for layer in layers) else None


def _cut_all(layers: Sequence[GrowingLayer], columns: int) -> None:
    for layer in layers:
        layer.cut_to(columns)


def _past(cache: Cache) -> int:
    """Columns that the cache holds, whatever it says of itself; 1 for state that has no columns."""
    if layers := growing(cache):
        return min(int(layer.get_seq_length()) for layer in layers)
    for layer in cache.layers:
        if hasattr(layer, "get_seq_length"):
            return int(layer.get_seq_length())
    return int(any(getattr(layer, "has_previous_state", None) and any(_flags(layer)) for layer in cache.layers))


def _flags(layer: Any) -> list[bool]:
    held = layer.has_previous_state
    return [bool(flag) for flag in held] if isinstance(held, list | tuple) else [bool(held)]


def _tokens(call: Call) -> int:
    pads = padding(call, 0) if call.is_tokens else None
    return call.width - min(pads) if pads else call.width


def _longest(rows: Sequence[Row]) -> int:
    return max(len(row.chain) for row in rows)
