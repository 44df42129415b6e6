"""Which rows of codes share a frame: those whose codes spread alike."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

LIMIT = 8


class Sorted(NamedTuple):
    """Rows of one run by class: how many each class has, and where each row stands among them."""

    counts: list[int]
    places: torch.Tensor


class Classes:
    """Class of each row, ``numbers`` ``[layers, rows]`` U8, of ``count``. How runs are sorted is computed once."""

    def __init__(self, numbers: torch.Tensor, count: int = LIMIT) -> None:
        self.numbers, self.count = numbers, count
        self._sorted: dict[tuple[int, int], Sorted] = {}

    def chosen(self, run: slice) -> list[torch.Tensor]:
        """Rows of each class among all that the layers of ``run`` have."""
        of_rows = self.numbers[run].reshape(-1)
        return [(of_rows == number).nonzero()[:, 0] for number in range(self.count)]

    def sorted(self, run: slice) -> Sorted:
        """How rows of these layers stand in their frames. Kept."""
        found = self._sorted.get((run.start, run.stop))
        if found is None:
            of_rows = self.numbers[run].reshape(-1)
            order = np.argsort(of_rows.numpy(), kind="stable")
            places = np.empty_like(order)
            places[order] = np.arange(len(order))
            found = Sorted(of_rows.bincount(minlength=self.count).tolist(), torch.from_numpy(places))
            self._sorted[run.start, run.stop] = found
        return found


def one_class(layers: int) -> Classes:
    """One row a layer, all in one class."""
    return Classes(torch.zeros((layers, 1), dtype=torch.uint8, device="cpu"), 1)
