"""The path of one prompt, top to bottom: from a forward call to what its cache holds before and after."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ghostcacher.adapters.base import ModelAdapter
from ghostcacher.adapters.calls import Call, continues, goes_on, has_plain_positions, padding, why_not
from ghostcacher.adapters.capture import Row
from ghostcacher.adapters.media import media_of
from ghostcacher.adapters.positions import last_positions
from ghostcacher.adapters.ranks import Votes
from ghostcacher.adapters.rerun import recomputed
from ghostcacher.adapters.state import past_of
from ghostcacher.adapters.unserved import UnservedError
from ghostcacher.config import is_disabled
from ghostcacher.doors import Door, OwnDoor
from ghostcacher.events import CacheReport
from ghostcacher.keys import Namespace, PrefixChain
from ghostcacher.pieces import Pieces, pays
from ghostcacher.serving import Served, fill
from ghostcacher.session import Expected, Session


class Path:
    """One call on its way: `walk` answers how many of its columns the cache now holds already."""

    def __init__(
        self, adapter: ModelAdapter, module: Any, door: Door, own: OwnDoor | None, call: Call,
        votes: Votes | None = None,
    ) -> None:  # fmt: skip
        self.adapter = adapter
        self.module = module
        self.door = door
        self.own = own
        self.call = call
        self.votes = votes
        self.started = time.perf_counter()
        self.shared_columns: int | None = None
        self.base: int | None = None

    def walk(self, session: Session | None) -> int:
        """Serve the call, or let it run cold, or note its tokens; how many of its columns need no computing.

        ``session`` is that of the call's cache, if it has one.
        """
        past = self.base = session.past if session is not None else past_of(self.call.cache)
        if past:
            self.base = None
            self.base = past if self._goes_on(past) else 0
        if past and self.base:
            return self._continue(session, past)
        if past and self.own is None:
            return 0
        if self.own is not None and past and (session is None or session.rows is None):
            self.own.empty()
            past = 0
        reason = self._why_cold()
        state = None if reason else self.adapter.state_of(self.call.cache)
        if reason is None and state is None:
            reason = f"cache of kind {type(self.call.cache).__name__}"
        session = self.door.session_of(self.call.cache, state)
        if reason is not None or session is None:
            return self._run_cold(session, reason or "cache in use elsewhere", past)
        return self._begin(session, past)

    def _goes_on(self, past: int) -> bool:
        """Whether this call is the next step of what the cache holds, rather than a new prompt.

        A cache of ours answers length 0 between forwards, so that ``generate`` always hands over the whole prompt.
        """
        if self.own is not None and self.call.arguments.get("use_cache") is False:
            return False
        if self.own is None or (self.call.width == 1 and not self.own.was_asked):
            return True
        said = continues(self.call, past) if self.call.is_tokens else None
        return not self.own.was_asked if said is None else said

    def _why_cold(self) -> str | None:
        if is_disabled():
            return "GHOSTCACHER_DISABLE is set"
        return self.adapter.refusal or self._why_not()

    def _why_not(self) -> str | None:
        return why_not(self.call, self.module, takes_images=self.adapter.takes_images)

    def _run_cold(self, session: Session | None, reason: str, past: int) -> int:
        if self.own is not None and past:
            self.own.empty()
        if session is not None:
            session.forget()
        self.publish(
            session, CacheReport(_tokens(self.call), 0, "", self.seconds(), 0, f"bypass: {reason}", self.call.rows)
        )
        return 0

    def _begin(self, session: Session, past: int) -> int:
        pads = padding(self.call, 0)
        if pads is None:
            return self._run_cold(session, "mask with holes or right padding", past)
        try:
            self._read_media()
            if reason := self._why_unserved(pads):
                return self._run_cold(session, reason, past)
            rows = self._rows(pads)
            have = self._keep(session, rows, past)
            served = self._fill(session, rows, have=have, base=0)
            is_lossy = served.lossy or (have > 0 and session.lossy_from is not None)
            session.forget()
            session.storable_columns = self._storable_columns(session, rows)
            session.known_columns = self.shared_columns
            session.is_current = self._currency(rows)
            is_replayable = session.store.has_budget and not self.call.media and self.shared_columns is None
            session.guard = self.adapter.guard(self.module) if is_replayable else None
            session.is_sound = session.store.auditing.belief()
            session.last_positions = last_positions(self.call.arguments.get("position_ids"))
            self._expect(session, rows, is_lossy=is_lossy)
            columns = self._run_pieces(session, rows, served.columns, base=0)
        except UnservedError as error:
            return self._run_cold(session, str(error), past)
        except Exception as error:
            session.state.empty()
            if session.store.config.strict:
                raise
            return self._run_cold(session, f"internal error ({type(error).__name__}: {error})", past)
        self.publish(session, self._report(rows, served, have, is_lossy=is_lossy))
        if served.columns > have and session.store.auditing.wants():
            self._audit(session, rows[0], served.columns)
        if not session.state.needs_pieces:
            session.prefilling = (time.perf_counter(), (self.call.width - columns) * self.call.rows)
        return columns

    def _audit(self, session: Session, row: Row, columns: int) -> None:
        """Have what was served of ``row`` computed again, if that can be done beside others."""
        guard = None if self.call.media or self.shared_columns is not None else self.adapter.guard(self.module)
        if guard is not None:
            chain = row.chain.cut(columns - row.pads)
            session.store.auditing.audit(chain, lambda: recomputed(guard, chain))

    def _read_media(self) -> None:
        media = media_of(self.call.arguments, self.call.input_ids, self.module.config)
        self.call = replace(self.call, media=media)

    def _storable_columns(self, session: Session, rows: Sequence[Row]) -> int | None:
        limits = [self.adapter.storable_columns(_longest(rows), min(row.pads for row in rows)), self.shared_columns]
        if session.state.is_static:
            limits.append(self.call.width)
        return min((limit for limit in limits if limit is not None), default=None)

    def _why_unserved(self, pads: tuple[int, ...]) -> str | None:
        if not has_plain_positions(self.call, pads, 0):
            return "custom position_ids"
        if any(pads) and self.call.arguments.get("position_ids") is None and self.adapter.reader.takes_positions:
            return "padding without position_ids"
        if not self.adapter.reader.is_positioned(self.call):
            return "no position_ids, and the model would go on from those of an earlier call"
        if any(pads) and not self.adapter.serves_padding:
            return "padded rows of this model type depend on their padding"
        if len(set(pads)) > 1 and self.adapter.has_states:
            return "rows of unequal length, and state that is valid at one length only"
        return None

    def _keep(self, session: Session, rows: Sequence[Row], past: int) -> int:
        """Cut what the cache holds back to what ``rows`` begin with; how many columns are left."""
        if past and session.rows is not None and session.is_current() and session.state.is_at(session.columns):
            session.capture(is_last=True)
        shared = 0 if self.votes else session.shared_columns(rows)  # other ranks may hold less of it
        have = self._floor(min(shared, past, self._limit(0)))
        return session.state.cut_to(have, held=past)

    def _continue(self, session: Session | None, past: int) -> int:
        if session is None or session.rows is None:
            return 0
        takes_images = self.adapter.takes_images
        is_plain = self.adapter.reader.is_positioned(self.call)
        if not is_plain or not goes_on(self.call, self.module, takes_images=takes_images):
            session.forget()
            return 0
        if session.prefilling is not None and self.call.width == 1:
            began, tokens = session.prefilling
            int(self.call.input_ids[0, 0])  # its device has come so far, once for each prompt
            self.adapter.prefill.add_usual(tokens, time.perf_counter() - began)
        session.prefilling = None
        if self.call.width == 1 or self.call.width <= self.call.kept_logits:
            session.note(self.call.input_ids, past, self.call.arguments.get("position_ids"))
            return 0
        pads = padding(self.call, past)
        is_known = pads is not None and past == session.columns and session.known_columns is None
        is_known = is_known and session.is_current() and len(session.read()) == self.call.rows
        if not is_known or self._why_not() or not has_plain_positions(self.call, pads or (), past):
            session.forget()
            return 0
        return self._extend(session, past)

    def _extend(self, session: Session, past: int) -> int:
        """Several tokens at once after what the cache holds: a chunk of a prompt, or the next turn alone."""
        rows = tuple(
            Row(row.pads, row.chain.extended(ids))
            for row, ids in zip(session.read(), self.call.input_ids.tolist(), strict=True)
        )
        try:
            served = self._fill(session, rows, have=past, base=past)
        except Exception:
            if session.state.cut_to(past, held=session.past) != past or session.store.config.strict:
                raise
            served = Served(past, past)
        self._expect(session, rows, is_lossy=served.lossy or session.lossy_from is not None)
        session.last_positions = last_positions(self.call.arguments.get("position_ids"))
        reached = self._run_pieces(session, rows, served.columns, base=past)
        if session.report is not None:
            cached = session.report.cached_tokens + served.columns - past
            update = replace(
                session.report, prompt_tokens=_longest(rows), cached_tokens=cached,
                tier=served.tier or session.report.tier,
                bytes=session.report.bytes + served.size_bytes, seconds=session.report.seconds + self.seconds(),
                reason="hit" if cached else session.report.reason, lossy=session.report.lossy or served.lossy,
            )  # fmt: skip
            self.publish(session, update, replaces=session.report)
        return reached - past

    def _run_pieces(self, session: Session, rows: Sequence[Row], reached: int, *, base: int) -> int:
        limit, boundaries = self._limit(base), self.door.boundaries
        pieces = Pieces(self.adapter, self.module, self.call, boundaries, limit, self._floor)
        return pieces.run(session, rows, reached, base=base)

    def _limit(self, base: int) -> int:
        """Columns that may come from elsewhere: enough must be left for the logits that are wanted."""
        limit = base + self.call.width - max(self.call.kept_logits, self.adapter.tokens_left)
        return limit if self.shared_columns is None else min(limit, self.shared_columns)

    def _rows(self, pads: tuple[int, ...]) -> tuple[Row, ...]:
        longest = self.call.width - min(pads)
        config, mode = self.door.store.config, self.door.fingerprint
        identity = self.adapter.identify(self.module, config, mode, longest)
        self.shared_columns = identity.shared_columns(self.call.width, self.call.rows)
        return tuple(
            Row(pad, self._chain(ids[pad:], identity.namespace))
            for pad, ids in zip(pads, self._keyed_ids(), strict=True)
        )

    def _currency(self, rows: Sequence[Row]) -> Callable[[], bool]:
        """Answers whether the model still is what it was when this prompt began, as far as a sample shows."""
        adapter, module, longest = self.adapter, weakref.ref(self.module), _longest(rows)
        config, namespace = self.door.store.config, rows[0].chain.namespace

        def is_current() -> bool:
            found = module()
            try:
                return found is None or adapter.identify(found, config, "sampled", longest).namespace == namespace
            except Exception:  # noqa: BLE001 (whatever keeps it from being told, what is not told is not stored)
                return False

        return is_current

    def _keyed_ids(self) -> list[list[int]]:
        ids: list[list[int]] = self.call.input_ids.tolist()
        return self.call.media.keyed(ids) if self.call.media else ids

    def _floor(self, column: int) -> int:
        """The last column at or before ``column`` at which the call may be cut."""
        return self.call.media.floor(column) if self.call.media else column

    def _chain(self, ids: list[int], namespace: Namespace) -> PrefixChain:
        return PrefixChain.of(ids, namespace, self.door.store.config.block_tokens)

    def _fill(self, session: Session, rows: Sequence[Row], *, have: int, base: int) -> Served:
        width, shape = base + self.call.width, self.adapter.shape
        if shape is None or (have and session.state.is_static):
            return Served(have, have)
        limit = self._limit(base)
        served = fill(
            session.store, shape, session.state, rows, have=have, limit=limit, width=width, floor=self._floor,
            prefill=self.adapter.prefill, agree=self.votes.least if self.votes else None,
        )  # fmt: skip
        if base == 0 and self.adapter.goes_one_at_a_time and not pays(served.columns, width):
            session.state.empty()
            return Served(0, 0)
        return served

    def _expect(self, session: Session, rows: tuple[Row, ...], *, is_lossy: bool) -> None:
        session.expected = Expected(rows, rows[0].columns)
        session.lossy_from = 0 if is_lossy else None

    def _report(self, rows: Sequence[Row], served: Served, have: int, *, is_lossy: bool) -> CacheReport:
        cached = max(0, served.columns - min(row.pads for row in rows))
        tier = "+".join(name for name in ("live" if have else "", served.tier) if name)
        miss = "miss: slower to load than to compute" if served.is_declined else "miss: first seen"
        reason = "hit" if cached else miss
        return CacheReport(_longest(rows), cached, tier, self.seconds(), served.size_bytes, reason, len(rows), is_lossy)

    def publish(self, session: Session | None, report: CacheReport, replaces: CacheReport | None = None) -> None:
        """Hand its report to the door, in place of an earlier one; who listens has no say in the answer."""
        if session is not None:
            session.report = report
        try:
            self.door.publish(report, replaces)
        except Exception:
            if self.door.store.config.strict:
                raise

    def seconds(self) -> float:
        """Since the call came in."""
        return time.perf_counter() - self.started


def _tokens(call: Call) -> int:
    pads = padding(call, 0) if call.is_tokens else None
    return call.width - min(pads) if pads else call.width


def _longest(rows: Sequence[Row]) -> int:
    return max(len(row.chain) for row in rows)
