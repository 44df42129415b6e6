"""What threads share in one fetch: the blocks of a remote batch, the layers of a large block."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from ghostcacher.blocks import KVBlock, KVLayout
from ghostcacher.codecs import symbols
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.registry import codec_named, factory_of
from ghostcacher.codecs.safetensors_format import CodecChain
from ghostcacher.codecs.scratch import Scratch
from ghostcacher.errors import BlockError
from ghostcacher.eviction import LeastRecentlyUsed
from ghostcacher.keys import Namespace, PrefixChain
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.tiers import fetching
from ghostcacher.tiers.base import Offer
from ghostcacher.tiers.encoded import EncodedTier
from ghostcacher.tiers.readers import Readers

TIMEOUT_SECONDS = 20.0
LAYERS, HEADS, HEAD_DIM, TOKENS = 4, 2, 64, 128
LAYOUT = KVLayout.uniform(layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, dtype="bfloat16")
CHAIN = PrefixChain.of(list(range(4 * TOKENS)), Namespace(bytes(32)), TOKENS)


def blocks(count):
    generator = torch.Generator().manual_seed(0)
    return [
        KVBlock(key, LAYOUT, tuple(torch.randn(g.shape(TOKENS), generator=generator).bfloat16() for g in LAYOUT.groups))
        for key in list(CHAIN.covering(0, len(CHAIN)))[:count]
    ]


@dataclass(frozen=True)
class Watched(Int8Codec):
    """Calls ``watch`` with the name of the tensor for each run of layers that is decoded."""

    name: ClassVar[str] = "watched"
    watch: ClassVar = staticmethod(lambda name: None)

    def decode(self, group, piece, parts, room, spread):
        def watched(function, items):
            spread(lambda item: (type(self).watch(group.name), function(item)), items)

        return super().decode(group, piece, parts, room, watched)


@pytest.fixture
def watch(monkeypatch):
    """Sets what is called for each layer of a tensor that is decoded."""
    monkeypatch.setattr(symbols, "RUN_VALUES", HEADS * HEAD_DIM * TOKENS)
    return lambda function: monkeypatch.setattr(Watched, "watch", staticmethod(function))


@pytest.fixture
def idle(monkeypatch):
    """Processors that torch leaves idle, and blocks that are large, of several runs of layers."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(fetching, "SHARED_BYTES", 2**16)
    monkeypatch.setattr(symbols, "RUN_VALUES", HEADS * HEAD_DIM * TOKENS)


@pytest.fixture
def tier(monkeypatch):
    """Of so many threads, holding ``given``, coded by ``codec``."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    opened = []

    def make(given, *, threads, is_local=True, codec=None):
        opened.append(Readers(threads))
        chain = CodecChain(codec or Watched(), lambda name: Watched if name == "watched" else factory_of(name))
        made = EncodedTier(
            "t", MemoryStore(), chain, LeastRecentlyUsed(), lambda event: None, is_local=is_local, timeout_seconds=5.0,
            spread=opened[-1],
        )  # fmt: skip
        assert all(made.offer(Offer(block)) for block in given)
        return made

    yield make
    for readers in opened:
        readers.close()


def fetched(tier, given, device="cpu"):
    """The tensors of each block that was placed."""
    found = {}

    def place(block):
        found[block.key.digest] = [tensor.clone() for tensor in block.tensors]

    keys = [block.key for block in given]
    placed = tier.fetch(keys, LAYOUT, place, exact_only=False, device=torch.device(device))
    assert placed == found.keys()
    return found


def met(parties):
    """What ends only when it runs on so many threads at once."""
    barrier = threading.Barrier(parties)
    return lambda _: barrier.wait(TIMEOUT_SECONDS)


@pytest.fixture
def threads(watch):
    """The threads that decode."""
    seen = []
    watch(lambda _: seen.append(threading.get_ident()))
    return seen


def test_the_layers_of_a_large_block_are_decoded_at_once(tier, idle, watch):
    made, given = tier(blocks(1), threads=2), blocks(1)
    watch(met(2))
    assert len(fetched(made, given)) == 1


def test_where_torch_uses_all_processors_one_thread_decodes_a_block(tier, idle, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    fetched(tier(blocks(1), threads=4), blocks(1))
    assert set(threads) == {threading.get_ident()}
    assert len(threads) == 2 * LAYERS


def test_one_thread_decodes_a_small_block(tier, idle, threads, monkeypatch):
    monkeypatch.setattr(fetching, "SHARED_BYTES", LAYOUT.bytes_of(blocks(1)[0].key) + 1)
    fetched(tier(blocks(1), threads=4), blocks(1))
    assert set(threads) == {threading.get_ident()}
    assert len(threads) == 2 * LAYERS


def test_idle_threads_decode_what_others_have_read_in_one_batch(tier, watch):
    """Four blocks are two batches: two threads read them, two more help."""
    at_once, made = met(4), tier(blocks(4), threads=4, is_local=False)
    watch(lambda name: at_once(name) if name == "keys" else None)
    assert len(fetched(made, blocks(4))) == 4


def test_on_a_gpu_the_thread_that_reads_decodes(tier, idle, threads):
    """A device without values stands for it: on it nothing can be computed but shapes."""
    found = fetched(tier(blocks(3), threads=4, is_local=False), blocks(3), device="meta")
    assert {tensor.device.type for tensors in found.values() for tensor in tensors} == {"meta"}
    assert len(set(threads)) == 1
    assert len(threads) == 3 * 2 * LAYERS


@pytest.mark.parametrize("codec", ["raw", "raw.z", "bf16", "int8", "int4", "ec(0.25)", "ec(1.0)"])
@pytest.mark.parametrize("is_local", [True, False])
def test_however_many_threads_decode_the_bytes_are_the_same(codec, is_local, tier, idle):
    given, coded = blocks(4), codec_named(codec)
    one = fetched(tier(given, threads=1, is_local=is_local, codec=coded), given)
    for count in (1, 4):
        made = tier(given[:count], threads=4, is_local=is_local, codec=coded)
        for _ in range(10):
            found = fetched(made, given[:count])
            assert len(found) == count
            for digest, tensors in found.items():
                assert all(
                    torch.equal(a.view(torch.int16), b.view(torch.int16))
                    for a, b in zip(tensors, one[digest], strict=True)
                )


@pytest.mark.parametrize("codec", ["raw.z", "int8", "int4", "ec(0.5)"])
def test_a_caller_in_inference_mode_gets_the_same_bytes(codec, tier, idle):
    """Of three blocks for two threads the last may be shared: by which of them, and in whose memory, is chance."""
    given = blocks(3)
    made = tier(given, threads=2, codec=codec_named(codec))
    expected = fetched(made, given)
    for _ in range(10):
        with torch.inference_mode():
            found = fetched(made, given)
        assert made.stats().rejected == 0
        assert len(found) == 3
        assert all(torch.equal(a, b) for digest in found for a, b in zip(found[digest], expected[digest], strict=True))


@pytest.mark.parametrize("error", [BlockError("frame", "no"), ValueError("no"), MemoryError()])
@pytest.mark.parametrize("broken", ["keys", "values"])
def test_a_tensor_that_cannot_be_decoded_is_a_miss_of_its_block(error, broken, tier, idle, watch):
    given = blocks(2)
    made = tier(given, threads=4)

    def fail(name):
        if name == broken:
            raise error

    watch(fail)
    assert fetched(made, given) == {}
    assert made.stats().rejected == 2
    watch(lambda _: None)
    assert all(made.offer(Offer(block)) for block in given)
    assert len(fetched(made, given)) == 2


def test_memory_taken_in_inference_mode_may_be_written_by_threads_that_are_not_in_it():
    scratch = Scratch()
    with torch.inference_mode():
        scratch((8,), torch.float32)
    scratch.reuse()
    assert scratch((8,), torch.float32).fill_(1.0).sum() == 8.0


def test_threads_that_take_room_at_once_get_memory_of_their_own():
    scratch, parties, rooms = Scratch(), 4, 100
    barrier, taken = threading.Barrier(parties), []

    def take():
        barrier.wait(TIMEOUT_SECONDS)
        taken.extend(scratch((64,), torch.uint8).data_ptr() for _ in range(rooms))

    running = [threading.Thread(target=take) for _ in range(parties)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(TIMEOUT_SECONDS)
    assert len(set(taken)) == parties * rooms
