"""``evaluate``: one codec on one model and some texts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ghostcacher.blocks import KVBlock, KVLayout, LayerSpec, TensorGroup
from ghostcacher.codecs.base import Piece, TensorCodec
from ghostcacher.codecs.header import header_bytes
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.quality import divergence
from ghostcacher.codecs.registry import CODECS, Finder, codec_named, factory_of, record_of
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.codecs.spoken import spoken
from ghostcacher.research.replay import Replay

PREFIX_TOKENS = 1024
SCORED_TOKENS = 256
MEASURED_BYTES = 48 * 2**20
Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Measure:
    """What one codec costs.

    ``bits`` a value, everything stored but the JSON header, which takes ``header_bits`` more. ``kl`` is the mean
    divergence of the next token's distribution from the exact one, in nats a token, with the smallest and the largest
    of the texts. ``top1`` is how often the likeliest token is the same, ``perplexity_change`` relative, against the
    text. ``encode_share`` and ``decode_share`` are rates on bf16 state as shares of copying it: 1.0 is as fast as
    memory; processor time of one thread, in turn with copies, on the first text, into memory used before. Checksums
    are not in them.
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


def evaluate(
    model: Any, codec: str | TensorCodec, texts: Sequence[torch.Tensor] | Sequence[Replay], *,
    prefix_tokens: int = PREFIX_TOKENS, scored_tokens: int = SCORED_TOKENS, block_tokens: int = 128,
    is_timed: bool = True,
) -> Measure:  # fmt: skip
    """Code the first ``prefix_tokens`` of each text in blocks, put them back, and score the ``scored_tokens`` after.

    Args:
        model: a decoder of transformers.
        codec: a name such as ``"ec(0.25)"``, or a codec of your own.
        texts: token ids ``[1, tokens]`` each, or `Replay` objects, which several calls may share.
        prefix_tokens: whole blocks.
        scored_tokens: their own state stays exact, as after a restore.
        block_tokens: as in ``open_store``.
        is_timed: whether to measure rates too; they are NaN else.

    Raises:
        ConfigurationError: an unknown codec, or a text that is too short.
        BlockError: the codec refuses the state (NaN, infinity).
    """
    chosen = codec_named(codec) if isinstance(codec, str) else codec
    replays = [
        text if isinstance(text, Replay)
        else Replay.of(model, text[:, : prefix_tokens + scored_tokens], prefix_tokens, block_tokens)
        for text in texts
    ]  # fmt: skip
    scores = [_score(replay, chosen) for replay in replays]
    bits, header_bits, kls, top1s, changes = zip(*scores, strict=True)
    name = codec if isinstance(codec, str) else spoken(record_of(chosen))
    rates = _shares(replays[0].blocks, chosen) if is_timed else (math.nan, math.nan)
    mean = statistics.fmean
    return Measure(
        name, mean(bits), mean(header_bits), mean(kls), min(kls), max(kls), mean(top1s), mean(changes),
        *rates,
    )  # fmt: skip


def _score(replay: Replay, codec: TensorCodec) -> tuple[float, float, float, float, float]:
    """Bits, bits of headers, and `quality`."""
    blobs, decoded = zip(*(coded(block, codec) for block in replay.blocks), strict=True)
    values = sum(tensor.numel() for block in replay.blocks for tensor in block.tensors)
    header = sum(header_bytes(blob) for blob in blobs)
    bits, header_bits = (sum(map(len, blobs)) - header) * 8 / values, header * 8 / values
    return bits, header_bits, *quality(replay, replay.again(decoded))


def coded(block: KVBlock, codec: TensorCodec) -> tuple[bytes, KVBlock]:
    """A block as ``codec`` stores it, and as it comes back."""
    blob = b"".join(CodecChain(codec).encode(block))
    return blob, decode_blob(bytearray(blob), block.key, block.layout, find=_finder(codec))


def quality(replay: Replay, logits: torch.Tensor) -> tuple[float, float, float]:
    """KL, top-1 agreement and relative change of perplexity of ``logits`` ``[tokens, vocabulary]`` for the rest."""
    exact, coded = replay.logits.log_softmax(-1).double(), logits.log_softmax(-1).double()
    kl = divergence(replay.logits, logits)
    top1 = float((exact.argmax(-1) == coded.argmax(-1)).double().mean())
    following = replay.rest[0, 1:, None].cpu()
    losses = [-each[:-1].gather(-1, following).mean() for each in (exact, coded)]
    return kl, top1, float((losses[1] - losses[0]).exp() - 1)


def _finder(codec: TensorCodec) -> Finder:
    """Finds ``codec`` itself if it has tables, and its own class by its name, before any that is installed."""
    if isinstance(codec, KvtCodec):
        return lambda name: (lambda **_: codec) if name == codec.name else factory_of(name)
    return lambda name: type(codec) if name == codec.name and name not in CODECS else factory_of(name)


def _shares(blocks: Sequence[KVBlock], codec: TensorCodec) -> tuple[float, float]:
    """Rates of encoding and decoding bf16 state on one thread, as shares of the rate of copying it.

    Both are given memory that was touched before, and so much of it that it lies in no cache. The codec alone:
    checksums are not in it.
    """
    halves = [_in_bf16(block) for block in blocks if not block.key.is_snapshot]
    once = [
        (codec.for_layout(block.layout), group, tensor, Piece.of(block.key))
        for block in halves for group, tensor in zip(block.layout.groups, block.tensors, strict=True)
    ]  # fmt: skip
    size_bytes = sum(block.size_bytes for block in halves)
    if not size_bytes:
        return math.nan, math.nan
    repeats = -(-MEASURED_BYTES // size_bytes)
    jobs = [(coder, group, tensor, piece, coder.encode(group, tensor, piece)) for coder, group, tensor, piece in once]
    jobs *= repeats
    sources = [tensor.clone() for _, _, tensor, _, _ in jobs]
    targets = [torch.zeros_like(tensor) for tensor in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def encode() -> None:
        for coder, group, tensor, piece in once:
            coder.encode(group, tensor, piece)

    def decode() -> None:
        for (coder, group, _, piece, parts), target in zip(jobs, targets, strict=True):
            _decode_into(target, coder, group, piece, parts)

    return _share(copy, encode, rounds=1) / repeats, _share(copy, decode)


def _decode_into(target: torch.Tensor, codec: TensorCodec, group: TensorGroup, piece: Piece, parts: Parts) -> None:
    decoded = codec.decode(group, piece, parts, lambda _shape, _dtype: target)
    if decoded.data_ptr() != target.data_ptr():
        target.copy_(decoded)


def _in_bf16(block: KVBlock) -> KVBlock:
    layers = tuple(
        LayerSpec(layer.kind, tuple(replace(t, dtype="bfloat16") if "float" in t.dtype else t for t in layer.tensors))
        for layer in block.layout.layers
    )
    tensors = tuple(t.bfloat16() if t.is_floating_point() else t for t in block.tensors)
    return KVBlock(block.key, KVLayout(layers, block.layout.rotation), tensors)


def _share(copy: Callable[[], object], work: Callable[[], object], rounds: int = 7) -> float:
    """How often ``work`` fits into the time of ``copy``, on one thread: the median of some rounds after a first.

    They take turns, since how fast memory is changes from one second to the next.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        copy()
        work()
        return 1 / statistics.median(_seconds(work) / _seconds(copy) for _ in range(rounds))
    finally:
        torch.set_num_threads(threads)


def _seconds(work: Callable[[], object]) -> float:
    """Processor time of this thread."""
    began = time.thread_time()
    work()
    return max(time.thread_time() - began, 1e-9)
