"""What one cache object holds: which tokens stand in its columns, and how far they have been stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ghostcacher.adapters.capture import Row, RowCapture, always
from ghostcacher.adapters.guard import Guard
from ghostcacher.adapters.positions import follow, last_positions
from ghostcacher.adapters.state import CacheState, Held, Snapshot
from ghostcacher.blocks import KVLayout
from ghostcacher.events import CacheReport
from ghostcacher.keys import PrefixChain, common_tokens
from ghostcacher.tiers.stack import TierStack

CAPTURE_STEP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Expected:
    """What the columns hold if the forward that is running ends well."""

    rows: tuple[Row, ...]
    columns: int


@dataclass(slots=True)
class Session:
    """One cache object in one store. ``rows`` is None while what the columns hold is not known.

    ``rows`` are the tokens read so far; ``noted`` are the ids of later columns, ``[rows, tokens]`` each, still on
    their device. ``stored_columns`` is how far state was handed to the store, ``storable_columns`` how far it may be
    at all (None: everywhere). ``known_columns`` is how far the columns are what their tokens say (None: everywhere):
    later ones were computed with adapters that set in there. ``snapshots`` are copies by column that wait to be
    stored, ``wanted_columns`` is where more are wanted. ``last_positions`` are the positions of the last column, and
    ``follows`` is whether those of later steps went on from them: a scalar on their device. ``is_current`` asks whether
    the model still is what it was when the prompt began. ``guard`` runs it again, for tiers that have a budget.
    ``is_sound`` asks whether what was restored is still believed. ``prefilling`` is when the prompt's own forward
    began, and how many tokens it computes: its end shows when the next step begins, whatever the device.
    """

    store: TierStack
    layout: KVLayout
    state: CacheState
    model_type: str
    is_own: bool = True
    report: CacheReport | None = None
    rows: tuple[Row, ...] | None = None
    noted: list[torch.Tensor] = field(default_factory=list)
    noted_columns: int = 0
    stored_columns: int = 0
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    wanted_columns: Sequence[int] = ()
    storable_columns: int | None = None
    known_columns: int | None = None
    lossy_from: int | None = None
    last_positions: torch.Tensor | None = None
    follows: torch.Tensor | None = None
    is_current: Callable[[], bool] = always
    guard: Guard | None = None
    is_sound: Callable[[], bool] = always
    prefilling: tuple[float, int] | None = None
    expected: Expected | None = None
    is_running_pieces: bool = False

    @property
    def columns(self) -> int:
        """Columns whose tokens are known."""
        return (self.rows[0].columns if self.rows else 0) + self.noted_columns

    @property
    def past(self) -> int:
        """Columns that the layers hold, by their own count or, if none counts, by what was noted."""
        counted = self.state.columns()
        if counted is not None:
            return counted
        return 0 if self.state.is_empty else max(1, self.columns)

    def forget(self) -> None:
        """The columns may hold anything from now on, and nothing is expected of them."""
        self.rows = self.expected = None
        self.noted = []
        self.noted_columns = self.stored_columns = 0
        self.snapshots = {}
        self.lossy_from = self.storable_columns = self.known_columns = None
        self.last_positions = self.follows = self.prefilling = None

    def know(self, rows: Sequence[Row]) -> None:
        """The columns hold exactly these rows."""
        self.rows = tuple(rows)
        self.noted = []
        self.noted_columns = 0

    def note(self, ids: torch.Tensor, past: int, positions: torch.Tensor | None = None) -> None:
        """``ids`` ``[rows, tokens]`` at ``positions`` go into the columns after ``past``. Does not wait for the device.

        Columns that something cut off the cache since (rejected candidates) are forgotten here too. What stands
        before ``past`` has been built upon, so every 16 columns of it are handed to the store.
        """
        if self.rows is None or ids.shape[0] != len(self.rows) or past > self.columns or self.may_be_reordered():
            self.forget()
            return
        self.state.forget_inputs()
        if past < self.columns:
            self.cut_to(past)
        if past - self.stored_columns >= CAPTURE_STEP_TOKENS:
            if not self.is_current():
                self.forget()
                return
            self.capture()
        self._follow(positions, past)
        self.noted.append(ids.detach())
        self.noted_columns += ids.shape[1]

    def read(self) -> tuple[Row, ...]:
        """The rows with every noted token read (waits for the device) and known."""
        if self.rows is not None and self.follows is not None and not bool(self.follows):
            self.forget()
        if self.rows is None:
            return ()
        if self.noted:
            ids = torch.cat(self.noted, dim=1).tolist()
            self.know([Row(row.pads, row.chain.extended(more)) for row, more in zip(self.rows, ids, strict=True)])
        return self.rows or ()

    def cut_to(self, columns: int) -> None:
        """Know only the first ``columns`` columns."""
        removed, rows = self.columns - columns, self.read()
        if not rows:
            return
        if self.last_positions is not None:
            self.last_positions = self.last_positions - removed
        self.stored_columns = min(self.stored_columns, columns)
        self.snapshots = {column: taken for column, taken in self.snapshots.items() if column <= columns}
        self.know([Row(min(row.pads, columns), _cut(row.chain, columns - row.pads)) for row in rows])

    def _follow(self, positions: torch.Tensor | None, past: int) -> None:
        if positions is None or self.rows is None:
            return
        last = self.last_positions
        if last is None:
            last = torch.tensor([[[past - 1 - row.pads] for row in self.rows]], device=positions.device)
        follows = follow(positions, last)
        self.follows = follows if self.follows is None else self.follows & follows
        self.last_positions = last_positions(positions)

    def shared_columns(self, rows: Sequence[Row]) -> int:
        """Leading columns that hold exactly what ``rows`` begin with, and are still believed."""
        held = self.read() if self.is_sound() else ()
        if not held or [row.pads for row in held] != [row.pads for row in rows]:
            return 0
        shared = min((_shared(old, new) for old, new in zip(held, rows, strict=True)), default=0)
        return shared if self.known_columns is None else min(shared, self.known_columns)

    def may_be_reordered(self) -> bool:
        """Whether rows may have changed places unseen: those of a cache that is not ours, as beams do every step."""
        return not self.is_own and self.rows is not None and len(self.rows) > 1

    def take_snapshot(self, column: int) -> None:
        """The layers stand at ``column`` now: copy their state without a token axis, to be stored later."""
        taken = self.state.snapshot()
        if taken is not None:
            self.snapshots[column] = taken

    def capture(self, *, is_last: bool = False) -> None:
        """Hand everything known and not yet stored to the store. Returns at once.

        ``is_last``: nothing more is to come, so that the state without a token axis is worth storing as it is.
        """
        end = self.columns if self.storable_columns is None else min(self.columns, self.storable_columns)
        if self.rows is None or (end <= self.stored_columns and not (is_last and self.state.has_states)):
            return
        if self.state.has_states:
            self._add_snapshots(end, is_last=is_last)
        held, is_batch = self.state.frozen(), len(self.rows) > 1
        seen: set[bytes] = set()
        for number, row in enumerate(self.rows):
            if not self.noted and row.chain.tokens in seen:
                continue
            seen.add(row.chain.tokens)
            self.store.submit(self._of_row(held, number, row, end, trims_repeats=is_batch), model=self.model_type)
        self.stored_columns = end
        self.snapshots = {}
        self.state.let_go(min(row.pads + self._whole(end - row.pads) for row in self.rows))

    def _add_snapshots(self, end: int, *, is_last: bool) -> None:
        if is_last and end == self.columns:
            self.take_snapshot(end)
        if self.rows and not self.state.needs_pieces:
            ends = {column for row in self.rows for column in self._whole_ends(row, end)}
            for column in ends.union(column for column in self.wanted_columns if column <= end) - self.snapshots.keys():
                taken = self.state.snapshot(self.columns - column)
                if taken is not None:
                    self.snapshots[column] = taken
            self.wanted_columns = ()

    def _whole_ends(self, row: Row, end: int) -> range:
        """Columns where whole blocks of ``row`` end that have not been stored."""
        size = self.store.config.block_tokens
        first = max(0, self.stored_columns - row.pads) // size * size + size
        return range(row.pads + first, end + 1, size)

    def _whole(self, tokens: int) -> int:
        size = self.store.config.block_tokens
        return max(0, tokens) // size * size

    def _of_row(self, held: Sequence[Held], number: int, row: Row, end: int, *, trims_repeats: bool) -> RowCapture:
        return RowCapture.of(
            held, self.layout, number, row, tuple(ids[number] for ids in self.noted), max(0, end - row.pads),
            first_token=max(0, self.stored_columns - row.pads), snapshots=self.snapshots, lossy_from=self.lossy_from,
            trims_repeats=trims_repeats, follows=self.follows, guard=self.guard, is_sound=self.is_sound,
        )  # fmt: skip


def finish(session: Session) -> None:
    """Store what a cache object held when it went away."""
    is_known = session.rows is not None and not session.may_be_reordered() and session.is_current()
    if is_known and session.state.is_at(session.columns):
        session.capture(is_last=True)


def _shared(old: Row, new: Row) -> int:
    if old.chain.namespace != new.chain.namespace:
        return 0
    return new.pads + common_tokens(old.chain.tokens, new.chain.tokens)


def _cut(chain: PrefixChain, tokens: int) -> PrefixChain:
    return chain.cut(max(0, tokens))


def settle(session: Session, *, ended_well: bool) -> None:
    """Learn what a forward left in the cache, and hand it to the store."""
    expected, session.expected = session.expected, None
    if expected is None:
        return
    if not ended_well or not session.state.is_at(expected.columns):
        session.forget()
        return
    session.know(expected.rows)
    session.capture()
