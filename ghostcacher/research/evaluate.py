"""``evaluate``: one codec on one model and some texts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ghostcacher.blocks import KVBlock, KVLayout, LayerSpec
from ghostcacher.codecs.base import TensorCodec
from ghostcacher.codecs.header import header_bytes
from ghostcacher.codecs.registry import CODECS, Finder, codec_named, factory_of
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.research.replay import Replay

PREFIX_TOKENS = 1024
SCORED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Measure:
    """What one codec costs.

    ``bits`` a value, everything stored but the JSON header, which takes ``header_bits`` more. ``kl`` is the mean
    divergence of the next token's distribution from the exact one, in nats a token, with the smallest and the largest
    of the texts. ``top1`` is how often the likeliest token is the same, ``perplexity_change`` relative, against the
    text. ``encode_share`` and ``decode_share`` are rates on bf16 state as shares of copying it: 1.0 is as fast as
    memory; processor time of this thread, medians over the texts.
    """

    codec: str
    bits: float
    header_bits: float
    kl: float
    kl_least: float
    kl_most: float
    top1: float
    perplexity_change: float
    encode_share: float
    decode_share: float

    def __str__(self) -> str:
        return (
            f"{self.codec}: {self.bits:.2f} bits, KL {self.kl:.1e} ({self.kl_least:.1e} to {self.kl_most:.1e}), "
            f"top-1 {self.top1:.1%}, perplexity {self.perplexity_change:+.2%}, "
            f"encode {self.encode_share:.2f} and decode {self.decode_share:.2f} of memcpy"
        )


@dataclass(frozen=True, slots=True)
class _Score:
    bits: float
    header_bits: float
    kl: float
    top1: float
    perplexity_change: float
    encode_share: float
    decode_share: float


def evaluate(
    model: Any, codec: str | TensorCodec, texts: Sequence[torch.Tensor] | Sequence[Replay], *,
    prefix_tokens: int = PREFIX_TOKENS, scored_tokens: int = SCORED_TOKENS, block_tokens: int = 128,
) -> Measure:  # fmt: skip
    """Code the first ``prefix_tokens`` of each text in blocks, put them back, and score the ``scored_tokens`` after.

    Args:
        model: a decoder of transformers.
        codec: a name such as ``"ec(0.25)"``, or a codec of your own.
        texts: token ids ``[1, tokens]`` each, or `Replay` objects, which several calls may share.
        prefix_tokens: whole blocks.
        scored_tokens: their own state stays exact, as after a restore.
        block_tokens: as in ``open_store``.

    Raises:
        ConfigurationError: an unknown codec, or a text that is too short.
        BlockError: the codec refuses the state (NaN, infinity).
    """
    chosen = codec_named(codec) if isinstance(codec, str) else codec
    scores = []
    for text in texts:
        if isinstance(text, Replay):
            replay = text
        else:
            replay = Replay.of(model, text[:, : prefix_tokens + scored_tokens], prefix_tokens, block_tokens)
        scores.append(_score(replay, chosen))
    kls = [score.kl for score in scores]
    name = codec if isinstance(codec, str) else chosen.name
    return Measure(
        name, _mean(s.bits for s in scores), _mean(s.header_bits for s in scores), _mean(kls), min(kls), max(kls),
        _mean(s.top1 for s in scores), _mean(s.perplexity_change for s in scores),
        statistics.median(s.encode_share for s in scores), statistics.median(s.decode_share for s in scores),
    )  # fmt: skip


def _score(replay: Replay, codec: TensorCodec) -> _Score:
    chain = CodecChain(codec)
    find = _finder(codec)
    blobs = [b"".join(chain.encode(block)) for block in replay.blocks]
    decoded = tuple(
        decode_blob(bytearray(blob), block.key, block.layout, find=find)
        for blob, block in zip(blobs, replay.blocks, strict=True)
    )
    values = sum(tensor.numel() for block in replay.blocks for tensor in block.tensors)
    header = sum(header_bytes(blob) for blob in blobs)
    exact, coded = replay.logits.log_softmax(-1).double(), replay.again(decoded).log_softmax(-1).double()
    kl = float((exact.exp() * (exact - coded)).sum(-1).mean())
    top1 = float((exact.argmax(-1) == coded.argmax(-1)).double().mean())
    encode_share, decode_share = _shares(replay.blocks, chain, find)
    return _Score(
        (sum(map(len, blobs)) - header) * 8 / values, header * 8 / values, kl, top1, _change(replay, exact, coded),
        encode_share, decode_share,
    )  # fmt: skip


def _change(replay: Replay, exact: torch.Tensor, coded: torch.Tensor) -> float:
    """Relative change of the perplexity of the text."""
    following = replay.rest[0, 1:, None].cpu()
    losses = [-logits[:-1].gather(-1, following).mean() for logits in (exact, coded)]
    return float((losses[1] - losses[0]).exp() - 1)


def _finder(codec: TensorCodec) -> Finder:
    """Finds ``codec``'s own class by its name, before any that is installed."""
    return lambda name: type(codec) if name == codec.name and name not in CODECS else factory_of(name)


def _shares(blocks: Sequence[KVBlock], chain: CodecChain, find: Finder) -> tuple[float, float]:
    """Rates of encoding and decoding bf16 state, as shares of the rate of copying it."""
    halves = [_in_bf16(block) for block in blocks if not block.key.is_snapshot]
    blobs = [bytearray(b"".join(chain.encode(block))) for block in halves]
    targets = [torch.zeros_like(tensor) for block in halves for tensor in block.tensors]
    sources = [tensor for block in halves for tensor in block.tensors]
    copying = _seconds(lambda: [target.copy_(source) for target, source in zip(targets, sources, strict=True)])
    encoding = _seconds(lambda: [chain.encode(block) for block in halves])
    decoding = _seconds(
        lambda: [
            decode_blob(blob, block.key, block.layout, find=find) for blob, block in zip(blobs, halves, strict=True)
        ]
    )
    return copying / encoding, copying / decoding


def _in_bf16(block: KVBlock) -> KVBlock:
    layers = tuple(
        LayerSpec(layer.kind, tuple(replace(t, dtype="bfloat16") if "float" in t.dtype else t for t in layer.tensors))
        for layer in block.layout.layers
    )
    tensors = tuple(t.bfloat16() if t.is_floating_point() else t for t in block.tensors)
    return KVBlock(block.key, KVLayout(layers, block.layout.rotation), tensors)


def _seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """Processor time of this thread, the median of some rounds after a first."""
    work()
    taken = []
    for _ in range(rounds):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return max(statistics.median(taken), 1e-9)


def _mean(values: Any) -> float:
    return statistics.fmean(values)
