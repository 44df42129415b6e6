"""Torch's autocast: under it a forward computes in another dtype, and leaves other state in the cache.

It may be on for a thread, around a forward, or turned on within: accelerate's ``prepare`` puts a wrapper around a
model's ``forward`` for mixed precision.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_KINDS = ("cpu", "cuda", "mps", "xpu", "hpu")


def autocasts() -> tuple[str, ...]:
    """What is on for this thread, such as ``("cuda torch.bfloat16",)``."""
    return tuple(f"{kind} {torch.get_autocast_dtype(kind)}" for kind in _KINDS if torch.is_autocast_enabled(kind))


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """None for this thread."""
    with contextlib.ExitStack() as stack:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def noted_within(module: Any) -> Iterator[list[tuple[str, ...]]]:
    """Notes what is on where this thread's forwards of ``module`` embed their tokens."""
    noted: list[tuple[str, ...]] = []
    thread = threading.get_ident()

    def note(*_: object) -> None:
        if threading.get_ident() == thread:
            noted.append(autocasts())

    handle = module.get_input_embeddings().register_forward_pre_hook(note)
    try:
        yield noted
    finally:
        handle.remove()


def is_prepared(module: Any) -> bool:
    """Whether accelerate's ``prepare`` put a wrapper for mixed precision around ``forward``."""
    return "_original_forward" in vars(module)
