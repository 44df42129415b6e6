"""Weights that accelerate keeps elsewhere between forwards: their parameters are on the ``meta`` device.

Where they are is said by the ``weights_map`` of accelerate's `AlignDevicesHook`: in memory, or to be read from disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_PLAIN_TYPES = frozenset({torch.Tensor, nn.Parameter})


def held_in_memory(part: Any, name: str) -> torch.Tensor | None:
    """The tensor behind parameter ``name`` of ``part``, the same object every time; None if it is on disk."""
    weights = _weights_map(part)
    # accelerate's maps nest: one with a prefix, over a loader with what is in memory and an index of what is not.
    inner = getattr(weights, "dataset", weights)
    kept = getattr(inner, "state_dict", inner)
    found = kept.get(f"{getattr(weights, 'prefix', '')}{name}") if isinstance(kept, dict) else None
    return found if isinstance(found, torch.Tensor) else None


def read(part: Any, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The value of a parameter that is on the ``meta`` device; reads it from disk if it is there.

    Raises:
        ValueError: nobody says where it is, or it is quantized: its scales lie elsewhere still.
    """
    weights = _weights_map(part)
    if weights is None or type(parameter) not in _PLAIN_TYPES:
        raise ValueError(f"weight {name} of a {type(part).__name__} lies on the meta device")
    value: torch.Tensor = weights[name]
    return value


def is_offloaded(module: nn.Module) -> bool:
    """Whether any weight of ``module`` lies elsewhere between forwards."""
    return any(parameter.is_meta for parameter in module.parameters())


def _weights_map(part: Any) -> Mapping[str, torch.Tensor] | None:
    hook = getattr(part, "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):
        if getattr(each, "offload", False) and each.weights_map is not None:
            found: Mapping[str, torch.Tensor] = each.weights_map
            return found
    return None
