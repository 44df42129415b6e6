"""Decoders of int8 and int4 in one pass over bf16 state: plain loops for numba, where torch makes four.

Nothing here is called as Python: `fused` compiles it. Shapes are the caller's promise, nothing is checked. The order of
axes is that in which numba finds vectors: one place written to in each inner loop, and no index that could be negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]
"""bf16, as bits."""


def bf16(value: Any) -> Any:
    """Bits of the bf16 nearest to an fp32 ``value``, ties to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def int8_keys(codes: Bytes, near: Floats, step: Floats, out: Halves) -> None:
    """Codes ``[n, groups, 64, channels]``, ends ``[n, groups, channels]``, to ``[n, tokens or more, channels]``."""
    count, groups, tokens, channels = codes.shape
    for n in range(count):
        for group in range(groups):
            for token in range(tokens):
                for channel in range(channels):
                    code = np.float32(codes[n, group, token, channel])
                    value = code * step[n, group, channel] + near[n, group, channel]
                    out[n, group * tokens + token, channel] = bf16(value)


def int8_values(codes: Bytes, near: Floats, step: Floats, out: Halves) -> None:
    """Codes ``[n, tokens, groups, channels]``, ends ``[n, tokens, groups]``, to the shape of the codes."""
    count, tokens, groups, channels = codes.shape
    for n in range(count):
        for token in range(tokens):
            for group in range(groups):
                slope, start = step[n, token, group], near[n, token, group]
                for channel in range(channels):
                    out[n, token, group, channel] = bf16(np.float32(codes[n, token, group, channel]) * slope + start)


def int4_keys(codes: Bytes, near: Floats, step: Floats, out: Halves) -> None:
    """As `int8_keys` with codes ``[n, groups, 32, channels]``: a byte is token t and t + 32 of its group."""
    count, groups, rows, channels = codes.shape
    for n in range(count):
        for group in range(groups):
            for row in range(rows):
                for channel in range(channels):
                    code = np.float32(codes[n, group, row, channel] & 15)
                    value = code * step[n, group, channel] + near[n, group, channel]
                    out[n, 2 * group * rows + row, channel] = bf16(value)
                for channel in range(channels):
                    code = np.float32(codes[n, group, row, channel] >> 4)
                    value = code * step[n, group, channel] + near[n, group, channel]
                    out[n, 2 * group * rows + rows + row, channel] = bf16(value)


def int4_values(codes: Bytes, near: Floats, step: Floats, out: Halves) -> None:
    """As `int8_values` with codes ``[n, tokens, groups, half]``, to ``[n, tokens, groups, 2, half]``."""
    count, tokens, groups, half = codes.shape
    for n in range(count):
        for token in range(tokens):
            for group in range(groups):
                slope, start = step[n, token, group], near[n, token, group]
                for channel in range(half):
                    low = np.float32(codes[n, token, group, channel] & 15)
                    out[n, token, group, 0, channel] = bf16(low * slope + start)
                for channel in range(half):
                    high = np.float32(codes[n, token, group, channel] >> 4)
                    out[n, token, group, 1, channel] = bf16(high * slope + start)
