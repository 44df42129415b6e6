"""What the weights of a model are, by value: a digest that notices every change it can see, cheaply.

Version counters alone miss fused optimizers, writes through ``.data`` and merged adapters. So at each prompt the
identity, address, version and 16 values of every tensor are compared (about 1 ms for 272 tensors), and an
optimizer step or ``load_state_dict`` forces the full digest (XXH3, about 25 ms for half a gigabyte). A write to a
few values through ``.data`` or a raw pointer that touches none of the sampled ones is seen by ``always`` only, and
so is a change of weights that accelerate offloaded to disk.
``state_dict()`` is never called: it damages 4-bit weights of bitsandbytes on a CPU.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ghostcacher.adapters import offload
from ghostcacher.transfers import chunks

SAMPLED_VALUES = 16

_WRAPPED_NAMES = frozenset({"base_layer", "original_module"})
_PLAIN_TYPES = frozenset({torch.Tensor, nn.Parameter})
_steps = itertools.count(1)
_steps_taken = [0]


@dataclass(frozen=True, slots=True)
class Weights:
    """Digests, in hexadecimal: of the model as it is without adapters, and of the adapters that peft put into it."""

    base: str
    adapters: str


class WeightsFingerprint:
    """The digests of one model's weights, kept up to date."""

    def __init__(self, is_ignored: Callable[[str], bool] | None = None) -> None:
        """Of all tensors but the buffers whose own name ``is_ignored``."""
        _watch_optimizers()
        self._is_ignored = is_ignored
        self._seen: tuple[object, ...] | None = None
        self._steps_seen = 0
        self._digests = Weights("", "")
        self.full_digests = 0

    def current(self, module: Any, tensors: Sequence[torch.Tensor], *, always: bool = False) -> Weights:
        """The digests of ``module``'s weights now; ``tensors`` are those that a `walk` of it found.

        Raises:
            ValueError: weights lie on the ``meta`` device and cannot be read.
        """
        seen = (tuple(map(_identity, tensors)), _sample(tensors))
        if always or seen != self._seen or self._steps_seen != _steps_taken[0]:
            self._steps_seen = _steps_taken[0]
            self._digests = self._full(module)
            self.full_digests += 1
            self._seen = seen
        return self._digests

    def expire(self, *_: object) -> None:
        """Take the full digest at the next prompt. Fits ``register_load_state_dict_post_hook``."""
        self._seen = None

    def _full(self, module: Any) -> Weights:
        wrapped = {name for name, part in module.named_modules() if is_of_peft(part)}
        base: dict[str, torch.Tensor] = {}
        adapters: dict[str, torch.Tensor] = {}
        for name, tensor in self._named_tensors(module):
            known = _base_name(name, wrapped)
            (base if known else adapters).update(_parts(known or name, tensor))
        return Weights(full_digest(base), full_digest(adapters))

    def _named_tensors(self, module: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in module.named_parameters():
            yield name, _at_hand(module, name, parameter)
        for name, tensor in module.named_buffers():
            if not (self._is_ignored and self._is_ignored(name.rpartition(".")[2])):
                yield name, tensor


def full_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over name, dtype, shape and XXH3-128 of every tensor's bytes; equal across processes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        content = xxhash.xxh3_128()
        for chunk in chunks(tensor):
            content.update(chunk)
        state.update(content.digest())
    return state.hexdigest()


def is_of_peft(part: object) -> bool:
    """Whether ``part`` of a model is a layer that peft put around one of the model's own."""
    return type(part).__module__.startswith("peft.")


def _at_hand(module: Any, name: str, parameter: torch.Tensor) -> torch.Tensor:
    if not parameter.is_meta:
        return parameter
    owner, _, own_name = name.rpartition(".")
    return offload.read(module.get_submodule(owner), own_name, parameter)


def _base_name(name: str, wrapped: AbstractSet[str]) -> str | None:
    """The name that a tensor has without peft's wrappers, or None if it belongs to an adapter."""
    path, kept, is_inside = "", [], False
    for part in name.split("."):
        if is_inside and part not in _WRAPPED_NAMES:
            return None
        if not is_inside:
            kept.append(part)
        path = f"{path}.{part}" if path else part
        is_inside = path in wrapped
    return ".".join(kept)


def _watch_optimizers() -> None:
    """Count every optimizer step of this process, fused ones too; once."""
    if not getattr(_watch_optimizers, "is_watching", False):
        register_optimizer_step_post_hook(_count_step)
        _watch_optimizers.is_watching = True  # type: ignore[attr-defined]


def _count_step(*_: object) -> None:
    _steps_taken[0] = next(_steps)


def _parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    plain = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if plain.device.type == "meta":
        raise ValueError(f"weight {name} lies on the meta device")
    if hasattr(plain, "__tensor_flatten__") and type(plain) not in _PLAIN_TYPES:
        for inner in plain.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{inner}", getattr(plain, inner))
        return
    yield name, plain
    quantization: Any = getattr(tensor, "quant_state", None)
    if quantization is not None:
        for key, part in quantization.as_dict(packed=True).items():
            if isinstance(part, torch.Tensor):
                yield f"{name}.{key}", part
    scale = getattr(tensor, "SCB", None)
    if isinstance(scale, torch.Tensor):
        yield f"{name}.SCB", scale


def _identity(tensor: torch.Tensor) -> tuple[int, int, int]:
    version = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 (torch has no public name for it)
    address = tensor.data_ptr() if type(tensor) in _PLAIN_TYPES else 0
    return id(tensor), address, version


@torch.no_grad()
def _sample(tensors: Sequence[torch.Tensor]) -> tuple[bytes, ...]:
    by_kind: defaultdict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for held in tensors:
        tensor = held.to_local() if hasattr(held, "to_local") else held
        count = tensor.numel()
        if count and not tensor.is_meta and type(tensor) in _PLAIN_TYPES and tensor.is_contiguous():
            step = max(1, count // SAMPLED_VALUES)
            taken = tensor.as_strided((min(count, SAMPLED_VALUES),), (step,))
            by_kind[tensor.dtype, tensor.device].append(taken)
    return tuple(bytes_of(torch.cat(parts)).tobytes() for parts in by_kind.values())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a plain tensor, in the order of its elements."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
    view: memoryview = flat.numpy().data
    return view
