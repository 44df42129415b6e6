"""Prompts in pieces: models whose state is valid at one length only are stopped where a snapshot is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from ghostcacher.adapters.base import ModelAdapter
from ghostcacher.adapters.calls import Call
from ghostcacher.adapters.capture import Row
from ghostcacher.serving import Floor
from ghostcacher.session import Session

STEP_COST_TOKENS = 8
"""What a forward of one token is taken to cost, in tokens of a long one: an estimate on the safe side, not measured."""

SNAPSHOT_STEP_TOKENS = 16
"""Lengths at which prompts part are rounded down to this, as remote stores are asked for its multiples only."""


class Pieces:
    """The pieces of one call. ``limit`` is how far state may come from elsewhere, ``floor`` where rows may be cut."""

    def __init__(
        self, adapter: ModelAdapter, module: Any, call: Call, boundaries: Sequence[int], limit: int, floor: Floor
    ) -> None:
        self.adapter = adapter
        self.module = module
        self.call = call
        self.boundaries = boundaries
        self.limit = limit
        self.floor = floor

    def run(self, session: Session, rows: Sequence[Row], reached: int, *, base: int) -> int:
        """Run the prompt up to where snapshots are wanted, and take them; how far the cache then is.

        The cache holds ``base`` columns before this call's, and ``reached`` by now. Convolutional states can be told
        afterwards: for them no piece is run, what is wanted is noted.
        """
        if not session.state.has_states:
            return reached
        stops = self._stops(session, rows, reached, base + self.call.width)
        if not session.state.needs_pieces:
            session.wanted_columns = stops
            return reached
        for column in stops:
            self._run_piece(session, reached - base, column - base)
            session.take_snapshot(column)
            reached = column
        if self.adapter.goes_one_at_a_time and reached:
            last = base + self.call.width - 1
            for column in range(reached, last):
                self._run_piece(session, column - base, column + 1 - base)
            return last
        return reached

    def _stops(self, session: Session, rows: Sequence[Row], reached: int, width: int) -> list[int]:
        row = rows[0]
        block_tokens = session.store.config.block_tokens
        known = min(session.store.known_tokens(each.chain) for each in rows)
        lengths = {known // SNAPSHOT_STEP_TOKENS * SNAPSHOT_STEP_TOKENS, *self.boundaries}
        lengths.add((len(row.chain) - 1) // block_tokens * block_tokens)
        columns = {self.floor(row.pads + n) for n in lengths if 0 < n <= self.limit - row.pads}
        stops = sorted(column for column in columns if reached < column <= self.limit)
        if self.adapter.goes_one_at_a_time:
            # Only a forward from the first token may be long; what follows it must be short enough to pay.
            return [] if reached else [stop for stop in stops if pays(stop, width)][-1:]
        least = self.adapter.tokens_left
        return [stop for before, stop in pairwise([reached, *stops]) if stop - before >= least]

    def _run_piece(self, session: Session, first: int, last: int) -> None:
        session.is_running_pieces = True
        try:
            with torch.no_grad():
                self.module(**{**self.call.piece(first, last), **self.adapter.reader.last_logits})
        finally:
            session.is_running_pieces = False


def pays(reached: int, width: int) -> bool:
    """Whether ``width`` - ``reached`` single steps cost less than computing everything at once."""
    return (width - reached) * STEP_COST_TOKENS <= width
