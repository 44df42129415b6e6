"""One quick walk over a model's parts, at every prompt: its tensors as they are now, and whether anyone hooks them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ghostcacher.adapters.fingerprint import is_of_peft
from ghostcacher.adapters.offload import held_in_memory

_TRUSTED = frozenset({"accelerate", "torch", "transformers"})
_OFFSETS = "alora_offsets"
_ACTIVATED = "ALoraLinearVariant"

Activations = tuple[int | None, ...]
"""Per row, how many of the last columns run with adapters that were activated; None: none. One entry is for all."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Parameters and buffers in a fixed order, and what must not be served.

    ``is_hooked`` if any part but the root carries foreign hooks. ``adapters`` is what no tensor says of peft's layers:
    which adapters are active, merged or switched off, and how they are scaled, in JSON; empty if each of them computes
    what the layer inside does. ``unknown`` is a class of peft's that says none of that, if there is one.
    ``activations`` is from where aLoRA (https://arxiv.org/abs/2504.12397) acts in the forward that is beginning.
    """

    tensors: list[torch.Tensor]
    is_hooked: bool
    adapters: tuple[Any, ...] = ()
    unknown: str = ""
    activations: Activations = ()


def walk(module: Any, is_ignored: Callable[[str], bool] | None = None) -> Walk:
    """Look at every part of ``module``. One pass, in place of ``parameters``, ``buffers`` and ``modules``.

    Buffers whose own name ``is_ignored`` are left out.
    """
    tensors: list[torch.Tensor] = []
    adapters: list[Any] = []
    offsets: set[Activations] = set()
    is_hooked, unknown = False, ""
    parts = [module]
    while parts:
        part = parts.pop()
        tensors.extend(_at_hand(part))
        buffers = part._buffers  # noqa: SLF001 (one pass instead of three)
        tensors.extend(b for name, b in buffers.items() if b is not None and not (is_ignored and is_ignored(name)))
        parts.extend(inner for inner in part._modules.values() if inner is not None)  # noqa: SLF001 (one pass instead of three)
        if is_of_peft(part):
            adapters.append(_adapter_state(part))
            unknown = unknown or ("" if adapters[-1] is not None else type(part).__name__)
        if part is not module and (part._forward_hooks or part._forward_pre_hooks):  # noqa: SLF001 (no public name)
            hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]  # noqa: SLF001 (no public name)
            offsets.update(given := _offsets(hooks))
            is_hooked = is_hooked or sum(map(_is_foreign, hooks)) > len(given)
    is_hooked = is_hooked or len(offsets) > 1
    found = tuple(adapters) if any(adapters) else ()
    return Walk(tensors, is_hooked, found, unknown, next(iter(offsets), ()))


def _at_hand(part: Any) -> Iterator[torch.Tensor]:
    """A part's own parameters, or what is in memory of those that accelerate offloaded."""
    for name, parameter in part._parameters.items():  # noqa: SLF001 (one pass instead of three)
        if parameter is None:
            continue
        if not parameter.is_meta:
            yield parameter
        elif (held := held_in_memory(part, name)) is not None:
            yield held


def _adapter_state(part: Any) -> list[Any] | None:
    """Public attributes of a tuner layer, none if it computes what its inner layer does; None if it has them not.

    An activated adapter does so too, where it is not activated.
    """
    names = ("active_adapters", "merged_adapters", "disable_adapters")
    if not all(hasattr(part, name) for name in names):
        return None
    active, variants = list(part.active_adapters), getattr(part, "lora_variant", {})
    kinds = [type(variants.get(name)).__name__ for name in active]
    if not part.merged_adapters and (part.disable_adapters or (active and set(kinds) == {_ACTIVATED})):
        return []
    scaling = getattr(part, "scaling", {})
    scales = [scaling.get(name) for name in active]
    return [active, list(part.merged_adapters), bool(part.disable_adapters), scales, kinds]


def _offsets(hooks: Iterable[object]) -> list[Activations]:
    """What peft's hooks for activated adapters say."""
    partials = [hook for hook in hooks if isinstance(hook, functools.partial) and set(hook.keywords) == {_OFFSETS}]
    return [tuple(hook.keywords[_OFFSETS]) for hook in partials if _is_from_peft(hook.func)]


def _is_from_peft(function: object) -> bool:
    return str(getattr(function, "__module__", "")).startswith("peft.")


def _is_foreign(hook: object) -> bool:
    """Whether ``hook`` is neither transformers' (it records outputs by hooks that stay) nor torch's own."""
    function = getattr(hook, "func", hook)
    home = getattr(function, "__module__", None) or type(hook).__module__
    return home.partition(".")[0] not in _TRUSTED
