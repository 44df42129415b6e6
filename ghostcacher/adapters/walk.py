"""One quick walk over a model's parts, at every prompt: its tensors as they are now, and whether anyone hooks them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_TRUSTED = frozenset({"accelerate", "torch", "transformers"})


@dataclass(frozen=True, slots=True)
class Walk:
    """Parameters and buffers in a fixed order, and what must not be served.

    ``is_hooked`` if any part but the root carries foreign hooks. ``adapters`` is what no tensor says of peft's layers:
    which adapters are active, merged or switched off, and how they are scaled, in JSON; empty without peft.
    ``unknown`` is a class of peft's that says none of that, if there is one.
    """

    tensors: list[torch.Tensor]
    is_hooked: bool
    adapters: tuple[Any, ...] = ()
    unknown: str = ""


def walk(module: Any, is_ignored: Callable[[str], bool] | None = None) -> Walk:
    """Look at every part of ``module``. One pass, in place of ``parameters``, ``buffers`` and ``modules``.

    Buffers whose own name ``is_ignored`` are left out.
    """
    tensors: list[torch.Tensor] = []
    adapters: list[Any] = []
    is_hooked, unknown = False, ""
    parts = [module]
    while parts:
        part = parts.pop()
        tensors.extend(tensor for tensor in part._parameters.values() if tensor is not None)  # noqa: SLF001 (one pass instead of three)
        buffers = part._buffers  # noqa: SLF001 (one pass instead of three)
        tensors.extend(b for name, b in buffers.items() if b is not None and not (is_ignored and is_ignored(name)))
        parts.extend(inner for inner in part._modules.values() if inner is not None)  # noqa: SLF001
        if type(part).__module__.startswith("peft."):
            adapters.append(_adapter_state(part))
            unknown = unknown or ("" if adapters[-1] else type(part).__name__)
        if part is not module and (part._forward_hooks or part._forward_pre_hooks):  # noqa: SLF001 (no public name)
            hooks = itertools.chain(part._forward_hooks.values(), part._forward_pre_hooks.values())  # noqa: SLF001
            is_hooked = is_hooked or any(map(_is_foreign, hooks))
    return Walk(tensors, is_hooked, tuple(adapters), unknown)


def _adapter_state(part: Any) -> list[Any] | None:
    """Public attributes of a tuner layer; None for a part of peft's that has them not."""
    names = ("active_adapters", "merged_adapters", "disable_adapters")
    if not all(hasattr(part, name) for name in names):
        return None
    active = list(part.active_adapters)
    scaling = getattr(part, "scaling", {})
    return [active, list(part.merged_adapters), bool(part.disable_adapters), [scaling.get(name) for name in active]]


def _is_foreign(hook: object) -> bool:
    """Whether ``hook`` is neither transformers' (it records outputs by hooks that stay) nor torch's own."""
    function = getattr(hook, "func", hook)
    home = getattr(function, "__module__", None) or type(hook).__module__
    return home.partition(".")[0] not in _TRUSTED
