"""What one cache object holds: which tokens stand in its columns, and how far they have been stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ghostcacher.adapters.full import FullCapture, Row
from ghostcacher.adapters.layers import GrowingLayer
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
    their device. ``stored_columns`` is how far state was handed to the store.
    """

    store: TierStack
    layout: KVLayout
    model_type: str
    report: CacheReport | None = None
    rows: tuple[Row, ...] | None = None
    noted: list[torch.Tensor] = field(default_factory=list)
    noted_columns: int = 0
    stored_columns: int = 0
    lossy_from: int | None = None
    expected: Expected | None = None

    @property
    def columns(self) -> int:
        """Columns whose tokens are known."""
        return (self.rows[0].columns if self.rows else 0) + self.noted_columns

    def forget(self) -> None:
        """The columns may hold anything from now on."""
        self.rows = None
        self.noted = []
        self.noted_columns = self.stored_columns = 0
        self.lossy_from = None

    def know(self, rows: Sequence[Row]) -> None:
        """The columns hold exactly these rows."""
        self.rows = tuple(rows)
        self.noted = []
        self.noted_columns = 0

    def note(self, ids: torch.Tensor, past: int, layers: Sequence[GrowingLayer]) -> None:
        """``ids`` ``[rows, tokens]`` go into the columns after ``past``. Does not wait for the device.

        Columns that something cut off the cache since (rejected candidates) are forgotten here too. What stands
        before ``past`` has been built upon, so every 16 columns of it are handed to the store.
        """
        if self.rows is None or ids.shape[0] != len(self.rows) or past > self.columns:
            self.forget()
            return
        if past < self.columns:
            self.cut_to(past)
        if past - self.stored_columns >= CAPTURE_STEP_TOKENS:
            self.capture(layers)
        self.noted.append(ids.detach())
        self.noted_columns += ids.shape[1]

    def read(self) -> tuple[Row, ...]:
        """The rows with every noted token read (waits for the device) and known."""
        if self.rows is None:
            return ()
        if self.noted:
            ids = torch.cat(self.noted, dim=1).tolist()
            self.know([Row(row.pads, row.chain.extended(more)) for row, more in zip(self.rows, ids, strict=True)])
        return self.rows or ()

    def cut_to(self, columns: int) -> None:
        """Know only the first ``columns`` columns."""
        rows = self.read()
        self.stored_columns = min(self.stored_columns, columns)
        self.know([Row(min(row.pads, columns), _cut(row.chain, columns - row.pads)) for row in rows])

    def shared_columns(self, rows: Sequence[Row]) -> int:
        """Leading columns that hold exactly what ``rows`` begin with."""
        held = self.read()
        if [row.pads for row in held] != [row.pads for row in rows]:
            return 0
        return min((_shared(old, new) for old, new in zip(held, rows, strict=True)), default=0)

    def capture(self, layers: Sequence[GrowingLayer]) -> None:
        """Hand everything known and not yet stored to the store. Returns at once."""
        if self.rows is None or self.columns <= self.stored_columns:
            return
        is_batch = len(self.rows) > 1
        seen: set[bytes] = set()
        for number, row in enumerate(self.rows):
            if not self.noted and row.chain.tokens in seen:
                continue
            seen.add(row.chain.tokens)
            self.store.submit(self._of_row(layers, number, row, trims_repeats=is_batch), model=self.model_type)
        self.stored_columns = self.columns

    def _of_row(self, layers: Sequence[GrowingLayer], number: int, row: Row, *, trims_repeats: bool) -> FullCapture:
        return FullCapture.of(
            layers, self.layout, number, row.pads, row.chain, tuple(ids[number] for ids in self.noted),
            self.columns - row.pads, first_token=max(0, self.stored_columns - row.pads), lossy_from=self.lossy_from,
            trims_repeats=trims_repeats,
        )  # fmt: skip


def finish(session: Session, layers: Sequence[GrowingLayer]) -> None:
    """Store what a cache object held when it went away."""
    if session.rows is not None and all(layer.get_seq_length() == session.columns for layer in layers):
        session.capture(layers)


def _shared(old: Row, new: Row) -> int:
    if old.chain.namespace != new.chain.namespace:
        return 0
    return new.pads + common_tokens(old.chain.tokens, new.chain.tokens)


def _cut(chain: PrefixChain, tokens: int) -> PrefixChain:
    kept = max(0, tokens)
    keys = tuple(chain.block(index) for index in range(kept // chain.block_tokens))
    return PrefixChain(chain.namespace, chain.run(0, kept), chain.block_tokens, keys)
