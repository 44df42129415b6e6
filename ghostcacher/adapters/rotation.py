"""How a model turns its keys by position, found by looking at the keys it makes.

Codecs code keys better as they were before rope. That this is right is not a matter of trust: turning back and forth
is exact whatever was found, only the size of what is stored depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ghostcacher.blocks import Rotation

PROBE_TOKENS = 8
_UNLIKE = 1e-2


def rotation_of(module: Any, keys: Sequence[torch.Tensor]) -> Rotation | None:
    """The one rotation that all ``keys`` ``[rows, heads, tokens, channels]`` of equal tokens have in common, or None.

    Equal tokens at positions 0, 1, 2, … give equal keys before they are turned, in a model that knows positions by
    rope alone.
    """
    return next((each for each in _candidates(module) if keys and all(_explains(each, k) for k in keys)), None)


def _candidates(module: Any) -> Iterator[Rotation]:
    for name, buffer in module.named_buffers():
        if name.endswith("inv_freq") and buffer.dim() == 1 and not buffer.is_meta:
            frequencies = tuple(buffer.float().tolist())
            yield from (Rotation(frequencies), Rotation(frequencies, interleaved=True))


def _explains(rotation: Rotation, keys: torch.Tensor) -> bool:
    if 2 * len(rotation.frequencies) > keys.shape[-1]:
        return False
    before = rotation.at(0, keys.shape[-2]).back(keys.detach().cpu().to(torch.float32, copy=True))
    unlike = (before - before[..., :1, :]).abs().amax()
    return bool(unlike <= _UNLIKE * before.abs().amax())
