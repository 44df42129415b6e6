"""Uniform codes between the minimum and the maximum of each group, such that coding again gives the same bytes.

Values are rounded to half precision first. Both ends of a group are then half-precision numbers that occur in it, are
stored as they are, and take the first and the last code. Codes count from the end that is nearer to zero: it comes back
exactly, and the other one but for an error of fp32 in its own size, which its rounding takes away. A bf16 or fp16
model's values need no rounding. Those of fp32 are rounded to fp16 after a shift by a power of two that fills its range:
bf16 is coarser than 8-bit codes of keys that lie far from zero.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from ghostcacher.blocks import TensorGroup
from ghostcacher.codecs.base import Spread, one_by_one
from ghostcacher.codecs.fused import restored
from ghostcacher.codecs.grouping import GROUP_TOKENS, check_finite, grid, group_axis, grouped, grouped_shape
from ghostcacher.codecs.header import TensorField
from ghostcacher.codecs.symbols import runs

Parts = Mapping[str, torch.Tensor]
Unpack = Callable[[slice, torch.Tensor], None]
"""Writes the codes of some layers into fp32 memory, `grouped`."""

_BYTE = 255
_FP16_EXPONENT = 15
_SHIFT_LIMIT = 110


def end_fields(group: TensorGroup, coded: int) -> tuple[TensorField, ...]:
    """Ends of the groups (see `grid`), and for fp32 the shift ``[layers]``."""
    dtype, name, ends = "BF16" if group.spec.dtype == "bfloat16" else "F16", group.name, grid(group, coded)
    shift = [TensorField(f"{name}.shift", "I32", (len(group.layers),))] if group.spec.dtype == "float32" else []
    return (*shift, TensorField(f"{name}.near", dtype, ends), TensorField(f"{name}.far", dtype, ends))


def to_codes(group: TensorGroup, tensor: torch.Tensor, steps: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes 0 to ``steps`` of ``tensor`` ``[layers, heads, tokens, channels]``, `grouped`, U8; and the `end_fields`.

    Raises:
        BlockError: ``nonfinite``: NaN, infinity, or a range that overflows.
    """
    half, parts = torch.bfloat16 if group.spec.dtype == "bfloat16" else torch.float16, {}
    if group.spec.dtype == "float32":
        parts[f"{group.name}.shift"] = _shift(group, tensor)
    codes = torch.empty(grouped_shape(group, tensor.shape), dtype=torch.uint8, device=tensor.device)
    near, far = (torch.empty(grid(group, tensor.shape[2]), dtype=half, device=tensor.device) for _ in range(2))
    # Fresh memory costs more than coding does: a part at a time takes the same again and again.
    for run in runs(len(tensor), tensor[:1].numel()):
        shift = parts.get(f"{group.name}.shift")
        values = tensor[run] if shift is None else _times(tensor[run], shift[run, None, None, None])
        codes[run], near[run], far[run] = _coded(group, values.to(half).float(), steps)
    return codes, {**parts, f"{group.name}.near": near, f"{group.name}.far": far}


def _coded(group: TensorGroup, values: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of some layers, and the ends of their groups; ``values`` are changed."""
    axis = group_axis(group)
    near, far = _ends(grouped(group, values), axis)
    step = (far - near) / steps
    check_finite(group, step)
    step[step == 0] = 1.0
    codes = grouped(group, values).sub_(near).div_(step).round_()
    # In int32 on their way to U8: torch does not vectorize the conversion at once.
    return codes.to(torch.int32), near.squeeze(axis), far.squeeze(axis)


def _ends(values: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each group the end nearer to zero, and the other one. None is -0: what codes it comes back as 0."""
    # One by one: torch does not vectorize aminmax over an axis.
    lowest, highest = values.amin(dim=axis, keepdim=True) + 0.0, values.amax(dim=axis, keepdim=True) + 0.0
    is_below = highest.abs() < lowest.abs()
    return torch.where(is_below, highest, lowest), torch.where(is_below, lowest, highest)


def from_codes(
    group: TensorGroup, parts: Parts, steps: int, codes: torch.Tensor, decoded: torch.Tensor, unpack: Unpack,
    spread: Spread = one_by_one,
) -> None:  # fmt: skip
    """What `to_codes` made, back to the first tokens of ``decoded`` ``[layers, heads, tokens, channels]``.

    ``codes`` are `grouped`, whole or two to a byte. Some layers at a time: in one pass if `fused` has one, else through
    fp32, whose codes ``unpack`` writes.
    """
    axis, name, is_keys = group_axis(group), group.name, group.spec.role == "keys"
    near = parts[f"{name}.near"].to(decoded.device).float()
    step = (parts[f"{name}.far"].to(decoded.device).float() - near) / steps
    into = decoded[..., : near.shape[2] * (GROUP_TOKENS if is_keys else 1), :]
    shift, own = parts.get(f"{name}.shift"), _Own()
    back = None if shift is None else torch.exp2(-shift.to(decoded.device).float()).view(-1, 1, 1, 1, 1)

    def restore(run: slice) -> None:
        if restored(codes[run], near[run], step[run], decoded[run], is_keys=is_keys, is_halved=steps < _BYTE):
            return
        values, slope, offset = own.room(group, into[run]), step[run].unsqueeze(axis), near[run].unsqueeze(axis)
        unpack(run, values)
        # One pass is faster over contiguous channels, two where each row has one number.
        if is_keys:
            torch.addcmul(offset, values, slope, out=values)
        else:
            values.mul_(slope).add_(offset)
        if back is not None:
            values.mul_(back[run])
        into[run] = values.view(into[run].shape)

    spread(restore, runs(len(into), into[:1].numel()))


class _Own(threading.local):
    """Memory that each thread restores layers in, again and again."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, device="cpu")

    def room(self, group: TensorGroup, into: torch.Tensor) -> torch.Tensor:
        """Fp32, on the device and of the shape of ``into``, `grouped`."""
        shape = grouped_shape(group, into.shape)
        if self._kept.shape != shape:
            self._kept = torch.empty(shape, device=into.device, dtype=torch.float32)
        return self._kept


def _shift(group: TensorGroup, tensor: torch.Tensor) -> torch.Tensor:
    """Powers of two ``[layers]`` that bring each layer's largest value just below 2^15."""
    peak = tensor.abs().amax(dim=(1, 2, 3))
    check_finite(group, peak)
    shift = (_FP16_EXPONENT - torch.frexp(peak).exponent).clamp(-_SHIFT_LIMIT, _SHIFT_LIMIT)
    # A peak that rounds up to 2^15 must be shifted as that would be, when it is coded again.
    return (shift - (_times(peak, shift).half().float() >= 2.0**_FP16_EXPONENT).int()).to(torch.int32)


def _times(values: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return values * torch.exp2(shift.float())
