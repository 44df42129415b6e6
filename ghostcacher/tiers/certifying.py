"""Coding what a prompt left within the user's budget: code, replay, take a finer codec until the replay keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from ghostcacher.blocks import KVBlock, KVLayout
from ghostcacher.codecs.header import Certificate
from ghostcacher.codecs.quality import MARGIN, QualityCodec, Rung, divergence
from ghostcacher.codecs.safetensors_format import CodecChain, Coded, decode_blob
from ghostcacher.errors import BlockError
from ghostcacher.keys import BlockKey, PrefixChain
from ghostcacher.tiers.encoded import EncodedTier


class Trial(Protocol):
    """A cache to be filled with the blocks of ``keys``, and what the model then says of the tokens that follow."""

    keys: tuple[BlockKey, ...]

    def place(self, block: KVBlock) -> None:
        """Take one of ``keys``."""
        ...

    def logits(self) -> torch.Tensor:
        """``[tokens, vocabulary]``, after every key was placed."""
        ...


class Guard(Protocol):
    """Makes trials of the model whose state is captured."""

    def trial(self, chain: PrefixChain, end: int) -> Trial | None:
        """Of the last tokens before ``end``; None if that cannot be done."""
        ...


class Replayable(Protocol):
    """A capture, as far as coding it within a budget needs it."""

    @property
    def layout(self) -> KVLayout:
        """Of its blocks."""
        ...

    @property
    def guard(self) -> Guard | None:
        """What runs the model again on coded blocks, if that can be done."""
        ...

    @property
    def held_from(self) -> int:
        """The first token of whose state all is held: windows let go of what has left them."""
        ...

    def chain(self) -> PrefixChain:
        """All tokens whose state it holds. Reads decoded token ids."""
        ...

    def block(self, key: BlockKey) -> KVBlock:
        """A copy of the state of any block from `held_from` on, sharing no memory with the model's cache."""
        ...


def certify(tier: EncodedTier, capture: Replayable, keys: Sequence[BlockKey], model: str) -> Mapping[bytes, Coded]:
    """Blocks of ``keys``, by digest, coded so that ``tier`` keeps its budget; none if no codec does.

    Whole blocks only: an open one waits in the model's own dtype. Blocks of the prompt that the tier holds already take
    part in the replay as they lie there.

    Raises:
        What the model raises when it is run.
    """
    budget, chain = tier.chain.codec, capture.chain()
    whole = [key for key in keys if not key.is_snapshot and key.length == chain.block_tokens]
    exact = capture.guard.trial(chain, len(chain)) if capture.guard is not None and whole else None
    if exact is None or not isinstance(budget, QualityCodec):
        return {}
    ancestors = [key for key in exact.keys if key.end <= whole[0].start]
    spent = _spent(tier, capture.block(whole[0]), ancestors, capture.layout)
    if spent >= budget.kl:
        return {}
    expected = _replayed(exact, tier, capture, {})
    for rung in budget.rungs(capture.layout, budget.kl - spent):
        coded = _coded(rung, capture, whole, model)
        trial = capture.guard.trial(chain, len(chain)) if coded and capture.guard is not None else None
        kl = divergence(expected, _replayed(trial, tier, capture, coded)) if trial is not None else math.inf
        if kl * MARGIN <= budget.kl - spent:
            certificate = Certificate(budget.kl, rung.predicted, spent + max(0.0, kl))
            return {digest: each.certified(certificate) for digest, each in coded.items()}
    return {}


def _spent(tier: EncodedTier, block: KVBlock, ancestors: Sequence[BlockKey], layout: KVLayout) -> float:
    """What the state below ``block`` has cost already, if it was restored: a replay cannot see that.

    All of a budget if what was restored has no certificate.
    """
    return max((_cost(tier, key, layout) for key in ancestors), default=math.inf) if block.lossy else 0.0


def _cost(tier: EncodedTier, key: BlockKey, layout: KVLayout) -> float:
    entry = tier.index.get(key.digest)
    if entry is not None and not entry.codec:
        tier.stored(key, layout)  # it was only named so far: its header tells
        entry = tier.index.get(key.digest)
    if entry is None or not entry.codec or (entry.lossy and entry.kl is None):
        return math.inf
    return entry.kl or 0.0


def _coded(rung: Rung, capture: Replayable, keys: Sequence[BlockKey], model: str) -> dict[bytes, Coded]:
    """Every block by one codec; none if it refuses any."""
    chain = CodecChain(rung.codec)
    try:
        return {key.digest: chain.code(capture.block(key), model=model) for key in keys}
    except BlockError:
        return {}


def _replayed(trial: Trial, tier: EncodedTier, capture: Replayable, coded: Mapping[bytes, Coded]) -> torch.Tensor:
    """Logits on ``coded`` blocks; of the rest, on what the tier holds if any are coded, else on what was computed."""
    for key in trial.keys:
        held = coded.get(key.digest)
        if held is None and (coded or key.start < capture.held_from):
            held = tier.stored(key, capture.layout) if key.digest in tier.index else None
        if held is None:
            trial.place(capture.block(key))
        else:
            blob = bytearray(b"".join(held.blob))
            trial.place(decode_blob(blob, key, capture.layout, find=tier.chain.find))
    return trial.logits()
