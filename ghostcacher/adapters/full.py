"""Full attention: one key and one value per token, cut anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicLayer

from ghostcacher.adapters.layers import GrowingLayer, room_for
from ghostcacher.adapters.memory import empty
from ghostcacher.blocks import TOKENS, KVBlock, KVLayout, LayerSpec, TensorGroup, TensorSpec
from ghostcacher.index import Candidate
from ghostcacher.keys import BlockKey, PrefixChain

_KEYS_VALUES_RANK = 4


def is_full(layer: object) -> bool:
    """Whether ``layer`` is a plain full-attention layer: by its class, never by its name or the model's."""
    return type(layer) in {DynamicLayer, GrowingLayer}


def layer_spec(layer: DynamicLayer) -> LayerSpec:
    """What one initialised layer holds, per token and without its batch axis.

    Raises:
        ValueError: keys or values are not ``[rows, heads, tokens, dim]``.
    """
    tensors = []
    for name in ("keys", "values"):
        tensor = getattr(layer, name)
        if tensor is None or tensor.dim() != _KEYS_VALUES_RANK:
            raise ValueError(f"{name} of a full-attention layer are not [rows, heads, tokens, dim]")
        tensors.append(
            TensorSpec(name, str(tensor.dtype).removeprefix("torch."), (tensor.shape[1], TOKENS, tensor.shape[3]))
        )
    return LayerSpec("full", tuple(tensors))


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
class _Target:
    rows: tuple[int, ...]
    pads: int
    tokens: int


class Landing:
    """Private buffers that take restored columns and become the layers' state only when `commit` is called.

    Into an empty cache, all layers of one shape and device share one buffer ``[layers, rows, heads, columns, dim]``,
    so that a block is placed by one copy per group. A cache that holds columns already goes on in its own buffers.
    """

    def __init__(
        self,
        layers: Sequence[GrowingLayer],
        layout: KVLayout,
        devices: Sequence[torch.device],
        rows: int,
        have: int,
        columns: int,
    ) -> None:
        """Room for ``columns`` columns of ``rows`` rows, of which the layers already hold ``have``."""
        self._layers = layers
        self._layout = layout
        self._have = have
        self._targets: dict[bytes, list[_Target]] = {}
        self._slabs: list[_Slab] = []
        for number, group in enumerate(layout.groups):
            for device in dict.fromkeys(devices[layer] for layer in group.layers):
                members = [place for place, layer in enumerate(group.layers) if devices[layer] == device]
                self._slabs.append(_Slab(number, group, members, device))
        self._buffers = self._own_buffers(columns) if have else self._shared_buffers(rows, columns)

    def expect(self, candidates: Sequence[Candidate], rows: tuple[int, ...], pads: int) -> None:
        """Blocks that `place` will be given for ``rows``, which begin after ``pads`` columns of padding."""
        for candidate in candidates:
            self._targets.setdefault(candidate.key.digest, []).append(_Target(rows, pads, candidate.tokens))

    def pad(self, row: int, columns: int) -> None:
        """Fill a row's padding with zeros: attention gives it no weight, but it must be finite."""
        if columns > self._have:
            for buffers in self._buffers.values():
                for buffer in buffers.values():
                    buffer[row, :, self._have : columns] = 0

    def place(self, block: KVBlock) -> None:
        """Copy a verified block to where it is expected. Distinct blocks may be placed on several threads."""
        for target in self._targets[block.key.digest]:
            skip = max(0, self._have - target.pads - block.key.start)
            if skip < target.tokens:
                for slab in self._slabs:
                    self._copy(slab, block, target, skip)

    def commit(self, columns: int) -> None:
        """Let the layers show the first ``columns`` columns. Nothing before this call changes what they show."""
        for number, layer in enumerate(self._layers):
            buffers = self._buffers[number]
            layer.adopt(buffers["keys"], buffers["values"], columns)

    def _copy(self, slab: _Slab, block: KVBlock, target: _Target, skip: int) -> None:
        begin = target.pads + block.key.start + skip
        end = target.pads + block.key.start + target.tokens
        state = block.tensors[slab.number][:, :, skip : target.tokens]
        if slab.buffer is not None:
            members = state if len(slab.members) == len(slab.group.layers) else state[slab.members]
            for first, last in _runs(target.rows):
                slab.buffer[:, first:last, :, begin:end] = members[:, None]
            return
        for place in slab.members:
            buffer = self._buffers[slab.group.layers[place]][slab.group.spec.name]
            for first, last in _runs(target.rows):
                buffer[first:last, :, begin:end] = state[place]

    def _shared_buffers(self, rows: int, columns: int) -> dict[int, dict[str, torch.Tensor]]:
        found: dict[int, dict[str, torch.Tensor]] = {number: {} for number in range(len(self._layers))}
        for slab in self._slabs:
            heads, _, dim = slab.group.spec.shape
            shape = (len(slab.members), rows, heads, room_for(columns), dim)
            slab.buffer = empty(shape, slab.group.spec.torch_dtype, slab.device)
            for place, buffer in zip(slab.members, slab.buffer.unbind(0), strict=True):
                found[slab.group.layers[place]][slab.group.spec.name] = buffer
        return found

    def _own_buffers(self, columns: int) -> dict[int, dict[str, torch.Tensor]]:
        found = {}
        for number, (layer, spec) in enumerate(zip(self._layers, self._layout.layers, strict=True)):
            likes = {tensor.name: layer.keys if tensor.name == "keys" else layer.values for tensor in spec.tensors}
            keys, values = layer.writable(likes["keys"], likes["values"], self._have, columns)
            found[number] = {"keys": keys, "values": values}
        return found


@dataclass(slots=True)
class _Slab:
    """The layers of one group on one device; ``members`` are places within the group."""

    number: int
    group: TensorGroup
    members: list[int]
    device: torch.device
    buffer: torch.Tensor | None = None


def _runs(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    if rows[-1] - rows[0] + 1 == len(rows):
        return [(rows[0], rows[-1] + 1)]
    return [(row, row + 1) for row in rows]


@dataclass(frozen=True, slots=True, eq=False)
class FullCapture:
    """State of one row, as views of the layers' buffers, to be copied on the writer's thread.

    ``noted`` are decoded token ids not read yet (reading them would wait for the device).
    """

    begun: PrefixChain
    noted: tuple[torch.Tensor, ...]
    layout: KVLayout
    states: tuple[tuple[torch.Tensor, ...], ...]
    first_token: int
    lossy_from: int | None = None
    trims_repeats: bool = False

    @classmethod
    def of(
        cls, layers: Sequence[GrowingLayer], layout: KVLayout, row: int, pads: int, begun: PrefixChain,
        noted: tuple[torch.Tensor, ...], tokens: int, *, first_token: int = 0, lossy_from: int | None = None,
        trims_repeats: bool = False,
    ) -> FullCapture:  # fmt: skip
        """Views of ``tokens`` tokens of ``row``; freezes the layers' columns."""
        for layer in layers:
            layer.freeze()
        states = tuple(
            tuple(getattr(layers[n], group.spec.name)[row, :, pads : pads + tokens] for n in group.layers)
            for group in layout.groups
        )
        return cls(begun, noted, layout, states, first_token, lossy_from, trims_repeats)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tokens to be stored."""
        return max(0, self.states[0][0].shape[1] - self.first_token) * self.layout.token_bytes()

    def keys(self) -> Sequence[BlockKey]:
        """See `Capture.keys`. Reads the decoded token ids."""
        chain = self.begun
        if self.noted:
            ids = torch.cat([ids.reshape(-1) for ids in self.noted]).tolist()
            chain = chain.extended(_without_repeats(ids) if self.trims_repeats else ids)
        return list(chain.covering(self.first_token, len(chain)))

    def block(self, key: BlockKey) -> KVBlock:
        """See `Capture.block`."""
        tensors = tuple(
            torch.stack([state[:, key.start : key.end].to(members[0].device) for state in members])
            for members in self.states
        )
        lossy = self.lossy_from is not None and key.end > self.lossy_from
        return KVBlock(key, self.layout, tensors, lossy=lossy)


def _without_repeats(ids: list[int]) -> list[int]:
    end = len(ids)
    while end > 1 and ids[end - 1] == ids[end - 2]:
        end -= 1
    return ids[:end]
