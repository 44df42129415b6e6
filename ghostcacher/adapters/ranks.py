"""Models whose heads are shared out among processes: who this one is, and what all of them can agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ghostcacher.errors import UnsupportedModelError

VOTES = 2
"""How often a fill asks the others: how far it knows the prompt, and how far it has it in hand."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that hold one tensor-parallel model, seen from one of them."""

    rank: int
    size: int
    mesh: Any

    @classmethod
    def of(cls, module: Any) -> Ranks | None:
        """The ranks of ``module``, or None if it is whole.

        Raises:
            UnsupportedModelError: its parts are not laid out along one dimension.
        """
        if (getattr(module, "tp_size", None) or 1) <= 1:
            return None
        sharded = (p for p in module.parameters() if hasattr(p, "device_mesh"))
        mesh = getattr(next(sharded, None), "device_mesh", None)
        if mesh is None or mesh.ndim != 1:
            raise UnsupportedModelError("tensor parallel, and its weights do not say along which one dimension")
        return cls(int(mesh.get_local_rank()), int(mesh.size()), mesh)

    @property
    def identity(self) -> list[int]:
        """What of it changes the state that this rank computes: its heads."""
        return [self.rank, self.size]

    def least(self, *values: int) -> list[int]:
        """The least of each of ``values`` over all ranks. Every rank must ask, with as many values."""
        held = torch.tensor(values, dtype=torch.long, device=self.mesh.device_type)
        dist.all_reduce(held, op=dist.ReduceOp.MIN, group=self.mesh.get_group())
        least: list[int] = held.tolist()
        return least


class Votes:
    """What the ranks agree on for one prompt: each casts equally many votes, whatever happens to it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._cast = 0
        self.is_closed = False

    def least(self, columns: int) -> int:
        """The least of what the ranks say at this vote, at most ``columns``."""
        self._cast += 1
        return self._ranks.least(columns)[0]

    def close(self, columns: int) -> bool:
        """Cast what is left, for nothing; whether all ranks ended with the same ``columns``."""
        self.is_closed = True
        while self._cast < VOTES:
            self.least(0)
        least, negated = self._ranks.least(columns, -columns)
        return least == -negated
