"""Large buffers that are used again.

Filling 200 MB of fresh memory costs some 50,000 page faults, more than the copy itself. So on a CPU the latest freed
buffers are kept for the next prompt: at most two (keys and values), of 256 MiB each. Huge pages were tried: where
memory is fragmented, making one costs more than the 512 faults that it saves.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Sequence
from math import prod

import torch

KEPT_FROM_BYTES = 2**20
SPARES_KEPT = 2
SPARE_LIMIT_BYTES = 256 * 2**20

_handed_out: list[mmap.mmap] = []
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor; may hold what an earlier buffer of this process held."""
    size_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not KEPT_FROM_BYTES <= size_bytes <= SPARE_LIMIT_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    pages = _spare(size_bytes) or _fresh(size_bytes)
    return torch.frombuffer(pages, dtype=dtype, count=prod(shape)).view(shape)


def _fresh(size_bytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size_bytes)
    with _lock:
        _handed_out.append(pages)
    return pages


def _spare(size_bytes: int) -> mmap.mmap | None:
    """A freed buffer that fits without wasting half of it; forgets freed ones beyond the two latest."""
    with _lock:
        free = [pages for pages, count in zip(_handed_out, _references(_handed_out), strict=True) if count <= _unused()]
        fitting = next((pages for pages in reversed(free) if size_bytes <= len(pages) <= 2 * size_bytes), None)
        kept = {id(pages) for pages in free[-SPARES_KEPT:]} | {id(fitting)}
        dropped = {id(pages) for pages in free} - kept
        _handed_out[:] = [pages for pages in _handed_out if id(pages) not in dropped]
        return fitting


def _references(objects: Sequence[object]) -> list[int]:
    return [sys.getrefcount(each) for each in objects]


def _unused() -> int:
    """What `_references` counts for an object that only its list holds: it differs between Python versions."""
    return _references([object()])[0]
