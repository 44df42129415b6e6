from __future__ import annotations

import json
import struct
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from ghostcacher.blocks import KVBlock, KVLayout
from ghostcacher.codecs.header import BlockHeader, check_digest, header_bytes, payload_digest, sealed
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.errors import BlockError
from ghostcacher.testing.codec import block

BLOCK = block(20)
BLOB = b"".join(CodecChain(RawCodec()).encode(BLOCK, model="tiny"))
GOLDEN_DIGEST = "f85d3a3323d28da72bcfc014fee0ec34"


def decoded(blob, exact_only=False):
    return decode_blob(bytearray(blob), BLOCK.key, BLOCK.layout, exact_only=exact_only)


def resealed(header_text):
    """A blob with another header and a digest that fits it: what a careless or hostile writer could leave."""
    text = header_text + b" " * (-(8 + len(header_text)) % 64)
    body = BLOB[header_bytes(BLOB) :]
    return sealed(struct.pack("<Q", len(text)) + text, [body]) + body


def header_of(blob):
    return json.loads(blob[8 : header_bytes(blob)])


def test_the_safetensors_library_reads_it():
    tensors = load(BLOB)
    for group, tensor in zip(BLOCK.layout.groups, BLOCK.tensors, strict=True):
        assert torch.equal(tensors[group.name], tensor)


def test_golden_bytes():
    """A blob of this version is read by every later one: these bytes may not change without a new top folder."""
    tensors = tuple(
        torch.arange(torch.Size(g.shape(20)).numel(), dtype=torch.float32).view(g.shape(20))
        for g in BLOCK.layout.groups
    )
    parts = CodecChain(RawCodec()).encode(KVBlock(BLOCK.key, BLOCK.layout, tensors), model="tiny")
    header = BlockHeader.parse(b"".join(parts))
    assert payload_digest(parts[0], parts[1:]) == GOLDEN_DIGEST
    assert (header.model, header.codec, header.lossy, header.key) == ("tiny", {"name": "raw"}, False, BLOCK.key)


def test_tensors_begin_aligned():
    assert header_bytes(BLOB) % 64 == 0


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(BLOB) - 1), st.integers(0, 7))
def test_f01_any_flipped_bit_is_refused(at, bit):
    damaged = bytearray(BLOB)
    damaged[at] ^= 1 << bit
    with pytest.raises(BlockError):
        decoded(damaged)


def test_f01_every_bit_of_the_header_is_refused(record_property):
    end = header_bytes(BLOB)
    for at in range(end):
        damaged = bytearray(BLOB)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(BlockError):
            decoded(damaged)
    record_property("trials", end)


def test_f02_f03_every_truncation_is_refused(record_property):
    for size in [*range(0, len(BLOB), 17), len(BLOB) - 1]:
        with pytest.raises(BlockError):
            decoded(BLOB[:size])
    with pytest.raises(BlockError):
        decoded(BLOB + b"\0")
    with pytest.raises(BlockError):
        decoded(BLOB + BLOB)
    record_property("trials", len(BLOB) // 17)


def mutated(change):
    header = header_of(BLOB)
    change(header)
    return resealed(json.dumps(header, separators=(",", ":")).encode())


def change_document(**fields):
    def change(header):
        document = json.loads(header["__metadata__"]["ghostcacher"]) | fields
        header["__metadata__"]["ghostcacher"] = json.dumps(document, separators=(",", ":"))

    return change


def rename(header):
    header["other"] = header.pop("keys")


def swap(header):
    header["keys"]["data_offsets"], header["values"]["data_offsets"] = (
        header["values"]["data_offsets"],
        header["keys"]["data_offsets"],
    )


def reshape(header):
    header["keys"]["shape"] = header["keys"]["shape"][::-1]


def retype(header):
    header["keys"]["dtype"] = "I32"


def drop(header):
    del header["values"]


MUTATIONS = {
    "renamed": (rename, "geometry"),
    "swapped": (swap, "geometry"),
    "reshaped": (reshape, "geometry"),
    "retyped": (retype, "geometry"),
    "dropped": (drop, "geometry"),
    "another layout": (change_document(layout="0" * 64), "geometry"),
    "another codec": (change_document(codec={"name": "int8"}), "geometry"),
    "an unknown codec": (change_document(codec={"name": "zip"}), "codec"),
    "codec parameters": (change_document(codec={"name": "raw", "level": 3}), "codec"),
    "a newer format": (change_document(format=2), "version"),
    "another key": (change_document(key="0" * 64), "key_echo"),
    "another parent": (change_document(parent="1" * 64), "key_echo"),
    "another start": (change_document(start=16), "key_echo"),
    "another namespace": (change_document(namespace="1" * 64), "key_echo"),
    "other tokens": (change_document(tokens=[1] * 20), "key_echo"),
    "tokens that are none": (change_document(tokens=["a"]), "header"),
    "a huge token": (change_document(tokens=[2**40]), "header"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_f07_altered_headers_with_a_fitting_digest_are_refused(mutation):
    change, reason = MUTATIONS[mutation]
    blob = mutated(change)
    if reason != "version":
        check_digest(blob)
    with pytest.raises(BlockError) as caught:
        decoded(blob)
    assert caught.value.reason == reason


HOSTILE = {
    "length 2^63": struct.pack("<Q", 2**63) + BLOB[8:],
    "length beyond the limit": struct.pack("<Q", 2**20 + 1) + b" " * (2**20 + 100),
    "nesting": resealed(b'{"__metadata__":{"digest":"' + b"0" * 32 + b'","ghostcacher":"' + b"[" * 90_000 + b'"}}'),
    "no document": resealed(b'{"__metadata__":{"digest":"' + b"0" * 32 + b'"}}'),
    "a list": resealed(b'{"__metadata__":{"digest":"' + b"0" * 32 + b'","ghostcacher":"[]"}}'),
    "not JSON": resealed(b'{"__metadata__":{"digest":"' + b"0" * 32 + b'",'),
    "NUL": b"\0" * 300,
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_f08_hostile_headers_cost_little_memory(hostile):
    blob = bytearray(HOSTILE[hostile])
    tracemalloc.start()
    with pytest.raises(BlockError) as caught:
        decode_blob(blob, BLOCK.key, BLOCK.layout)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.reason == "header"
    assert peak_bytes < 8 * 2**20


def test_f07_a_wrong_layout_is_geometry():
    with pytest.raises(BlockError, match="geometry"):
        decode_blob(bytearray(BLOB), BLOCK.key, KVLayout.uniform(3, 2, 16))


def test_lossy_is_refused_where_exact_is_asked():
    blob = b"".join(CodecChain(Int8Codec()).encode(block(64)))
    with pytest.raises(BlockError, match="lossy"):
        decode_blob(bytearray(blob), block(64).key, block(64).layout, exact_only=True)


def test_a_read_only_buffer_is_decoded_too():
    assert torch.equal(decode_blob(BLOB, BLOCK.key, BLOCK.layout).tensors[0], BLOCK.tensors[0])


def test_a_block_of_another_shape_is_not_encoded():
    with pytest.raises(BlockError, match="geometry"):
        CodecChain(RawCodec()).encode(KVBlock(BLOCK.key, BLOCK.layout, BLOCK.tensors[:1]))


def test_a_lossy_block_that_says_it_is_exact_is_refused():
    stored = block(64)
    blob = b"".join(CodecChain(Int8Codec()).encode(stored))
    end = header_bytes(blob)
    claims = replace(BlockHeader.parse(blob), lossy=False).render()
    forged = bytearray(sealed(claims, [blob[end:]]) + blob[end:])
    with pytest.raises(BlockError, match="geometry"):
        decode_blob(forged, stored.key, stored.layout, exact_only=True)
