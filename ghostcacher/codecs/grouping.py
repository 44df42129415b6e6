"""What the codecs below 16 bits code of a block, and in which groups.

Keys carry position and have large single channels, so they are grouped along tokens: 64 tokens of one channel. Values
are grouped along channels: one token of one head, cut at 64 channels when wider (KIVI, arXiv 2402.02750, found the
same split). Tokens after the last whole run of 64 keep the model's dtype until their group is full: no value is coded
twice. The first 4 tokens of a prefix, which attention looks at from everywhere (StreamingLLM, arXiv 2309.17453), are
kept in bf16 by every codec below 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from ghostcacher.blocks import TOKENS, Rotation, TensorGroup, Turn
from ghostcacher.codecs.base import SAFETENSORS_DTYPES, Piece
from ghostcacher.codecs.header import TensorField
from ghostcacher.errors import BlockError

GROUP_TOKENS = 64
GROUP_CHANNELS = 64
SINK_TOKENS = 4
Parts = Mapping[str, torch.Tensor]
_FLOATS = frozenset({"float32", "float16", "bfloat16"})
_PER_HEAD_RANK = 3


def coded_tokens(group: TensorGroup, piece: Piece) -> int:
    """How many leading tokens are coded: whole runs of 64 of floating keys and values ``[heads, tokens, channels]``.

    None of anything else: index keys, latents' neighbours, recurrent state stay as they are.
    """
    spec = group.spec
    is_known = spec.role is not None and spec.dtype in _FLOATS
    is_per_head = len(spec.shape) == _PER_HEAD_RANK and spec.shape[1] == TOKENS and prod(group.shape(1)) > 0
    return piece.tokens // GROUP_TOKENS * GROUP_TOKENS if is_known and is_per_head else 0


def sink_tokens(piece: Piece, coded: int) -> int:
    """How many leading tokens of the coded ones are the first of the whole prefix."""
    return SINK_TOKENS if coded and piece.start == 0 else 0


def rest_fields(group: TensorGroup, piece: Piece, coded: int) -> tuple[TensorField, ...]:
    """The field of the tokens that are not coded, if there are any."""
    if coded == piece.tokens:
        return ()
    dtype = SAFETENSORS_DTYPES[group.spec.dtype]
    return (TensorField(f"{group.name}.rest", dtype, group.shape(piece.tokens - coded if coded else piece.tokens)),)


def kept(group: TensorGroup, tensor: torch.Tensor, piece: Piece, coded: int) -> dict[str, torch.Tensor]:
    """What `rest_fields` stands for: the tokens that are not coded, if there are any."""
    return {f"{group.name}.rest": tensor[..., coded:, :]} if coded < piece.tokens else {}


def put_kept(group: TensorGroup, decoded: torch.Tensor, piece: Piece, coded: int, parts: Parts) -> torch.Tensor:
    """Put what was kept as it was, sinks and rest, into ``decoded`` ``[layers, heads, tokens, channels]``."""
    sinks = parts.get(f"{group.name}.sinks")
    if sinks is not None:
        decoded[..., : sinks.shape[-2], :] = sinks
    if coded < piece.tokens:
        decoded[..., coded:, :] = parts[f"{group.name}.rest"]
    return decoded


def turn_of(group: TensorGroup, rotation: Rotation | None, start: int, tokens: int) -> Turn | None:
    """How keys from position ``start`` on are turned, if they are."""
    if rotation is None or group.spec.role != "keys" or 2 * len(rotation.frequencies) > group.shape(tokens)[-1]:
        return None
    return rotation.at(start, tokens)


def by_channel(
    group: TensorGroup, tensor: torch.Tensor, piece: Piece, coded: int, rotation: Rotation | None
) -> torch.Tensor:
    """The coded tokens of ``tensor``, turned back, ``[layers, tokens, heads * channels]`` in fp32; may be a view."""
    values = tensor[..., :coded, :].float()
    if turn := turn_of(group, rotation, piece.start, coded):
        values = turn.back(values)
    return values.transpose(1, 2).flatten(2)


def sink_dtype(group: TensorGroup) -> torch.dtype:
    """What the first tokens of a prefix are kept in: a model's own half precision, bf16 of fp32."""
    return torch.float16 if group.spec.dtype == "float16" else torch.bfloat16


def sink_fields(group: TensorGroup, sinks: int) -> tuple[TensorField, ...]:
    """The field of the first tokens, if this piece holds them."""
    dtype = "F16" if sink_dtype(group) is torch.float16 else "BF16"
    return (TensorField(f"{group.name}.sinks", dtype, group.shape(sinks)),) if sinks else ()


def value_group(channels: int) -> int:
    """Channels of one group of values."""
    return GROUP_CHANNELS if channels > GROUP_CHANNELS and channels % GROUP_CHANNELS == 0 else channels


def grid(group: TensorGroup, coded: int) -> tuple[int, ...]:
    """Groups: ``[layers, heads, token groups, channels]`` of keys, or ``[layers, heads, tokens, channel groups]``."""
    layers, heads, _, channels = group.shape(coded)
    if group.spec.role == "keys":
        return layers, heads, coded // GROUP_TOKENS, channels
    return layers, heads, coded, channels // value_group(channels)


def grouped(group: TensorGroup, tensor: torch.Tensor) -> torch.Tensor:
    """``[layers, heads, tokens, channels]`` with each group along one axis of its own: `group_axis`."""
    return tensor.reshape(grouped_shape(group, tensor.shape))


def grouped_shape(group: TensorGroup, shape: Sequence[int]) -> tuple[int, ...]:
    """What `grouped` makes of ``shape``."""
    layers, heads, tokens, channels = shape
    if group.spec.role == "keys":
        return layers, heads, tokens // GROUP_TOKENS, GROUP_TOKENS, channels
    size = value_group(channels)
    return layers, heads, tokens, channels // size, size


def group_axis(group: TensorGroup) -> int:
    """The axis of `grouped` that runs through one group."""
    return -2 if group.spec.role == "keys" else -1


def check_finite(group: TensorGroup, *found: torch.Tensor) -> None:
    """Refuse what a lossy codec cannot code.

    Raises:
        BlockError: ``nonfinite``: NaN, infinity, or a range beyond float32 among ``found``.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
        raise BlockError("nonfinite", f"{group.name} holds NaN, infinity or a range beyond float32")
