"""Full attention: one key and one value per token, cut anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicLayer

from ghostcacher.adapters.layers import GrowingLayer
from ghostcacher.blocks import TOKENS, KVBlock, KVLayout, LayerSpec, TensorSpec
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
    """Private buffers that take restored columns and become the layers' state only when `commit` is called."""

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
        self._buffers = []
        for layer, device, spec in zip(layers, devices, layout.layers, strict=True):
            keys, values = (_like(tensor, rows, device) for tensor in spec.tensors)
            self._buffers.append(layer.writable(keys, values, have, columns))

    def expect(self, candidates: Sequence[Candidate], rows: tuple[int, ...], pads: int) -> None:
        """Blocks that `place` will be given for ``rows``, which begin after ``pads`` columns of padding."""
        for candidate in candidates:
            self._targets.setdefault(candidate.key.digest, []).append(_Target(rows, pads, candidate.tokens))

    def pad(self, row: int, columns: int) -> None:
        """Fill a row's padding with zeros: attention gives it no weight, but it must be finite."""
        if columns > self._have:
            for keys, values in self._buffers:
                keys[row, :, self._have : columns] = 0
                values[row, :, self._have : columns] = 0

    def place(self, block: KVBlock) -> None:
        """Copy a verified block to where it is expected. Distinct blocks may be placed on several threads."""
        for target in self._targets[block.key.digest]:
            skip = max(0, self._have - target.pads - block.key.start)
            if skip < target.tokens:
                self._copy(block, target, skip)

    def commit(self, columns: int) -> None:
        """Let the layers show the first ``columns`` columns. Nothing before this call changes what they show."""
        for layer, (keys, values) in zip(self._layers, self._buffers, strict=True):
            layer.adopt(keys, values, columns)

    def _copy(self, block: KVBlock, target: _Target, skip: int) -> None:
        begin = target.pads + block.key.start + skip
        end = target.pads + block.key.start + target.tokens
        first, last = target.rows[0], target.rows[-1] + 1
        is_run = last - first == len(target.rows)
        for group, stacked in zip(self._layout.groups, block.tensors, strict=True):
            which = 0 if group.spec.name == "keys" else 1
            for layer, tensor in zip(group.layers, stacked.unbind(0), strict=True):
                state = tensor[:, skip : target.tokens]
                buffer = self._buffers[layer][which]
                if is_run:
                    buffer[first:last, :, begin:end] = state
                else:
                    for row in target.rows:
                        buffer[row, :, begin:end] = state


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


def _like(spec: TensorSpec, rows: int, device: torch.device) -> torch.Tensor:
    heads, _, dim = spec.shape
    return torch.empty((rows, heads, 0, dim), dtype=spec.torch_dtype, device=device)
