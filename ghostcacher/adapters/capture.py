"""State of one row of a cache, on its way to the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ghostcacher.adapters.guard import Guard
from ghostcacher.adapters.state import Held, Snapshot
from ghostcacher.blocks import KVBlock, KVLayout, TensorGroup
from ghostcacher.keys import BlockKey, PrefixChain
from ghostcacher.transfers import queued


def always() -> bool:
    """Yes."""
    return True


def at_once() -> None:
    """Nothing to wait for."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch: ``pads`` columns of padding, then the tokens of ``chain``."""

    pads: int
    chain: PrefixChain

    @property
    def columns(self) -> int:
        """Columns that this row fills."""
        return self.pads + len(self.chain)


@dataclass(frozen=True, slots=True)
class Run:
    """A view of one layer's tensor for one row, ``[*spec.shape]``, whose first entry is of token ``start``."""

    tensor: torch.Tensor
    start: int


@dataclass(frozen=True, slots=True, eq=False)
class RowCapture:
    """State of one row, as views of the layers' buffers, to be copied on the writer's thread.

    ``noted`` are decoded token ids not read yet (reading them would wait for the device). ``snapshots`` are copies
    already, by the length after which they are valid. ``follows`` is a scalar that says whether decoded tokens
    were given the positions after the prompt's. ``wait`` returns when a GPU has computed all of this.
    """

    begun: PrefixChain
    noted: tuple[torch.Tensor, ...]
    layout: KVLayout
    runs: tuple[tuple[Run, ...], ...]
    tokens: int
    first_token: int
    snapshots: Mapping[int, tuple[tuple[torch.Tensor, ...], ...]] = field(default_factory=dict)
    lossy_from: int | None = None
    trims_repeats: bool = False
    follows: torch.Tensor | None = None
    guard: Guard | None = None
    is_sound: Callable[[], bool] = always
    wait: Callable[[], None] = at_once

    @classmethod
    def of(
        cls, held: Sequence[Held], layout: KVLayout, number: int, row: Row, noted: tuple[torch.Tensor, ...],
        tokens: int, *, first_token: int = 0, snapshots: Mapping[int, Snapshot] | None = None,
        lossy_from: int | None = None, trims_repeats: bool = False, follows: torch.Tensor | None = None,
        guard: Guard | None = None, is_sound: Callable[[], bool] = always,
    ) -> RowCapture:  # fmt: skip
        """``tokens`` tokens of row ``number`` of what the layers hold, with ``snapshots`` of all rows by column."""
        runs = tuple(
            tuple(_run(group, *held[layer], number, row.pads, tokens) for layer in group.layers)
            for group in layout.groups
        )
        taken = {
            column - row.pads: _of_row(snapshot, layout, number)
            for column, snapshot in (snapshots or {}).items() if column > row.pads
        }  # fmt: skip
        copied = [tensor for snapshot in taken.values() for group in snapshot for tensor in group]
        viewed = [run.tensor for members in runs for run in members]
        return cls(
            row.chain,
            noted,
            layout,
            runs,
            tokens,
            first_token,
            taken,
            lossy_from,
            trims_repeats,
            follows,
            guard,
            is_sound,
            queued(tensor.device for tensor in (*viewed, *copied)),
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of what is to be stored."""
        snapshot_bytes = sum(t.numel() * t.element_size() for s in self.snapshots.values() for g in s for t in g)
        return max(0, self.tokens - self.first_token) * self.layout.token_bytes() + snapshot_bytes

    def chain(self) -> PrefixChain:
        """See `Capture.chain`."""
        if not self.noted:
            return self._held(self.begun)
        ids = torch.cat([ids.reshape(-1) for ids in self.noted]).tolist()
        return self._held(self.begun.extended(_without_repeats(ids) if self.trims_repeats else ids))

    def _held(self, chain: PrefixChain) -> PrefixChain:
        return chain if len(chain) <= self.tokens else chain.cut(self.tokens)

    def keys(self) -> Sequence[BlockKey]:
        """See `Capture.keys`. Reads the decoded token ids, and whether they stand where they were counted.

        None if what it goes on from has turned out to be a lie.
        """
        self.wait()
        if not self.is_sound() or (self.follows is not None and not bool(self.follows)):
            return []
        chain = self.chain()
        end = len(chain)
        blocks = list(chain.covering(self.first_token, end))
        if blocks and blocks[0].start < self.held_from:
            return []  # a window has passed what would have to come first
        return blocks + [chain.snapshot(length) for length in sorted(self.snapshots) if length <= end]

    @property
    def held_from(self) -> int:
        """See `Capture.held_from`."""
        return max((run.start for group in self.runs for run in group), default=0)

    def block(self, key: BlockKey) -> KVBlock:
        """See `Capture.block`."""
        tensors = self._snapshot(key) if key.is_snapshot else self._slices(key)
        lossy = self.lossy_from is not None and key.end > self.lossy_from
        return KVBlock(key, self.layout, tensors, lossy=lossy)

    def _snapshot(self, key: BlockKey) -> tuple[torch.Tensor, ...]:
        return tuple(_stacked(members) for members in self.snapshots[key.end])

    def _slices(self, key: BlockKey) -> tuple[torch.Tensor, ...]:
        if key.start < self.held_from:
            raise ValueError(f"state of token {key.start} is no longer held, only from {self.held_from} on")
        return tuple(
            _stacked([run.tensor.narrow(group.token_axis, key.start - run.start, key.length) for run in members])
            for group, members in zip(self.layout.groups, self.runs, strict=True)
        )  # fmt: skip


def _run(
    group: TensorGroup, tensors: Mapping[str, torch.Tensor], origin: int, number: int, pads: int, tokens: int
) -> Run:
    tensor = tensors[group.spec.name].select(group.spec.batch_axis, number)
    start = max(0, origin - pads)
    return Run(tensor.narrow(group.token_axis, pads + start - origin, max(0, tokens - start)), start)


def _of_row(snapshot: Snapshot, layout: KVLayout, number: int) -> tuple[tuple[torch.Tensor, ...], ...]:
    return tuple(
        tuple(_member(snapshot[layer], group, number) for layer in group.layers) for group in layout.snapshot_groups
    )


def _member(held: Mapping[str, torch.Tensor], group: TensorGroup, number: int) -> torch.Tensor:
    tensor = held.get(group.spec.name)
    if tensor is None:
        return torch.empty(group.spec.sized(0), dtype=group.spec.torch_dtype)
    return tensor.select(group.spec.batch_axis, number)


def _stacked(members: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([member.to(members[0].device) for member in members])


def _without_repeats(ids: list[int]) -> list[int]:
    end = len(ids)
    while end > 1 and ids[end - 1] == ids[end - 2]:
        end -= 1
    return ids[:end]
