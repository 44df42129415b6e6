"""Whether what the tiers hold is what the model computes: all that finds a writer who lies and has the key."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ghostcacher.blocks import KVBlock
from ghostcacher.codecs.safetensors_format import decode_blob
from ghostcacher.events import CacheEvent, Observer
from ghostcacher.keys import BlockKey, PrefixChain
from ghostcacher.tiers.base import Tier
from ghostcacher.tiers.decoded import DecodedTier
from ghostcacher.tiers.encoded import EncodedTier
from ghostcacher.tiers.forgetting import forget
from ghostcacher.tiers.writer import Job

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far state that was computed in other pieces may be off, as a share of the layer's largest value."""


class Auditing:
    """Compares, for a ``share`` of the served prompts, what ``tiers`` hold with what the model computes from nothing.

    Exact blocks only. What differs by more than rounding is deleted if ``deletes``, with all that goes on from it.
    ``submit`` takes the work, for later.
    """

    def __init__(
        self, tiers: Sequence[Tier], share: float, submit: Callable[[Job], bool], observe: Observer, *, deletes: bool
    ) -> None:
        self._tiers, self._share, self._submit = tuple(tiers), share, submit
        self._observe, self._deletes = observe, deletes
        self._chance = secrets.SystemRandom()
        self.audited = 0
        self.disproved = 0

    def wants(self) -> bool:
        """Whether a prompt that was just served is one of them, by chance that no seed of the caller decides."""
        return self._share > 0 and self._chance.random() < self._share

    def belief(self) -> Callable[[], bool]:
        """Asks whether nothing has been disproved since now: else what was restored by then is not gone on from."""
        before = self.disproved
        return lambda: self.disproved == before

    def audit(self, chain: PrefixChain, compute: Callable[[], Sequence[KVBlock]]) -> None:
        """Look at what the tiers hold of ``chain``, whose blocks ``compute`` gives."""
        self._submit(Job(lambda: self._look(chain, compute()), 0))

    def _look(self, chain: PrefixChain, computed: Sequence[KVBlock]) -> None:
        compared = list(_compared(self._tiers, computed))
        wrong = [(tier, key) for tier, key, is_like in compared if not is_like]
        self.audited += len({key.digest for _, key, _ in compared})
        self.disproved += len({key.digest for _, key in wrong})
        for tier, key in wrong:
            self._observe(CacheEvent("rejected", "audit: not what the model computes", tier.name, key.length))
        if wrong and self._deletes:
            forget(self._tiers, chain, min(key.start for _, key in wrong))


def _compared(tiers: Iterable[Tier], computed: Sequence[KVBlock]) -> Iterator[tuple[Tier, BlockKey, bool]]:
    """Every exact block that a tier holds, and whether it is like the computed one.

    How far a lossy one may be off nobody knows: what came before it was coded too, at one time or another.
    """
    for tier in tiers:
        for block in computed:
            held = _held(tier, block)
            if held is not None and not held.lossy:
                yield tier, block.key, _is_like(held, block)


def _held(tier: Tier, block: KVBlock) -> KVBlock | None:
    """What ``tier`` holds in the place of ``block``."""
    if isinstance(tier, DecodedTier):
        return tier.get(block.key)
    if not isinstance(tier, EncodedTier) or block.key.digest not in tier.index:
        return None
    coded = tier.stored(block.key, block.layout)
    if coded is None or coded.header.lossy:
        return None
    return decode_blob(bytearray(b"".join(coded.blob)), block.key, block.layout, find=tier.chain.find)


def _is_like(held: KVBlock, computed: KVBlock) -> bool:
    for old, new in zip(held.tensors, computed.tensors, strict=True):
        allowed = TOLERANCE.get(new.dtype, 0.0) * _largest(new)
        if not bool((_largest(old.cpu().float() - new.cpu().float()) <= allowed).all()):
            return False
    return True


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Of each layer, ``[layers]`` in fp32 on the CPU; NaN where there is one."""
    return values.cpu().float().abs().flatten(1).amax(dim=1)
