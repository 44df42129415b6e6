"""Products of codes and a basis, both int8: exact whole numbers, the same on every machine.

oneDNN has faster products of int8 than of bf16 or fp32. Processors without VNNI add pairs of products in 16 bits, where
large ones are cut off: whether this one is exact is tried once.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from ghostcacher.codecs.outliers import Outliers

WIDTH_LIMIT = 1024
"""Sums of so many products of int8 are exact in fp32 too."""

ROWS_AT_ONCE = 1024
"""However many outliers a block claims to have, so much of them is in memory, and in the processor's cache."""


def product(codes: torch.Tensor, basis: torch.Tensor, into: torch.Tensor) -> None:
    """``codes`` ``[n, w, tokens]`` and ``basis`` ``[n, w, channels]``, int8, ``into`` fp32 ``[n, tokens, channels]``.

    Whole numbers, exact: of fp32 where int8 products are not exact, or not on a CPU. ``w`` is at most `WIDTH_LIMIT`.
    """
    if codes.device.type != "cpu" or not _is_exact():
        torch.bmm(codes.float().transpose(1, 2), basis.float(), out=into)
        return
    sums = into.view(torch.int32)
    for each, one, to in zip(codes, basis, sums, strict=True):
        _of_int8(each.t(), one, to)
    # A sum and its number are the same four bytes: there is less memory to go through.
    into.copy_(sums)


def add_outliers(numbers: torch.Tensor, matrices: torch.Tensor, rest: Outliers) -> None:
    """Add 256 times the ``rest`` of codes that int8 does not hold, times ``matrices`` ``[n, w, channels]``.

    ``numbers`` are ``[n, tokens, channels]``. Such codes are one in hundreds: each adds its row, and no precision that
    torch multiplies matrices in rounds that.
    """
    if not len(rest):
        return
    (count, width, channels), tokens = matrices.shape, numbers.shape[1]
    matrix, row, token = np.unravel_index(rest.places, (count, width, tokens))
    lines, rows = numbers.view(-1, channels), matrices.reshape(-1, channels)
    which, into = torch.from_numpy(matrix * width + row), torch.from_numpy(matrix * tokens + token)
    times = torch.from_numpy(rest.codes * np.float32(256))[:, None]
    for begin in range(0, len(rest), ROWS_AT_ONCE):
        part = slice(begin, begin + ROWS_AT_ONCE)
        given, place, code = (each[part].to(numbers.device) for each in (which, into, times))
        lines.index_add_(0, place, rows.index_select(0, given).float().mul_(code))


def _of_int8(rows: torch.Tensor, columns: torch.Tensor, to: torch.Tensor) -> None:
    torch._int_mm(rows, columns, out=to)  # noqa: SLF001 (it has no public name; without it fp32 is used)


@cache
def _is_exact() -> bool:
    """Whether torch has such a product, and its largest sums are right."""
    largest = torch.tensor([-128, 127], dtype=torch.int8, device="cpu")
    codes, basis = largest.repeat_interleave(64).repeat(64, 1), largest.repeat(64, 64)
    found = torch.empty((128, 128), dtype=torch.int32, device="cpu")
    try:
        _of_int8(codes.t(), basis[:64], found)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, (codes.t().double() @ basis[:64].double()).int())
