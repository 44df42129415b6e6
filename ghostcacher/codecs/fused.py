"""numba, where it is installed: decoders of int8 and int4 that make one pass over bf16 state.

They are compiled when a store with such a codec is opened: seconds the first time, then numba has them on disk. Without
numba everything runs in torch. `ec` and `kvt` have none: most of their time is zstd's and the product's, and what is
left did not make twice the speed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from ghostcacher.codecs import kernels

COMPILED = frozenset({"int4", "int8", "quality"})
"""The codecs that have use for them."""

_ENDS = "float32[:,:,::1], float32[:,:,::1]"
_KERNELS: Mapping[tuple[bool, bool], tuple[Callable[..., None], str]] = {
    (True, False): (kernels.int8_keys, f"void(uint8[:,:,:,::1], {_ENDS}, uint16[:,:,::1])"),
    (True, True): (kernels.int4_keys, f"void(uint8[:,:,:,::1], {_ENDS}, uint16[:,:,::1])"),
    (False, False): (kernels.int8_values, f"void(uint8[:,:,:,::1], {_ENDS}, uint16[:,:,:,::1])"),
    (False, True): (kernels.int4_values, f"void(uint8[:,:,:,::1], {_ENDS}, uint16[:,:,:,:,::1])"),
}
"""By whether they are of keys, and whether a byte holds two codes."""


def restored(
    codes: torch.Tensor,
    near: torch.Tensor,
    step: torch.Tensor,
    into: torch.Tensor,
    *,
    is_keys: bool,
    is_halved: bool,
) -> bool:
    """Code x step + near, into the first tokens of ``into`` ``[layers, heads, tokens, channels]``, if it is bf16.

    ``codes`` U8 are ``[layers, heads, groups, 64, channels]`` of keys, ``[layers, heads, tokens, groups, channels]`` of
    values, half as many tokens or channels if ``is_halved``; the ends fp32 without the axis that runs through a group.
    False: nothing was done.
    """
    compiled = compile_all() if into.dtype is torch.bfloat16 and _is_plain(into) else None
    if compiled is None:
        return False
    out = into.view(torch.int16).flatten(0, 1)
    if not is_keys:
        out = out.view(*out.shape[:2], codes.shape[3], *((2,) if is_halved else ()), codes.shape[4])
    given = (each.flatten(0, 1).contiguous().numpy() for each in (codes, near, step))
    compiled[is_keys, is_halved](*given, out.numpy().view("uint16"))
    return True


def _is_plain(into: torch.Tensor) -> bool:
    return into.device.type == "cpu" and into.is_contiguous()


@cache
def compile_all() -> Mapping[tuple[bool, bool], Callable[..., None]] | None:
    """The kernels, compiled at the first call; None without numba, or where it is told not to compile."""
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:
        return None
    numba.extending.register_jitable(kernels.bf16)
    return {kind: _compiled(numba, kernel, signature) for kind, (kernel, signature) in _KERNELS.items()}


def _compiled(numba: Any, kernel: Callable[..., None], signature: str) -> Callable[..., None]:
    try:
        found: Callable[..., None] = numba.njit(signature, nogil=True, cache=True)(kernel)
    except RuntimeError:  # there is no place to keep it
        found = numba.njit(signature, nogil=True)(kernel)
    return found
