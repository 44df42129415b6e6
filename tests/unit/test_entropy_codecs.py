"""ec and raw.z: real bytes against entropy, rotation, and blobs that lie about their frames."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostcacher.blocks import TOKENS, KVBlock, KVLayout, Rotation, TensorGroup, TensorSpec
from ghostcacher.codecs import entropy, frames
from ghostcacher.codecs.base import Piece
from ghostcacher.codecs.classes import Classes, one_class
from ghostcacher.codecs.ec import EntropyCodec
from ghostcacher.codecs.entropy import compress, decompress
from ghostcacher.codecs.header import DIGEST_CHARS, DIGEST_OPENING, TensorField, header_bytes, payload_digest
from ghostcacher.codecs.heads import Heads
from ghostcacher.codecs.lines import Lines
from ghostcacher.codecs.orders import SPAN_TOKENS, PhaseByPhase, TokenByToken
from ghostcacher.codecs.outliers import Outliers, packed, unpacked
from ghostcacher.codecs.planes import PlaneCodec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.registry import codec_from, codec_named
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.codecs.scratch import Scratch
from ghostcacher.codecs.spoken import spoken
from ghostcacher.codecs.symbols import RUN_VALUES, Codes, SymbolCoder
from ghostcacher.errors import BlockError, ConfigurationError, MissingExtraError
from ghostcacher.testing.codec import block, group

ROTATION = Rotation(tuple(10000 ** (-n / 8) for n in range(8)))


def all_codes(coder, parts):
    found = []
    coder.unpack(parts, found.append)
    return found


def bits(parts, tensor):
    return sum(part.numel() * part.element_size() for part in parts.values()) * 8 / tensor.numel()


def entropy_bits(codes):
    counts = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    return float(-(counts * np.log2(counts)).sum())


@pytest.mark.parametrize("c", [0.12, 0.25, 0.5, 1.0, 1.4])
def test_real_bytes_are_close_to_the_entropy(c):
    tensor = torch.randn((4, 3, 1024, 64), generator=torch.Generator().manual_seed(0))
    given_group = group("values", heads=3, dim=64, layers=4)
    parts = EntropyCodec.of(c).encode(given_group, tensor, Piece(1024, 1024))
    codes = torch.cat([(layer / (c * layer.square().mean().sqrt())).round().flatten() for layer in tensor])
    frames = {name: part for name, part in parts.items() if name.endswith(("frames", "outlier_planes"))}
    assert bits(frames, tensor) <= entropy_bits(codes) + 0.06


def test_raw_z_takes_less_than_eleven_bits_of_sixteen():
    tensor = torch.randn((4, 3, 1024, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    given_group = group("keys", heads=3, dim=64, layers=4, dtype="bfloat16")
    assert bits(PlaneCodec().encode(given_group, tensor, Piece(0, 1024)), tensor) <= 10.8


@pytest.mark.parametrize(("dtype", "integer"), [("bfloat16", torch.int16), ("float32", torch.int32)])
def test_raw_z_keeps_every_bit(dtype, integer):
    """All there are of bf16; of fp32 random ones: NaN with its payload, infinity, zero of either sign."""
    limit = torch.iinfo(integer)
    patterns = torch.arange(2**16) if integer is torch.int16 else torch.randint(limit.min, limit.max, (2**16,))
    given_group = group("keys", heads=1, dim=64, layers=2, dtype=dtype)
    tensor = patterns.to(integer).view(given_group.spec.torch_dtype).view(2, 1, 512, 64)
    back = PlaneCodec().decode(given_group, Piece(0, 512), PlaneCodec().encode(given_group, tensor, Piece(0, 512)))
    assert torch.equal(back.view(integer), tensor.view(integer))


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_coded_as_before_they_were_turned(interleaved):
    """Channels keep their means then: turned by position, they would be spread as wide as the means are large."""
    rotation = Rotation(ROTATION.frequencies, interleaved)
    before = torch.randn(3, 2, 128, 16) + torch.linspace(-20, 20, 16)
    keys, piece = rotation.at(512, 128).forward(before.clone()), Piece(512, 128)
    plain = EntropyCodec.of(0.25).encode(group("keys"), keys, piece)
    turned = EntropyCodec(0.25, rotation)
    parts = turned.encode(group("keys"), keys, piece)
    assert (turned.decode(group("keys"), piece, parts) - keys).abs().max() < 0.3
    assert parts["keys.steps"].max() < plain["keys.steps"].min() / 4
    elsewhere = turned.decode(group("keys"), Piece(513, 128), parts)
    assert (elsewhere - keys).abs().max() > 1


def test_a_rotation_is_written_into_the_block_and_read_from_there():
    given_block = block(128)
    layout = KVLayout(given_block.layout.layers, ROTATION)
    chain = CodecChain(EntropyCodec.of(0.25))
    blob = bytearray(b"".join(chain.encode(KVBlock(given_block.key, layout, given_block.tensors))))
    with_it, without = (decode_blob(bytearray(blob), given_block.key, each) for each in (layout, given_block.layout))
    assert all(torch.equal(*pair) for pair in zip(with_it.tensors, without.tensors, strict=True))
    assert layout.digest == given_block.layout.digest
    assert blob.count(b"frequencies") == 1


def forged(blob):
    """``blob`` with a digest that fits, as whoever can write the store can compute it."""
    end = header_bytes(blob)
    at = 8 + len(DIGEST_OPENING)
    view = memoryview(blob)
    blob[at : at + DIGEST_CHARS] = payload_digest(view[:end], [view[end:]]).encode()
    return blob


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["ec(0.25)", "ec(1.0)", "raw.z"]), st.data())
def test_f09_forged_blobs_are_refused_or_have_the_right_shape(name, data):
    given_block = block(128, dtype=torch.bfloat16)
    blob = bytearray(b"".join(CodecChain(codec_named(name)).encode(given_block)))
    end = header_bytes(blob)
    for _ in range(data.draw(st.integers(1, 8))):
        blob[data.draw(st.integers(end, len(blob) - 1))] = data.draw(st.integers(0, 255))
    reason = None
    try:
        decoded = decode_blob(forged(blob), given_block.key, given_block.layout)
    except BlockError as error:
        reason = error.reason
    assert reason == "frame" or decoded.has_expected_shape()


def test_f09_a_frame_that_grows_beyond_what_was_coded_is_refused_within_bounded_memory():
    bomb = compress(bytes(2**28))
    tracemalloc.start()
    with pytest.raises(BlockError, match="frame"):
        decompress(bomb, 1000)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("frame", [b"", b"no frame", compress(b"ab") + b"c", compress(b"ab")[:-1], compress(b"abc")])
def test_only_one_whole_frame_of_the_right_size_is_read(frame):
    with pytest.raises(BlockError, match="frame"):
        decompress(frame, 2)


def test_a_window_beyond_the_limit_is_refused():
    frame = bytearray(compress(bytes(range(200))))
    assert struct.unpack("<I", frame[:4])[0] == 0xFD2FB528
    huge = frame[:4] + bytes([0x00, (31 - 10) << 3]) + frame[6:]
    with pytest.raises(BlockError, match="frame"):
        decompress(bytes(huge), 200)


@pytest.mark.parametrize(
    "text", ["zip", "ec", "ec()", "ec(0)", "ec(9)", "ec(nan)", "ec(1,2)", "int8(3)", "EC(0.5)", ""]
)
def test_codecs_that_cannot_be_had_are_named(text):
    with pytest.raises(ConfigurationError, match=r"codec=|ec\("):
        codec_named(text)


def test_without_zstd_the_error_names_the_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(entropy.importlib, "import_module", missing)
    entropy._zstd.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match=r"ghostcacher\[zstd\]"):
            codec_named("ec(0.25)")
        blob = bytearray(b"".join(CodecChain(codec_named("int8")).encode(block(64))))
        assert decode_blob(blob, block(64).key, block(64).layout).lossy
    finally:
        monkeypatch.undo()
        entropy._zstd.cache_clear()


@pytest.mark.parametrize(
    "record",
    [
        {"name": "ec", "c": 0.5, "frequencies": [10**400]},
        {"name": "ec", "c": "x"},
        {"name": "ec", "c": 10**400},
        {"name": "ec", "c": float("nan")},
        {"name": "ec", "c": 0.5, "frequencies": [[1]]},
        {"name": "ec"},
        {"name": "e" * 10_000},
        {"name": 3},
        {},
    ],
)
def test_records_that_no_codec_wrote_are_refused(record):
    with pytest.raises(ConfigurationError):
        codec_from(record)
    assert len(spoken(record)) < 100


@pytest.mark.parametrize("codec", ["raw.z", "int8", "int4", "ec(0.25)", "bf16", "raw"])
def test_tensors_without_values(codec):
    """A snapshot after a whole number of entries holds empty buffers."""
    for spec in (TensorSpec("keys", "bfloat16", (0, TOKENS, 16)), TensorSpec("buffer", "bfloat16", (0, 16))):
        empty, piece = TensorGroup(spec.name, spec, (0, 1)), Piece(0, 64)
        tensor = torch.zeros(empty.shape(64), dtype=torch.bfloat16)
        chosen = codec_named(codec)
        back = chosen.decode(empty, piece, chosen.encode(empty, tensor, piece))
        assert back.shape == tensor.shape


@pytest.mark.parametrize("codec", ["ec(0.25)", "ec(0.5)", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sink", "constant", "wide"])
def test_f11_finite_values_never_come_back_infinite(codec, dtype, kind):
    given_group = group("keys", dtype=dtype)
    largest = torch.finfo(given_group.spec.torch_dtype).max
    tensor = torch.randn(given_group.shape(64), generator=torch.Generator().manual_seed(0))
    if kind == "sink":
        tensor[..., 0, :] = largest
    elif kind == "constant":
        tensor[..., 3] = largest
    else:
        tensor = tensor.clamp(-3, 3) / 3 * (largest / 2)
    tensor, piece, chosen = tensor.to(given_group.spec.torch_dtype), Piece(0, 64), codec_named(codec)
    try:
        back = chosen.decode(given_group, piece, chosen.encode(given_group, tensor, piece))
    except BlockError:
        return
    assert torch.isfinite(back).all()


def test_torchs_defaults_do_not_change_what_is_decoded():
    keys, piece = torch.randn(3, 2, 128, 16), Piece(4096, 128)
    codec = EntropyCodec(0.1, ROTATION)
    parts = codec.encode(group("keys"), keys, piece)
    plain = codec.decode(group("keys"), piece, parts)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(codec.decode(group("keys"), piece, parts), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_outliers_are_at_their_own_places():
    """Places are whole numbers beyond what fp32 counts."""
    coder = SymbolCoder("x", 1, 1, 2**24 + 64, one_class(1))
    codes = torch.zeros((1, 1, 2**24 + 64))
    wanted = {2**24 + 13: 300.0, 7: -4000.0}
    for place, code in wanted.items():
        codes[0, 0, place] = code
    [found] = all_codes(coder, coder.pack(codes))
    back = torch.empty(codes.numel())
    found.put(back)
    back -= found.added
    assert {int(place): float(back[place]) for place in back.nonzero()[:, 0]} == wanted


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_codes_come_back(data):
    """Packed as they are, or a run of one class arranged anew for each number of codes a byte."""
    layers, rows, channels, tokens = (data.draw(st.integers(1, most)) for most in (3, 5, 3, 20))
    columns = channels * tokens * 4
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    spread = torch.rand((layers, rows, 1), generator=generator) ** 4 * data.draw(st.sampled_from([0.1, 2, 20, 1000]))
    codes = (torch.randn((layers, rows, columns), generator=generator) * spread).round()
    count = data.draw(st.sampled_from([1, 3]))
    classes = Classes(torch.randint(0, count, (layers, rows), generator=generator).to(torch.uint8), count)
    coder = SymbolCoder("x", layers, rows, columns, classes)
    is_arranged = count == 1 and data.draw(st.booleans())

    def by_phase(given, phases):
        return given.reshape(-1, phases, channels).transpose(0, 1).contiguous()

    for found in all_codes(coder, coder.pack(codes, by_phase) if is_arranged else coder.pack(codes)):
        rows_of_run = codes[found.layers].view(-1, columns)
        wanted = (by_phase(rows_of_run, found.width) if is_arranged else rows_of_run).reshape(-1)
        plain = torch.empty_like(wanted)
        found.put(plain)
        assert torch.equal(plain - found.added, wanted)
        if is_arranged:
            again = found.in_one_phase(channels)
            again.put(plain)
            assert torch.equal(plain - again.added, rows_of_run.reshape(-1))
        small, rest = found.in_int8()
        whole = small.float()
        whole[torch.from_numpy(rest.places)] += 256 * torch.from_numpy(rest.codes)
        assert torch.equal(whole, wanted)
        assert all(rest.codes != 0)


def test_layers_are_unpacked_a_run_at_a_time_in_their_order():
    codes = torch.arange(7).view(7, 1, 1).expand(7, 4, RUN_VALUES // 8).float()
    coder = SymbolCoder("x", 7, 4, RUN_VALUES // 8, Classes(torch.zeros((7, 4), dtype=torch.uint8)))
    found = all_codes(coder, coder.pack(codes))
    assert [one.layers for one in found] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    firsts = [one.symbols.view(-1, RUN_VALUES // 2)[:, 0].int() - one.added for one in found]
    assert [first.tolist() for first in firsts] == [[0, 1], [2, 3], [4, 5], [6]]


def test_codes_that_are_alike_cost_less_if_they_share_a_byte():
    """Neighbours in time are alike, and what cannot be told from one code is told by two."""
    generator = torch.Generator().manual_seed(0)
    moved = torch.randn((1, 2, 256, 64), generator=generator).repeat_interleave(2, dim=2)
    state = moved + 0.3 * torch.randn(moved.shape, generator=generator)

    def frames(tensor):
        given_group = group("values", heads=2, dim=64, layers=1)
        parts = EntropyCodec.of(0.6).encode(given_group, tensor, Piece(512, 512))
        assert parts["values.codes_a_byte"] == 2
        return len(parts["values.frames"])

    apart = state[:, :, torch.randperm(512, generator=generator)]
    assert frames(state) < 0.9 * frames(apart)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_outliers_are_found_again_when_phases_are_put_together(width):
    state = torch.arange(512.0).view(2, 1, 64, 4) % 2
    state[0, 0, 5, 1], state[1, 0, 62, 3], state[1, 0, 3, 0] = 900.0, -700.0, 300.0
    columns = state.transpose(1, 2).flatten(1)
    order = PhaseByPhase(Heads(64, 1, 4, None))
    symbols, places = order.arranged(columns, width).flatten(), order.arranged(columns, width).abs().flatten() > 99
    found = Outliers(places.nonzero()[:, 0].numpy(), symbols[places].numpy())
    phases = Codes(slice(0, 2), symbols.masked_fill(places, 0.0).to(torch.uint8), 0, found, width)
    room = torch.empty(512)
    phases.in_one_phase(4).put(room)
    assert torch.equal(room.view(state.shape), state)


@pytest.mark.parametrize(
    "pairs", [[(9, 300), (3, 300)], [(3, 300), (3, 301)], [(-1, 300)], [(64, 300)], [(2**31 - 2, 300), (2**31 - 1, 1)]]
)
def test_outliers_out_of_order_or_place_are_refused(pairs):
    coder = SymbolCoder("x", 1, 1, 64, one_class(1))
    codes = torch.zeros(1, 1, 64)
    codes[..., : len(pairs)] = 300.0
    parts = dict(coder.pack(codes))
    places, found = np.array(pairs).T
    parts["x.outlier_planes"] = torch.frombuffer(bytearray(packed([Outliers(places, found)])), dtype=torch.uint8)
    with pytest.raises(BlockError, match="frame"):
        all_codes(coder, parts)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_outliers_come_back_wherever_they_stand_and_whatever_they_are(data):
    """In as few bytes as the farthest and the largest take."""
    size, largest = (2 ** data.draw(st.integers(1, most)) for most in (31, 24))
    runs = []
    for _ in range(data.draw(st.integers(1, 4))):
        places = sorted(data.draw(st.sets(st.integers(0, size - 1), max_size=20)))
        codes = [data.draw(st.integers(-largest, largest)) for _ in places]
        runs.append(Outliers(np.array(places, np.int64), np.array(codes, np.float32)))
    blob = packed(runs)
    found = unpacked(memoryview(blob), [len(run) for run in runs], [size] * len(runs))
    for run, back in zip(runs, found, strict=True):
        assert np.array_equal(run.places, back.places)
        assert np.array_equal(run.codes, back.codes)
    assert not blob or (blob[0] <= size.bit_length() // 8 + 1 and blob[1] <= largest.bit_length() // 8 + 1)


@pytest.mark.parametrize(
    "data",
    [b"", b"\2", b"\2\1", b"\0\1" + compress(b"\1"), b"\1\0" + compress(b"\1"), b"\5\1" + compress(b"\1" * 6),
     b"\1\5" + compress(b"\1" * 6), b"\1\1" + compress(b"\1" * 3), b"\1\1" + compress(b"\1" * 2) + b"more"],
)  # fmt: skip
def test_planes_of_outliers_that_packed_does_not_write_are_refused(data):
    """Nor are any read where none are counted."""
    assert unpacked(memoryview(b"\1\1" + compress(b"\1\1")), [1], [9])[0].places.tolist() == [0]
    with pytest.raises(BlockError, match="frame"):
        unpacked(memoryview(data), [1], [9])
    if data:
        with pytest.raises(BlockError, match="frame"):
            unpacked(memoryview(data), [0], [9])


@pytest.mark.parametrize("counts", [[-1], [65], [2]])
def test_counts_of_outliers_that_cannot_be_are_refused(counts):
    coder = SymbolCoder("x", 1, 1, 64, one_class(1))
    codes = torch.zeros(1, 1, 64)
    codes[..., 5] = 300.0
    parts = {**coder.pack(codes), "x.outlier_counts": torch.tensor(counts, dtype=torch.int32)}
    with pytest.raises(BlockError, match="frame"):
        all_codes(coder, parts)


@pytest.mark.parametrize("width", [0, 3, 4, 255])
@pytest.mark.parametrize("place", [0, 1])
def test_codes_a_byte_that_pack_does_not_write_are_refused(width, place):
    """Of a class with rows, and of one without."""
    coder = SymbolCoder("x", 1, 1, 64, Classes(torch.zeros((1, 1), dtype=torch.uint8), 2))
    codes = torch.randint(-7, 8, (1, 1, 64), generator=torch.Generator().manual_seed(0)).float()
    parts = dict(coder.pack(codes))
    assert parts["x.codes_a_byte"].tolist() == [[2, 0]]
    parts["x.codes_a_byte"][0, place] = width
    if (width, place) != (0, 1):
        with pytest.raises(BlockError, match="frame"):
            all_codes(coder, parts)


@pytest.mark.parametrize("lends", [True, False])
def test_a_frame_of_one_code_a_byte_is_read_in_its_own_memory_and_never_changed(lends, monkeypatch):
    codes = torch.randint(-100, 101, (2, 1, 512), generator=torch.Generator().manual_seed(0)).float()
    coder = SymbolCoder("x", 2, 1, 512, one_class(2))
    parts, decompressed = coder.pack(codes), []
    assert parts["x.codes_a_byte"].tolist() == [[1]]

    def noted(*given):
        decompressed.append(decompress(*given))
        return decompressed[-1]

    def refusing(_):
        raise BufferError

    monkeypatch.setattr(frames, "decompress", noted)
    if not lends:
        monkeypatch.setattr(frames, "from_dlpack", refusing)
    [found] = all_codes(coder, parts)
    [data] = decompressed
    before = bytes(bytearray(data))
    assert (found.symbols.data_ptr() == np.frombuffer(data, dtype=np.uint8).ctypes.data) == lends
    for _ in range(2):
        small, rest = found.in_int8()
        assert not len(rest)
        assert torch.equal(small.float().view(2, 1, 512), codes)
    assert data == before
    room = torch.empty(1024)
    found.put(room)
    assert torch.equal(room.view(2, 1, 512) - found.added, codes)
    assert found.width == 1


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_lines_are_put_back_into_heads(data):
    """Any numbers of heads, groups and channels; turned whole, in part or not, in pairs of either order.

    Token by token, or in phases; into state whose heads lie one after the other, or side by side.
    """
    layers, groups, heads, pairs, rest = (data.draw(st.integers(1, most)) for most in (3, 2, 3, 5, 4))
    is_turned, phases = data.draw(st.booleans()), data.draw(st.sampled_from([0, 1, 2, 4]))
    rest, tokens = data.draw(st.sampled_from([0, rest])), data.draw(st.integers(1, 6))
    groups, tokens = (1, tokens * phases * SPAN_TOKENS) if phases else (groups, tokens)
    channels = 2 * pairs + rest
    rotation = Rotation(tuple(0.9**n for n in range(pairs)), data.draw(st.booleans()))
    turn = rotation.at(data.draw(st.integers(0, 999)), tokens) if is_turned else None
    by_head = Heads(tokens, heads, channels, turn, groups=groups)
    order = PhaseByPhase(by_head) if phases else TokenByToken(by_head)
    columns = torch.randint(-9, 9, (layers * groups, tokens, heads * channels)).float()
    mean, slope = torch.randn(layers, groups, heads * channels), torch.rand(layers, groups, heads * channels)
    open_tokens, dtype = data.draw(st.sampled_from([0, 3])), data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    decoded = torch.full((layers, groups * heads, tokens + open_tokens, channels), 7.0, dtype=dtype)
    if data.draw(st.booleans()):
        decoded = decoded.transpose(1, 2).contiguous().transpose(1, 2)
    back = Lines(order, mean, slope, decoded)
    for run in (slice(0, 2), slice(2, 3)) if layers == 3 else (slice(0, layers),):
        lines = columns.view(layers, groups, tokens, -1)[run].flatten(0, 1)
        numbers = order.arranged(lines.flatten(1), phases) if phases else lines
        back.room(run, phases or 1).copy_(numbers.flatten().add(5))
        back.write(run, phases or 1, added=5)
    state = columns.view(layers, groups, tokens, -1) * slope[:, :, None] + mean[:, :, None]
    wanted = torch.empty_like(state)
    wanted[..., by_head.order] = state
    wanted = wanted.unflatten(-1, (heads, channels)).transpose(2, 3).flatten(1, 2)
    wanted = (turn.forward(wanted) if turn else wanted).to(dtype)
    rtol = 1e-5 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(decoded[:, :, :tokens], wanted, rtol=rtol, atol=1e-4)
    assert bool((decoded[:, :, tokens:] == 7.0).all())


def test_f11_a_block_that_would_grow_is_stored_as_it_is():
    given_block = block(128, dtype=torch.bfloat16)

    class Huge(RawCodec):
        name = "huge"

        def fields(self, group, piece):
            return (*RawCodec.fields(self, group, piece), TensorField(f"{group.name}.more", "U8", (2**17,)))

        def encode(self, group, tensor, piece):
            return {
                **RawCodec.encode(self, group, tensor, piece),
                f"{group.name}.more": torch.zeros(2**17, dtype=torch.uint8),
            }

    coded = CodecChain(Huge()).code(given_block)
    assert coded.header.codec == {"name": "raw"}
    back = decode_blob(bytearray(b"".join(coded.blob)), given_block.key, given_block.layout)
    assert all(map(torch.equal, back.tensors, given_block.tensors))


def test_scratch_gives_the_same_memory_again():
    scratch = Scratch()
    first = [scratch((4, 8), torch.float32), scratch((4, 8), torch.bfloat16)]
    scratch.reuse()
    again = [scratch((4, 8), torch.float32), scratch((2, 8), torch.bfloat16)]
    assert [tensor.data_ptr() for tensor in again] == [tensor.data_ptr() for tensor in first]
    assert first[0].data_ptr() != first[1].data_ptr()
    scratch.reuse()
    assert scratch((400, 8), torch.float32).shape == (400, 8)
