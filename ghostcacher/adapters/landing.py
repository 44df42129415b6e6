"""Private buffers that take restored state and become the layers' own only when everything has arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ghostcacher.adapters.layers import room_for
from ghostcacher.adapters.memory import empty
from ghostcacher.adapters.probe import Shape
from ghostcacher.adapters.state import CacheState
from ghostcacher.blocks import CPU, KVBlock, TensorGroup
from ghostcacher.index import Candidate
from ghostcacher.transfers import Sending, note_use, staged


@dataclass(frozen=True, slots=True)
class _Target:
    rows: tuple[int, ...]
    pads: int
    tokens: int


@dataclass(slots=True)
class _Buffer:
    """One tensor of one layer, ``[rows, *spec.shape]``; its token axis begins at column ``origin``."""

    tensor: torch.Tensor
    origin: int = 0


@dataclass(slots=True)
class _Slab:
    """Layers of one group, kind and device; ``members`` are places within the group.

    ``stack`` is ``[members, rows, *spec.shape]`` if the layers share a buffer, so that a block is placed by one copy.
    """

    number: int
    group: TensorGroup
    members: list[int]
    device: torch.device
    stack: torch.Tensor | None = None
    buffers: list[_Buffer] = field(default_factory=list)


class Landing:
    """Takes blocks and snapshots for the columns after ``have``; `commit` shows them to the layers."""

    def __init__(self, state: CacheState, shape: Shape, rows: int, have: int, columns: int) -> None:
        """Room for ``columns`` columns of ``rows`` rows, of which the layers already hold ``have``."""
        self._state = state
        self._shape = shape
        self._rows = rows
        self._have = have
        self._targets: dict[bytes, list[_Target]] = {}
        self._states: dict[tuple[int, str], torch.Tensor] = {}
        self._sending = Sending()
        self._slabs = self._split()
        if have:
            self._continue_in_own(columns)
        else:
            self._share(columns)

    @property
    def device(self) -> torch.device:
        """Where most of what is placed goes: the layers' device if they share one, else the CPU."""
        devices = {slab.device for slab in self._slabs}
        return devices.pop() if len(devices) == 1 else CPU

    def expect(self, candidates: Sequence[Candidate], rows: tuple[int, ...], pads: int) -> None:
        """What `place` will be given for ``rows``, which begin after ``pads`` columns of padding."""
        for candidate in candidates:
            key = candidate.key
            self._targets.setdefault(key.digest, []).append(_Target(rows, pads, candidate.tokens))
            if key.is_snapshot:
                self._make_states(key.end)

    def pad(self, row: int, columns: int) -> None:
        """Fill a row's padding with zeros: attention gives it no weight, but it must be finite."""
        for slab in self._slabs:
            for buffer in slab.buffers:
                begin, end = max(self._have, buffer.origin), columns
                if end > begin:
                    buffer.tensor[row].narrow(slab.group.token_axis, begin - buffer.origin, end - begin).zero_()

    def place(self, block: KVBlock) -> None:
        """Copy a verified block to where it is expected. Distinct blocks may be placed on several threads."""
        for target in self._targets[block.key.digest]:
            if block.key.is_snapshot:
                self._place_states(block, target)
                continue
            skip = max(0, self._have - target.pads - block.key.start)
            if skip < target.tokens:
                for slab in self._slabs:
                    self._copy(slab, block, target, skip)

    def settle(self) -> None:
        """Wait until all that was placed has arrived: copies to a GPU are queued, on the streams of those threads."""
        self._sending.settle()

    def commit(self, columns: int) -> None:
        """Let the layers show the first ``columns`` columns. Nothing before this call changes what they show."""
        self.settle()
        shown: dict[int, dict[str, _Buffer]] = {}
        for slab in self._slabs:
            for place, buffer in zip(slab.members, slab.buffers, strict=True):
                shown.setdefault(slab.group.layers[place], {})[slab.group.spec.name] = buffer
        axes = {spec.name: spec.batch_axis for layer in self._shape.layout.layers for spec in layer.tensors}
        for number, (kind, layer) in enumerate(self._state.pairs()):
            buffers = shown.get(number)
            if kind.slices and buffers:
                tensors = {name: buffer.tensor.movedim(0, axes[name]) for name, buffer in buffers.items()}
                kind.slices.show(layer, tensors, columns, origin=next(iter(buffers.values())).origin)
            states = {name: tensor for (owner, name), tensor in self._states.items() if owner == number}
            if kind.states and states:
                kind.states.restore(layer, states, columns)

    def _split(self) -> list[_Slab]:
        slabs: dict[tuple[object, ...], _Slab] = {}
        for number, group in enumerate(self._shape.layout.groups):
            for place, layer in enumerate(group.layers):
                device, kind = self._shape.devices[layer], self._shape.kinds[layer].name
                slab = slabs.setdefault((number, kind, device), _Slab(number, group, [], device))
                slab.members.append(place)
        return list(slabs.values())

    def _share(self, columns: int) -> None:
        for slab in self._slabs:
            room = slab.group.spec.sized(room_for(columns))
            slab.stack = empty((len(slab.members), self._rows, *room), slab.group.spec.torch_dtype, slab.device)
            slab.buffers = [_Buffer(tensor) for tensor in slab.stack.unbind(0)]

    def _continue_in_own(self, columns: int) -> None:
        own = {
            number: kind.slices.writable(layer, self._have, columns)
            for number, (kind, layer) in enumerate(self._state.pairs()) if kind.slices
        }  # fmt: skip
        for slab in self._slabs:
            spec = slab.group.spec
            for place in slab.members:
                tensors, origin = own[slab.group.layers[place]]
                slab.buffers.append(_Buffer(tensors[spec.name].movedim(spec.batch_axis, 0), origin))

    def _copy(self, slab: _Slab, block: KVBlock, target: _Target, skip: int) -> None:
        axis, length = slab.group.token_axis, target.tokens - skip
        begin = target.pads + block.key.start + skip
        state = block.tensors[slab.number].narrow(1 + axis, skip, length)
        note_use(state)
        members = staged(state if len(slab.members) == len(slab.group.layers) else state[slab.members], slab.device)
        if slab.stack is not None:
            into = slab.stack.narrow(2 + axis, begin, length)
            for first, last in _runs(target.rows):
                into[:, first:last].copy_(members[:, None], non_blocking=True)
        else:
            for member, buffer in zip(members, slab.buffers, strict=True):
                into = buffer.tensor.narrow(1 + axis, begin - buffer.origin, length)
                for first, last in _runs(target.rows):
                    into[first:last].copy_(member, non_blocking=True)
        self._sending.sent(slab.device)

    def _make_states(self, tokens: int) -> None:
        for group in self._shape.layout.snapshot_groups:
            for layer in group.layers:
                size = list(group.spec.sized(tokens))
                size.insert(group.spec.batch_axis, self._rows)
                made = torch.zeros(size, dtype=group.spec.torch_dtype, device=self._shape.devices[layer])
                self._states.setdefault((layer, group.spec.name), made)

    def _place_states(self, block: KVBlock, target: _Target) -> None:
        for group, tensor in zip(block.layout.snapshot_groups, block.tensors, strict=True):
            for place, layer in enumerate(group.layers):
                into = self._states[layer, group.spec.name].movedim(group.spec.batch_axis, 0)
                for first, last in _runs(target.rows):
                    into[first:last] = tensor[place]


def _runs(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    if rows[-1] - rows[0] + 1 == len(rows):
        return [(rows[0], rows[-1] + 1)]
    return [(row, row + 1) for row in rows]
