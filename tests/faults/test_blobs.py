"""Stored blocks changed in every way we could think of, in numbers: none is ever taken for a block."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache, keys
from ghostcacher.blocks import KVBlock
from ghostcacher.codecs.header import BlockHeader, header_bytes, payload_digest, sealed
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.errors import BlockError
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.envelope import Sealing
from ghostcacher.stores.sealed import SealedDirectory
from ghostcacher.testing.models import random_prompt
from ghostcacher.testing.tier import BLOCK_TOKENS, LAYOUT, blocks_of, chain_of

BLOCKS = blocks_of(chain_of(4 * BLOCK_TOKENS))
DIGEST_AT = slice(35, 67)


def blob_of(block, codec=None):
    return b"".join(bytes(part) for part in CodecChain(codec or RawCodec()).encode(block, model="tiny"))


BLOBS = [blob_of(block, codec) for codec in (RawCodec(), Int8Codec()) for block in BLOCKS]


def flipped(rng, blob):
    changed = bytearray(blob)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    return changed


def overwritten(rng, blob):
    begin = rng.randrange(len(blob))
    size = min(rng.choice([1, 4, 64, 512, 4096]), len(blob) - begin)
    changed = bytearray(blob)
    changed[begin : begin + size] = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
    return changed


def resized(rng, blob):
    if rng.random() < 0.7:
        return bytearray(blob[: rng.randrange(len(blob))])
    return bytearray(blob + rng.choice([b"\0", rng.randbytes(64), blob]))


def swapped(rng, blob):
    size = rng.choice([4, 64, 512])
    one, two = (rng.randrange(len(blob) - size) for _ in range(2))
    changed = bytearray(blob)
    changed[one : one + size], changed[two : two + size] = blob[two : two + size], blob[one : one + size]
    return changed


def spliced(rng, blob):
    other = rng.choice(BLOBS)
    cut = rng.choice([header_bytes(blob), rng.randrange(min(len(blob), len(other)))])
    return bytearray(blob[:cut] + other[cut:])


def relabelled(rng, blob):
    """Another header with a digest that fits: what an accident cannot do, and a careless writer can."""
    end = header_bytes(blob)
    header = json.loads(blob[8:end])
    document = json.loads(header["__metadata__"]["ghostcacher"])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    what = rng.randrange(7)
    if what == 0:
        header[name]["shape"] = header[name]["shape"][::-1]
    elif what == 1:
        header[name]["dtype"] = {"F32": "I32", "U8": "I8"}.get(header[name]["dtype"], "F16")
    elif what == 2:
        header[f"{name}x"] = header.pop(name)
    elif what == 3:
        header[name]["data_offsets"] = [each + 4 for each in header[name]["data_offsets"]]
    elif what == 4:
        document[rng.choice(["start", "format", "lossy", "layout", "codec", "namespace", "parent"])] = rng.choice(
            [1, -1, "x", True, None, {"name": "raw"}, "0" * 64]
        )
    elif what == 5:
        document["tokens"][rng.randrange(len(document["tokens"]))] += 1
    else:
        document["key"] = rng.randbytes(32).hex()
    header["__metadata__"]["ghostcacher"] = json.dumps(document, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    changed = bytearray(struct.pack("<Q", len(text)) + text + blob[end:])
    changed[DIGEST_AT] = payload_digest(changed[: 8 + len(text)], [changed[8 + len(text) :]]).encode()
    return changed


MUTATORS = [flipped, overwritten, resized, swapped, spliced, relabelled]


def mutations(count):
    """How many of ``count`` changed blobs were refused or came out as some whole one, and which were taken."""
    whole = set(BLOBS)
    rng, refused, equal, taken = random.Random(1), 0, 0, []
    for trial in range(count):
        number, mutate = rng.randrange(len(BLOBS)), MUTATORS[trial % len(MUTATORS)]
        changed = mutate(rng, BLOBS[number])
        if bytes(changed) in whole:
            equal += 1
            continue
        try:
            decode_blob(changed, BLOCKS[number % len(BLOCKS)].key, LAYOUT, exact_only=number < len(BLOCKS))
            taken.append((mutate.__name__, trial))
        except BlockError:
            refused += 1
    return refused, equal, taken


def check(refused, equal, taken, count):
    assert taken == []
    assert equal < count / 20
    assert refused + equal == count


def test_f01_to_f09_a_hundred_thousand_changed_blocks_are_refused(record_property):
    check(*mutations(100_000), 100_000)
    record_property("trials", 100_000)


def test_negative_control_unchanged_blocks_are_taken():
    for number, blob in enumerate(BLOBS):
        decode_blob(bytearray(blob), BLOCKS[number % len(BLOCKS)].key, LAYOUT)


@pytest.mark.parametrize("is_sealed", [False, True])
def test_f05_no_block_of_a_store_whose_files_were_exchanged_is_found(is_sealed, tmp_path, record_property):
    chain = chain_of(500 * BLOCK_TOKENS + 1)
    key = b"k" * 32 if is_sealed else None
    with ghostcacher.open_store(tmp_path / "d", memory=None, block_tokens=BLOCK_TOKENS, key=key) as store:
        for block in blocks_of(chain):
            store.offer(block)
    files = sorted((tmp_path / "d").rglob("*.safetensors"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    directory = DirectoryStore(tmp_path / "d", is_sealed=is_sealed)
    opened = SealedDirectory(directory, [Sealing.of(key)]) if key else directory
    placed, names = 0, [chain.block(number).store_key for number in range(500)]
    assert len(files) >= 500
    found = opened.get_many(names, limit_bytes=2**20, timeout_seconds=10.0)
    assert len(found) == 500
    record_property("trials", 500)
    for number, name in enumerate(names):
        try:
            decode_blob(found[name], chain.block(number), LAYOUT)
            placed += 1
        except (BlockError, TypeError):  # a sealed one is an error already
            continue
    assert placed == 0
    with ghostcacher.open_store(tmp_path / "d", memory=None, block_tokens=BLOCK_TOKENS, key=key) as store:
        assert store.match(chain) == ()


def test_f06_a_header_that_names_other_tokens_is_no_block_of_them(models, generate, tmp_path):
    """The bytes of one prompt's block under their own name, but saying that they are another prompt's."""
    model, ours, theirs = models("llama"), random_prompt(60, seed=1), random_prompt(60, seed=2)
    given = {"memory": None, "block_tokens": 32}
    with ghostcacher.open_store(tmp_path / "d", **given) as store:
        generate(model, ours, GhostCache(model, store), new=1)
        store.flush()
        chain = next(iter(store.tiers[0].entries())).namespace
    for file in (tmp_path / "d").rglob("*.safetensors"):
        blob = file.read_bytes()
        header, end = BlockHeader.parse(blob), header_bytes(blob)
        if header.key.start == 0 and header.key.length == 32:
            lying = replace(header.key, tokens=keys.pack_tokens(theirs[0, :32].tolist()))
            rendered = replace(header, key=lying).render()
            file.write_bytes(sealed(rendered, [blob[end:]]) + blob[end:])
    with ghostcacher.open_store(tmp_path / "d", **given) as store:
        cache = GhostCache(model, store)
        out = generate(model, theirs, cache, new=3)
        assert cache.report.cached_tokens == 0
        assert torch.equal(out, generate(model, theirs, new=3))
        assert {key.namespace for key in store.tiers[0].entries()} == {chain}


def test_f55_a_block_computed_on_lossy_ones_says_so_whatever_codes_it():
    block = BLOCKS[0]
    lossy = KVBlock(block.key, block.layout, block.tensors, lossy=True)
    blob = blob_of(lossy)
    assert BlockHeader.parse(blob).lossy
    with pytest.raises(BlockError, match="lossy"):
        decode_blob(bytearray(blob), block.key, LAYOUT, exact_only=True)


def test_f05_another_blocks_bytes_are_named_as_such():
    with pytest.raises(BlockError, match="key_echo"):
        decode_blob(bytearray(BLOBS[0]), BLOCKS[1].key, LAYOUT)


def test_f22_a_hash_of_eight_bits_collides_all_the_time_and_never_serves_wrong(
    models, generate, monkeypatch, tmp_path, record_property
):
    full = keys.chain_digest
    monkeypatch.setattr(
        keys, "chain_digest", lambda parent, tokens, **given: full(parent, tokens, **given)[:1] + bytes(31)
    )
    model, hits = models("llama"), 0
    with ghostcacher.open_store(tmp_path / "d", memory="16MiB", block_tokens=16) as store:
        for turn in range(60):
            prompt = random_prompt(60, seed=turn % 20)
            cache = GhostCache(model, store)
            out = generate(model, prompt, cache, new=2)
            hits += cache.report.cached_tokens > 0
            assert torch.equal(out, generate(model, prompt, new=2))
            store.flush()
    assert hits > 0
    record_property("trials", 60)


def test_f74_no_salt_ever_sees_another_ones_blocks(models, generate, tmp_path, record_property):
    model, prompts = models("llama"), [random_prompt(60, seed=seed) for seed in range(4)]
    for salt in ("a", "b", "c", None):
        with ghostcacher.open_store(tmp_path / "d", memory="16MiB", block_tokens=16, salt=salt) as store:
            for prompt in prompts:
                cache = GhostCache(model, store)
                generate(model, prompt, cache, new=1)
                assert cache.report.cached_tokens == 0
                store.flush()
    record_property("trials", 4 * len(prompts))
