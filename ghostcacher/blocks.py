"""The state of one block of tokens, and the shape it must have. Never knows where it lives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Literal, Self

import torch

from ghostcacher.keys import BlockKey

CPU = torch.device("cpu")
TOKENS = -1
"""Stands for the token axis in a `TensorSpec.shape`."""

LayerKind = Literal[
    "full", "latent", "window", "indexed", "sparse", "conv", "recurrent", "hybrid", "hybrid window", "compressed",
    "dummy",
]  # fmt: skip

Role = Literal["keys", "values"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Extent:
    """An axis of a snapshot whose size follows from how many tokens came before.

    ``below``: all of them, at most ``tokens`` - 1 (a window). ``each``: one for every ``tokens``. ``rest``: those
    after the last whole ``tokens``. ``once``: ``size`` as soon as there are ``tokens``, none before.
    """

    rule: Literal["below", "each", "rest", "once"]
    tokens: int
    size: int = 1

    def sized(self, before: int) -> int:
        """Size of the axis after ``before`` tokens."""
        sizes = {
            "below": min(before, self.tokens - 1), "each": before // self.tokens, "rest": before % self.tokens,
            "once": self.size if before >= self.tokens else 0,
        }  # fmt: skip
        return sizes[self.rule]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one cache layer, without its batch axis.

    ``shape`` holds `TOKENS` where the token axis is. State that has none is a snapshot: valid after exactly the
    tokens that made it. ``batch_axis`` is where the batch axis stands in the model's own tensor.
    """

    name: str
    dtype: str
    shape: tuple[int | Extent, ...]
    batch_axis: int = 0
    role: Role | None = field(default=None, compare=False)

    @property
    def token_axis(self) -> int | None:
        """Index of the token axis in ``shape``, or None for state that has none."""
        return self.shape.index(TOKENS) if TOKENS in self.shape else None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return DTYPES[self.dtype]

    def sized(self, tokens: int) -> tuple[int, ...]:
        """``shape`` with the token axis filled in; for a snapshot, as it is after ``tokens`` tokens."""
        return tuple(
            axis.sized(tokens) if isinstance(axis, Extent) else tokens if axis == TOKENS else axis
            for axis in self.shape
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rotation:
    """How keys are turned by position (RoPE, https://arxiv.org/abs/2104.09864).

    Pair n of a key at position p is turned by p times ``frequencies[n]``. Pairs are channels n and n + half of those
    that are turned, or, ``interleaved``, 2 n and 2 n + 1; channels beyond stay as they are.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False

    def at(self, start: int, tokens: int) -> Turn:
        """The turn of ``tokens`` tokens from position ``start`` on. The latest are kept: do not change them."""
        return _turned(self, start, tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A `Rotation` at some positions: ``cosine`` and ``sine`` are ``[tokens, pairs]``."""

    cosine: torch.Tensor
    sine: torch.Tensor
    interleaved: bool

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """Turned fp32 ``keys`` ``[…, tokens, channels]``."""
        return self._by(self.sine, keys)

    def back(self, keys: torch.Tensor) -> torch.Tensor:
        """The inverse of `forward`."""
        return self._by(-self.sine, keys)

    def _by(self, sine: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        turned, pairs = torch.empty_like(keys), self.cosine.shape[1]
        cosine, sine = self.cosine.to(keys.device), sine.to(keys.device)
        turned[..., 2 * pairs :] = keys[..., 2 * pairs :]
        first, second = self.pairs(keys[..., : 2 * pairs]).unbind(-2)
        to_first, to_second = self.pairs(turned[..., : 2 * pairs]).unbind(-2)
        to_first.copy_((first * cosine).addcmul_(second, sine, value=-1))
        to_second.copy_((second * cosine).addcmul_(first, sine))
        return turned

    def pairs(self, part: torch.Tensor) -> torch.Tensor:
        """First and second channels of all pairs, ``[…, 2, pairs]``, of those that are turned, as a view."""
        if self.interleaved:
            return torch.unflatten(part, -1, (-1, 2)).transpose(-1, -2)
        return torch.unflatten(part, -1, (2, -1))


@lru_cache(maxsize=32)
def _turned(rotation: Rotation, start: int, tokens: int) -> Turn:
    positions = torch.arange(start, start + tokens, dtype=torch.float32, device="cpu")
    angles = positions[:, None] * torch.tensor(rotation.frequencies, dtype=torch.float32, device="cpu")
    return Turn(angles.cos(), angles.sin(), rotation.interleaved)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of a model's cache: its kind of state and its tensors."""

    kind: LayerKind
    tensors: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of equal name, dtype and shape over several layers, stored stacked: ``[layers, *spec.shape]``."""

    name: str
    spec: TensorSpec
    layers: tuple[int, ...]

    @property
    def token_axis(self) -> int:
        """Index of the token axis in ``spec.shape``; ValueError for a group of a snapshot, which has none."""
        return self.spec.shape.index(TOKENS)

    def shape(self, tokens: int) -> tuple[int, ...]:
        """``[layers, *spec.shape]`` with the token axis filled in."""
        return (len(self.layers), *self.spec.sized(tokens))


@dataclass(frozen=True)
class KVLayout:
    """What one block of a model's cache consists of, layer by layer.

    ``rotation`` is how keys are turned, if all are turned alike, and ``weights`` names whose cache it is: for codecs,
    no part of the layout's identity.
    """

    layers: tuple[LayerSpec, ...]
    rotation: Rotation | None = field(default=None, compare=False)
    weights: str = field(default="", compare=False)

    @classmethod
    def uniform(cls, layers: int, heads: int, head_dim: int, dtype: str = "float32") -> Self:
        """Full attention with equal layers: keys and values ``[heads, tokens, head_dim]``."""
        roles: tuple[Role, ...] = ("keys", "values")
        tensors = tuple(TensorSpec(role, dtype, (heads, TOKENS, head_dim), role=role) for role in roles)
        return cls(tuple(LayerSpec("full", tensors) for _ in range(layers)))

    @cached_property
    def groups(self) -> tuple[TensorGroup, ...]:
        """What a block holds: stacks of equal per-token tensors, by name, then in order of their first layer."""
        return self._stacked(has_tokens=True)

    @cached_property
    def snapshot_groups(self) -> tuple[TensorGroup, ...]:
        """What a snapshot holds: stacks of equal tensors that have no token axis."""
        return self._stacked(has_tokens=False)

    def groups_of(self, key: BlockKey) -> tuple[TensorGroup, ...]:
        """What is stored under ``key``."""
        return self.snapshot_groups if key.is_snapshot else self.groups

    def _stacked(self, *, has_tokens: bool) -> tuple[TensorGroup, ...]:
        members: dict[TensorSpec, list[int]] = {}
        for number, layer in enumerate(self.layers):
            for spec in layer.tensors:
                if (spec.token_axis is not None) == has_tokens:
                    members.setdefault(spec, []).append(number)
        names = [spec.name for spec in members]
        return tuple(
            TensorGroup(spec.name if names.count(spec.name) == 1 else f"{spec.name}.{layers[0]}", spec, tuple(layers))
            for spec, layers in sorted(members.items(), key=lambda item: (item[0].name, item[1]))
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the layers in JSON, in hexadecimal: the layout's part in a namespace."""
        document = [
            [layer.kind, [[t.name, t.dtype, list(map(_plain, t.shape)), t.batch_axis] for t in layer.tensors]]
            for layer in self.layers
        ]
        return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()

    def token_bytes(self) -> int:
        """Bytes of one token in the model's own dtypes."""
        return _bytes_of(self.groups, 1)

    def snapshot_bytes(self, tokens: int) -> int:
        """Bytes of a snapshot after ``tokens`` tokens, in the model's own dtypes."""
        return _bytes_of(self.snapshot_groups, tokens)

    def bytes_of(self, key: BlockKey) -> int:
        """Bytes of what is stored under ``key``, in the model's own dtypes."""
        return _bytes_of(self.groups_of(key), sizing_tokens(key))


@dataclass(frozen=True, slots=True)
class KVBlock:
    """The immutable state of one block or snapshot: one tensor per group of the layout, ``[layers, *spec.shape]``.

    ``lossy`` is true if this block or any block before it went through a lossy codec.
    """

    key: BlockKey
    layout: KVLayout
    tensors: tuple[torch.Tensor, ...]
    lossy: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def has_expected_shape(self) -> bool:
        """Whether every tensor has the shape and dtype that the layout gives for this key's token count."""
        groups, tokens = self.layout.groups_of(self.key), sizing_tokens(self.key)
        return len(self.tensors) == len(groups) and all(
            tuple(tensor.shape) == group.shape(tokens) and tensor.dtype == group.spec.torch_dtype
            for group, tensor in zip(groups, self.tensors, strict=True)
        )


def sizing_tokens(key: BlockKey) -> int:
    """The token count that sizes what is stored under ``key``: its own, or for a snapshot all up to its end."""
    return key.end if key.is_snapshot else key.length


def _bytes_of(groups: Sequence[TensorGroup], tokens: int) -> int:
    return sum(prod(group.shape(tokens)) * group.spec.torch_dtype.itemsize for group in groups)


def _plain(axis: int | Extent) -> int | list[str | int]:
    return [axis.rule, axis.tokens, axis.size] if isinstance(axis, Extent) else axis
