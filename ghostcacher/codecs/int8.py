"""``int8``: 8.5 bits a value, uniform codes with per-group scale and minimum.

Keys carry position (they are stored after rope) and have large single channels, so they are grouped along tokens:
64 tokens of one channel. Values are grouped along channels: one token of one head, cut at 64 channels when wider
(KIVI, arXiv 2402.02750, found the same split). A code is round((x - minimum) / scale) against scale and minimum as
rounded to bf16. Tokens after the last whole run of 64 keep the model's dtype until their group is full: no value is
coded twice (coding what was decoded may move it by another step, as the rounded scale need not reach code 255).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ghostcacher.blocks import TOKENS, TensorGroup
from ghostcacher.codecs.base import SAFETENSORS_DTYPES
from ghostcacher.codecs.header import TensorField
from ghostcacher.errors import BlockError

GROUP_TOKENS = 64
GROUP_CHANNELS = 64
STEPS = 255
_FLOATS = frozenset({"float32", "float16", "bfloat16"})
_PER_HEAD_RANK = 3


@dataclass(frozen=True, slots=True)
class Int8Codec:
    """Eight bits a value. Lossy: KL about 3e-5 nats a token on a 135M model in fp32."""

    name: ClassVar[str] = "int8"
    lossy: ClassVar[bool] = True

    def parameters(self) -> dict[str, Any]:
        """None: the definition has no free choice."""
        return {}

    def fields(self, group: TensorGroup, tokens: int) -> tuple[TensorField, ...]:
        """Codes ``[layers, heads, tokens, channels]`` U8, scale and minimum BF16, and the open group's rest.

        Scale and minimum are ``[layers, heads, token groups, channels]`` for keys and
        ``[layers, heads, tokens, channel groups]`` for values. Tensors that are neither are stored as they are.
        """
        dtype = SAFETENSORS_DTYPES[group.spec.dtype]
        coded = coded_tokens(group, tokens)
        if not coded:
            return (TensorField(f"{group.name}.rest", dtype, group.shape(tokens)),)
        layers, heads, _, channels = group.shape(coded)
        grid = (
            (layers, heads, coded // GROUP_TOKENS, channels)
            if group.spec.name == "keys"
            else (layers, heads, coded, channels // _value_group(channels))
        )
        parts = [
            TensorField(f"{group.name}.scale", "BF16", grid),
            TensorField(f"{group.name}.minimum", "BF16", grid),
            TensorField(f"{group.name}.codes", "U8", (layers, heads, coded, channels)),
        ]
        if coded < tokens:
            parts.append(TensorField(f"{group.name}.rest", dtype, group.shape(tokens - coded)))
        return tuple(parts)

    def encode(self, group: TensorGroup, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Codes, scale, minimum and rest; see `fields`.

        Raises:
            BlockError: ``nonfinite``: NaN, infinity, or a range that overflows.
        """
        tokens = tensor.shape[-2] if group.spec.token_axis is not None else 0
        coded = coded_tokens(group, tokens)
        if not coded:
            return {f"{group.name}.rest": tensor}
        values = _grouped(group, tensor[..., :coded, :].float())
        axis = _reduced_axis(group)
        minimum = values.amin(axis, keepdim=True).bfloat16()
        scale = ((values.amax(axis, keepdim=True) - values.amin(axis, keepdim=True)) / STEPS).bfloat16()
        if not bool(torch.isfinite(minimum).all() & torch.isfinite(scale).all()):
            raise BlockError("nonfinite", f"{group.name} holds NaN, infinity or a range beyond float32")
        step = torch.where(scale == 0, 1.0, scale.float())
        codes = ((values - minimum.float()) / step).round_().clamp_(0, STEPS).to(torch.uint8)
        parts = {
            f"{group.name}.scale": scale.squeeze(axis),
            f"{group.name}.minimum": minimum.squeeze(axis),
            f"{group.name}.codes": codes.view(tensor[..., :coded, :].shape),
        }
        if coded < tokens:
            parts[f"{group.name}.rest"] = tensor[..., coded:, :]
        return parts

    def decode(self, group: TensorGroup, tokens: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Code x scale + minimum in fp32, then the layout's dtype; the rest as it was."""
        coded = coded_tokens(group, tokens)
        if not coded:
            return parts[f"{group.name}.rest"].view(group.shape(tokens))
        axis = _reduced_axis(group)
        values = _grouped(group, parts[f"{group.name}.codes"]).float()
        values.mul_(parts[f"{group.name}.scale"].unsqueeze(axis)).add_(parts[f"{group.name}.minimum"].unsqueeze(axis))
        exact = values.view(group.shape(coded)).to(group.spec.torch_dtype)
        return exact if coded == tokens else torch.cat([exact, parts[f"{group.name}.rest"]], dim=-2)


def coded_tokens(group: TensorGroup, tokens: int) -> int:
    """How many leading tokens of a block are coded: whole groups of 64 of floating keys and values, else none."""
    spec = group.spec
    is_known = spec.name in {"keys", "values"} and spec.dtype in _FLOATS
    is_per_head = len(spec.shape) == _PER_HEAD_RANK and spec.shape[1] == TOKENS
    return tokens // GROUP_TOKENS * GROUP_TOKENS if is_known and is_per_head else 0


def _value_group(channels: int) -> int:
    return GROUP_CHANNELS if channels > GROUP_CHANNELS and channels % GROUP_CHANNELS == 0 else channels


def _grouped(group: TensorGroup, tensor: torch.Tensor) -> torch.Tensor:
    layers, heads, tokens, channels = tensor.shape
    if group.spec.name == "keys":
        return tensor.reshape(layers, heads, tokens // GROUP_TOKENS, GROUP_TOKENS, channels)
    size = _value_group(channels)
    return tensor.reshape(layers, heads, tokens, channels // size, size)


def _reduced_axis(group: TensorGroup) -> int:
    return -2 if group.spec.name == "keys" else -1
