"""The state of one block of tokens, and the shape it must have. Never knows where it lives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch

from ghostcacher.keys import BlockKey

TOKENS = -1
"""Stands for the token axis in a `TensorSpec.shape`."""

LayerKind = Literal["full", "window", "indexed", "conv", "recurrent", "hybrid", "compressed", "dummy", "unknown"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int64)
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one cache layer, without its batch axis.

    ``shape`` holds `TOKENS` where the token axis is (nowhere, for state that has none); ``batch_axis`` is where
    the batch axis stands in the model's own tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    batch_axis: int = 0

    @property
    def token_axis(self) -> int | None:
        """Index of the token axis in ``shape``, or None for state that has none."""
        return self.shape.index(TOKENS) if TOKENS in self.shape else None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return DTYPES[self.dtype]

    def sized(self, tokens: int) -> tuple[int, ...]:
        """``shape`` with the token axis filled in."""
        return tuple(tokens if size == TOKENS else size for size in self.shape)


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

    def shape(self, tokens: int) -> tuple[int, ...]:
        """``[layers, *spec.shape]`` with the token axis filled in."""
        return (len(self.layers), *self.spec.sized(tokens))


@dataclass(frozen=True)
class KVLayout:
    """What one block of a model's cache consists of, layer by layer."""

    layers: tuple[LayerSpec, ...]

    @classmethod
    def uniform(cls, layers: int, heads: int, head_dim: int, dtype: str = "float32") -> Self:
        """Full attention with equal layers: keys and values ``[heads, tokens, head_dim]``."""
        tensors = tuple(TensorSpec(name, dtype, (heads, TOKENS, head_dim)) for name in ("keys", "values"))
        return cls(tuple(LayerSpec("full", tensors) for _ in range(layers)))

    @cached_property
    def groups(self) -> tuple[TensorGroup, ...]:
        """Stacks of equal tensors, by name, then in order of their first layer."""
        members: dict[TensorSpec, list[int]] = {}
        for number, layer in enumerate(self.layers):
            for spec in layer.tensors:
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
            [layer.kind, [[t.name, t.dtype, t.shape, t.batch_axis] for t in layer.tensors]] for layer in self.layers
        ]
        return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()

    def token_bytes(self) -> int:
        """Bytes of one token in the model's own dtypes."""
        return sum(torch.Size(group.shape(1)).numel() * group.spec.torch_dtype.itemsize for group in self.groups)


@dataclass(frozen=True, slots=True)
class KVBlock:
    """The immutable state of one block: one tensor per group of the layout, ``[layers, *spec.shape]``.

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
        return have_expected_shape(self.layout, self.key.length, self.tensors)


def have_expected_shape(layout: KVLayout, tokens: int, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether ``tensors`` are what ``layout`` says for a block of ``tokens`` tokens."""
    return len(tensors) == len(layout.groups) and all(
        tuple(tensor.shape) == group.shape(tokens) and tensor.dtype == group.spec.torch_dtype
        for group, tensor in zip(layout.groups, tensors, strict=True)
    )
