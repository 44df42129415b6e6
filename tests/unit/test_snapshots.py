"""Snapshots: keys of their own, found by the longest that fits, counted and evicted on their own."""

from __future__ import annotations

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.blocks import Extent, KVBlock, KVLayout, LayerSpec, TensorSpec
from ghostcacher.codecs.registry import codec_named
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.errors import BlockError
from ghostcacher.keys import Namespace, PrefixChain
from ghostcacher.testing.models import random_prompt
from ghostcacher.testing.tier import LAYOUT as SLICES

NAMESPACE = Namespace(bytes(32))
COMPRESSED = TensorSpec("keys", "float32", (1, Extent("below", 8), 4))
LAYOUT = KVLayout((
    *SLICES.layers,
    LayerSpec("recurrent", (TensorSpec("recurrent_states.0", "float32", (2, 8)),)),
    LayerSpec("compressed", (
        COMPRESSED,
        TensorSpec("compressed_kv.x", "float32", (Extent("each", 16), 4)),
        TensorSpec("buffer_kv.x", "float32", (Extent("rest", 16), 4)),
        TensorSpec("overlap_kv.x", "float32", (Extent("once", 16, size=16), 4)),
    )),
))  # fmt: skip


def chain_of(tokens, last=None):
    ids = list(range(2, 2 + tokens))
    if last is not None:
        ids[-1] = last
    return PrefixChain.of(ids, NAMESPACE, 16)


def snapshot_of(chain, end, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(torch.randn(group.shape(end), generator=generator) for group in LAYOUT.snapshot_groups)
    return KVBlock(chain.snapshot(end), LAYOUT, tensors)


def blocks_of(chain):
    for key in chain.covering(0, len(chain)):
        yield KVBlock(key, LAYOUT, tuple(torch.randn(group.shape(key.length)) for group in LAYOUT.groups))


@pytest.fixture
def memory():
    with ghostcacher.open_store(memory="1MiB", disk=None, block_tokens=16) as store:
        yield store


def test_keys_do_not_change():
    """Golden: a new key would orphan every stored snapshot."""
    assert chain_of(20).snapshot(20).digest.hex() == (
        "a6a5af55ccf87ee338160b9cce8c0089dd34e4e9cc8ff3b4d17757b532ef068c"
    )


def test_a_snapshot_is_not_the_block_of_the_same_tokens():
    chain = chain_of(32)
    assert chain.snapshot(32).digest != chain.block(1).digest
    assert chain.snapshot(32).is_genuine()
    assert (chain.snapshot(20).start, chain.snapshot(20).end) == (16, 20)


@pytest.mark.parametrize("end", [5, 8, 16, 20, 32])
@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_sizes_follow_from_the_length_and_bytes_come_back(end, codec):
    block = snapshot_of(chain_of(40), end)
    blob = b"".join(CodecChain(codec_named(codec)).encode(block))
    back = decode_blob(blob, block.key, LAYOUT)
    assert all(torch.equal(a, b) for a, b in zip(back.tensors, block.tensors, strict=True))
    assert LAYOUT.bytes_of(block.key) == block.size_bytes
    with pytest.raises(BlockError):
        decode_blob(blob, chain_of(40).tail(end), LAYOUT)


@pytest.mark.parametrize(("ends", "asked", "found"), [
    ([32], 40, 32), ([16, 20], 40, 20), ([16, 20], 20, 16), ([], 40, None), ([32], 30, None),
])  # fmt: skip
def test_the_longest_snapshot_that_fits_is_found(memory, ends, asked, found):
    for block in (*blocks_of(chain_of(40)), *(snapshot_of(chain_of(40), end) for end in ends)):
        memory.offer(block)
    matched = memory.match(chain_of(asked), snapshots=True)
    assert (matched[-1].key.end if matched else None) == found
    if matched:
        assert matched[-1].key.is_snapshot
        assert matched[-2].key.start + matched[-2].tokens == found


def test_a_limit_is_kept(memory):
    for block in (*blocks_of(chain_of(40)), snapshot_of(chain_of(40), 20), snapshot_of(chain_of(40), 32)):
        memory.offer(block)
    assert memory.match(chain_of(40), limit_tokens=31, snapshots=True)[-1].key.end == 20


def test_a_snapshot_without_its_blocks_is_a_miss(memory):
    memory.offer(snapshot_of(chain_of(40), 32))
    assert memory.match(chain_of(40), snapshots=True) == ()


def test_another_prompt_does_not_find_it(memory):
    for block in (*blocks_of(chain_of(20)), snapshot_of(chain_of(20), 20)):
        memory.offer(block)
    assert memory.match(chain_of(20, last=99), snapshots=True) == ()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_namespace_has_a_limit_for_snapshots(tmp_path, where):
    budgets = {"memory": None, "disk": None, where: "1MiB"}
    with ghostcacher.open_store(tmp_path, block_tokens=16, **budgets) as store:
        tier = store.tiers[0]
        getattr(tier, "budget", tier).snapshot_limit_bytes = 6_000
        blocks = list(blocks_of(chain_of(40)))
        for number, block in enumerate([*blocks, *(snapshot_of(chain_of(40), end) for end in range(1, 40))]):
            assert store.offer(block), number
        stats = tier.stats()
        assert stats.snapshots > 1
        assert stats.snapshot_bytes <= 6_000
        assert stats.blocks - stats.snapshots == len(blocks)
        assert stats.evicted > 0


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_snapshot_larger_than_its_share_displaces_nothing(tmp_path, where):
    budgets = {"memory": None, "disk": None, where: "1MiB"}
    with ghostcacher.open_store(tmp_path, block_tokens=16, **budgets) as store:
        for block in (*blocks_of(chain_of(40)), snapshot_of(chain_of(40), 20)):
            store.offer(block)
        getattr(store.tiers[0], "budget", store.tiers[0]).snapshot_limit_bytes = 100
        assert not store.offer(snapshot_of(chain_of(40), 32))
        assert store.match(chain_of(40), snapshots=True)[-1].key.end == 20


def test_other_processes_find_snapshots_in_a_directory(tmp_path):
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=16) as one:
        for block in (*blocks_of(chain_of(40)), snapshot_of(chain_of(40), 20)):
            one.offer(block)
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=16) as two:
        matched = two.match(chain_of(40), snapshots=True)
        placed = []
        two.fetch([candidate.key for candidate in matched], LAYOUT, placed.append)
        assert len(placed) == len(matched)
        assert any(block.key.is_snapshot for block in placed)


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "lfm2"])
def test_a_snapshot_is_not_changed_by_what_the_model_writes_later(model_type, models, store, generate):
    model = models(model_type)
    cache = GhostCache(model, store)
    generate(model, random_prompt(40, seed=1), cache, new=1)
    state = cache._session.state
    taken = state.snapshot()
    before = [{name: tensor.clone() for name, tensor in layer.items()} for layer in taken]
    held = [kind.states.ago(layer, 0) for kind, layer in state.pairs() if kind.states]
    assert sum(map(len, held)) > 0
    for layer in held:
        for tensor in layer.values():
            tensor.fill_(7.0)
    for layer, kept in zip(taken, before, strict=True):
        assert all(torch.equal(layer[name], kept[name]) for name in kept)
