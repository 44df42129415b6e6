"""What `kvt` has learned of one model: how much each channel matters, and which channels move together.

An asset is a safetensors file, named by the SHA-256 of its bytes. Blocks name the asset they were coded with: without
it they cannot be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ghostcacher.blocks import Rotation, TensorGroup
from ghostcacher.codecs.classes import LIMIT, Classes
from ghostcacher.codecs.curves import between, checked_costs, checked_curve, cost_of
from ghostcacher.codecs.heads import Heads
from ghostcacher.codecs.products import WIDTH_LIMIT
from ghostcacher.errors import BlockError

FORMAT = 2
KEPT_STEPS = 8
_MIDDLE_CLASS = 4
_HALF_OCTAVE = 0.5**0.5
_BASIS_RANK = 4
_BASIS_LARGEST = 127
_PARTS = ("mean", "basis", "scale", "spread")
_DIGEST_CHARS = 64


class Restoring(NamedTuple):
    """A table's channels plane by plane: ``mean`` and ``scale`` ``[layers, parts, w]``, ``basis`` one row a code."""

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True, eq=False)
class Table:
    """Of one tensor over its layers, with n = heads * channels in some parts of equal width w; keys before rope.

    State is ``mean + step * scale * (basis @ codes)``, part by part, where codes of equal size cost equal divergence.
    ``mean``, ``scale`` and ``spread`` are ``[layers, n]`` fp32, ``basis`` ``[layers, parts, w, w]`` int8; ``spread`` is
    how far codes spread at step 1.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, mean: torch.Tensor, basis: torch.Tensor, spread: torch.Tensor) -> Self:
        """With the whole numbers nearest to a ``basis`` of floats, scaled channel by channel.

        That turns its columns a little against each other. Nothing is lost: codes are what the inverse gives.
        """
        largest = basis.float().abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        scale = largest / _BASIS_LARGEST
        return cls(mean, (basis / scale).round().to(torch.int8), scale.view(mean.shape), spread)

    @cached_property
    def analysis(self) -> torch.Tensor:
        """The inverse of scale and basis in fp32: state to codes."""
        # One by one: in batches, MKL's inverse fails now and then beside other threads.
        matrices = self._scaled().flatten(0, 1).contiguous()
        try:
            inverses = [torch.linalg.inv(matrix) for matrix in matrices]
        except RuntimeError as error:
            raise BlockError("tables", "a basis that cannot be inverted") from error
        return torch.stack(inverses).view(self.basis.shape).float()

    @cached_property
    def reach(self) -> float:
        """How far a value may be off at step 1, at most."""
        return float(self._scaled().abs().sum(dim=-1).amax()) / 2

    def _scaled(self) -> torch.Tensor:
        return self.basis.double() * self.scale.double().view(*self.basis.shape[:3], 1)

    def in_planes(self, heads: Heads, device: torch.device) -> Restoring:
        """This table as decoding with ``heads`` wants it. Kept: making it costs as much as decoding a block."""
        kept = self._in_planes.get((heads.heads, heads.channels, device))
        if kept is None:
            layers, parts, width, _ = self.basis.shape
            order = heads.order
            basis = self.basis[:, :, order].transpose(2, 3).contiguous()
            mean, scale = (each.view(layers, parts, width)[..., order] for each in (self.mean, self.scale))
            kept = Restoring(mean.to(device), basis.to(device), scale.to(device))
            self._in_planes[heads.heads, heads.channels, device] = kept
        return kept

    @cached_property
    def classes(self) -> Callable[[float], Classes]:
        """Of a step: octaves of how far each channel's codes spread at it, ``[layers, channels]``. Some are kept.

        A reader must find the same ones: nothing here is rounded differently on another machine.
        """
        return lru_cache(KEPT_STEPS)(self._classes_at)

    def _classes_at(self, step: float) -> Classes:
        mantissa, exponent = torch.frexp((self.spread.double() / step).clamp(min=2.0**-_MIDDLE_CLASS))
        octaves = exponent - 1 + (mantissa >= _HALF_OCTAVE).int()
        return Classes((octaves + _MIDDLE_CLASS).clamp(0, LIMIT - 1).to(torch.uint8))

    @cached_property
    def _in_planes(self) -> dict[tuple[int, int, torch.device], Restoring]:
        return {}

    def fits(self, group: TensorGroup) -> bool:
        """Whether it is of tensors of this shape."""
        layers, heads, _, channels = group.shape(1)
        return tuple(self.mean.shape) == (layers, heads * channels) and self.basis.shape[2] % channels == 0


@dataclass(frozen=True, eq=False)
class Tables:
    """One asset: a `Table` by group name, how keys were turned, and the model's ``curve``.

    ``curve`` are pairs of step and KL in nats a token, measured when they were made, and ``costs`` the KL of other
    codecs by their spoken name. Equal if their bytes are.
    """

    groups: Mapping[str, Table]
    rotation: Rotation | None
    curve: tuple[tuple[float, float], ...]
    model: str = ""
    costs: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def blob(self) -> bytes:
        """The asset's bytes."""
        tensors = {
            f"{name}.{part}": getattr(table, part).contiguous()
            for name, table in self.groups.items() for part in _PARTS
        }  # fmt: skip
        turned = self.rotation and [list(self.rotation.frequencies), self.rotation.interleaved]
        document = {
            "format": FORMAT, "model": self.model, "rotation": turned, "curve": self.curve, "costs": dict(self.costs),
        }  # fmt: skip
        return save(tensors, {"ghostcacher": json.dumps(document, separators=(",", ":"), sort_keys=True)})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `blob`, in hexadecimal."""
        return hashlib.sha256(self.blob).hexdigest()

    @classmethod
    def parse(cls, blob: bytes, digest: str) -> Self:
        """The tables in ``blob``, which must be the asset named ``digest``.

        Raises:
            BlockError: ``tables``: other bytes, or not what `blob` gives.
        """
        if hashlib.sha256(blob).hexdigest() != digest:
            raise BlockError("tables", f"the asset {digest[:12]} does not have that content")
        try:
            tensors = load(blob)
            header_bytes = int.from_bytes(blob[:8], "little")
            document = json.loads(json.loads(blob[8 : 8 + header_bytes])["__metadata__"]["ghostcacher"])
            if document["format"] != FORMAT:
                raise BlockError("tables", f"format {document['format']!r}, this reader knows {FORMAT}")
            names = {name.rpartition(".")[0] for name in tensors}
            groups = {name: _checked(*(tensors[f"{name}.{part}"] for part in _PARTS)) for name in names}
            parsed = cls(groups, _rotation(document["rotation"]), checked_curve(document["curve"]),
                         str(document["model"]), checked_costs(document.get("costs", {})))  # fmt: skip
        except (SafetensorError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
            raise BlockError("tables", f"not an asset of tables ({type(error).__name__})") from error
        vars(parsed).update(blob=blob, digest=digest)  # as they are: another writer may order them otherwise
        return parsed

    def step(self, kl: float) -> float:
        """The step at which the curve reaches ``kl`` nats a token; beyond its ends it goes on as at them."""
        return between([(known, step) for step, known in self.curve], kl)

    def kl(self, step: float) -> float:
        """What the curve says of ``step``: the inverse of `step`."""
        return between(self.curve, step)

    def cost(self, codec: str) -> float | None:
        """What ``codec`` (its spoken name) costs on this model, in nats a token; None if that was not measured."""
        return cost_of(codec, {**{f"kvt({step:g})": kl for step, kl in self.curve}, **self.costs})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tables) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


class TablesSource(Protocol):
    """Where assets are kept."""

    def of_model(self, weights: str) -> Tables | None:
        """The newest tables of the model with these weights; see `KVLayout.weights`."""
        ...

    def named(self, digest: str) -> Tables | None:
        """The tables with this content."""
        ...


def is_digest(text: object) -> bool:
    """Whether ``text`` may name an asset."""
    return isinstance(text, str) and len(text) == _DIGEST_CHARS and set(text) <= set("0123456789abcdef")


def _checked(mean: torch.Tensor, basis: torch.Tensor, scale: torch.Tensor, spread: torch.Tensor) -> Table:
    layers, n = mean.shape
    is_square = basis.dim() == _BASIS_RANK and basis.shape[2] == basis.shape[3] <= WIDTH_LIMIT
    is_whole = is_square and basis.shape[0] == layers and basis.shape[1] * basis.shape[2] == n
    numbers = (mean, scale, spread)
    if not is_whole or basis.dtype != torch.int8 or any(each.dtype != torch.float32 for each in numbers):
        raise ValueError("shapes or dtypes that do not fit each other")
    if any(each.shape != mean.shape or not bool(torch.isfinite(each).all()) for each in numbers):
        raise ValueError("numbers that are none")
    return Table(mean, basis, scale, spread)


def _rotation(turned: Any) -> Rotation | None:
    return None if turned is None else Rotation(tuple(map(float, turned[0])), bool(turned[1]))
