"""Products of codes and a basis, both int8: exact whole numbers, the same on every machine.

oneDNN has faster products of int8 than of bf16 or fp32. Processors without VNNI add pairs of products in 16 bits, where
large ones are cut off: whether this one is exact is tried once.
"""

from __future__ import annotations

from functools import cache

import torch

WIDTH_LIMIT = 1024
"""Sums of so many products of int8 are exact in fp32 too."""


def product(codes: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """``codes`` ``[n, w, tokens]`` and ``basis`` ``[n, w, channels]``, int8: ``[n, tokens, channels]``, whole numbers.

    They are int32, or fp32 where int8 products are not exact, or not on a CPU. ``w`` is at most `WIDTH_LIMIT`.
    """
    if codes.device.type != "cpu" or not _is_exact():
        return torch.bmm(codes.float().transpose(1, 2), basis.float())
    count, _, tokens = codes.shape
    sums = torch.empty((count, tokens, basis.shape[2]), dtype=torch.int32, device="cpu")
    for each, one, to in zip(codes, basis, sums, strict=True):
        _of_int8(each.t(), one, to)
    return sums


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
