"""int8 and int4: groups, definitions by hand, and codes that stay when coded again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghostcacher.blocks import KVBlock, KVLayout
from ghostcacher.codecs import fused
from ghostcacher.codecs.base import Piece
from ghostcacher.codecs.int4 import Int4Codec
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.safetensors_format import CodecChain
from ghostcacher.errors import BlockError
from ghostcacher.keys import PrefixChain
from ghostcacher.testing.codec import group
from ghostcacher.testing.tier import NAMESPACE

CODEC = Int8Codec()
CODECS = {"int8": CODEC, "int4": Int4Codec()}
LATER = Piece(128, 64)


def test_keys_are_grouped_by_channel_and_values_by_token():
    keys = CODEC.encode(group("keys", heads=3, dim=64), torch.randn(3, 3, 128, 64), Piece(0, 128))
    assert keys["keys.far"].shape == (3, 3, 2, 64)
    values = CODEC.encode(group("values", heads=3, dim=64), torch.randn(3, 3, 128, 64), Piece(0, 128))
    assert values["values.far"].shape == (3, 3, 128, 1)
    assert values["values.codes"].dtype == torch.uint8


def test_wide_heads_are_cut_at_64_channels():
    values = CODEC.encode(group("values", dim=128), torch.randn(3, 2, 64, 128), LATER)
    assert values["values.near"].shape == (3, 2, 64, 2)


@pytest.mark.parametrize(("codec", "steps"), [(CODEC, 255), (Int4Codec(), 15)])
def test_the_definition_by_hand(codec, steps):
    tensor = torch.randn(3, 2, 64, 16).bfloat16()
    parts = codec.encode(group("keys", dtype="bfloat16"), tensor, LATER)
    rounded = tensor.float()
    minimum, maximum = rounded.amin(2), rounded.amax(2)
    is_below = maximum.abs() < minimum.abs()
    near, far = torch.where(is_below, maximum, minimum), torch.where(is_below, minimum, maximum)
    codes = ((rounded - near[:, :, None]) / ((far - near) / steps)[:, :, None]).round()
    assert torch.equal(parts["keys.far"][:, :, 0].float(), far)
    assert torch.equal(parts["keys.near"][:, :, 0].float(), near)
    packed = codes if steps == 255 else codes[:, :, :32] + 16 * codes[:, :, 32:]
    assert torch.equal(parts["keys.codes"].float(), packed)


def test_bytes_of_int4_values_hold_channels_half_a_group_apart():
    tensor = torch.zeros(1, 1, 64, 4)
    tensor[0, 0, 7] = torch.tensor([0.0, 15.0, 3.0, 9.0])
    parts = Int4Codec().encode(group("values", heads=1, dim=4, layers=1), tensor, LATER)
    assert parts["values.codes"][0, 0, 7].tolist() == [0 + 16 * 3, 15 + 16 * 9]


@pytest.mark.parametrize(("codec", "bits"), [(CODEC, 8.5), (Int4Codec(), 4.5)])
def test_bits_a_value(codec, bits):
    layout = KVLayout.uniform(layers=30, heads=3, head_dim=64, dtype="bfloat16")
    chain = PrefixChain.of(list(range(256)), NAMESPACE, 128)
    tensors = tuple(torch.randn(g.shape(128)).bfloat16() for g in layout.groups)
    blob = CodecChain(codec).encode(KVBlock(chain.block(1), layout, tensors))
    values = sum(tensor.numel() for tensor in tensors)
    assert sum(len(part) for part in blob[1:]) * 8 / values == bits
    assert len(blob[0]) < 4096


@pytest.fixture(params=["torch", "numba"])
def decoder(request, monkeypatch):
    """What decodes: torch, or one pass of numba's, if it is installed."""
    if request.param == "torch":
        monkeypatch.setattr(fused, "compile_all", lambda: None)
    elif fused.compile_all() is None:
        pytest.skip('numba is not installed: pip install "ghostcacher[fast]"')


@pytest.mark.usefixtures("decoder")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(CODECS)), st.sampled_from(["keys", "values"]), st.sampled_from([0, 128]),
    st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(0, 10**6), st.floats(-4, 4), st.floats(-100, 100),
    st.sampled_from([0, 1, 4]),
)  # fmt: skip
def test_coding_what_was_decoded_gives_the_same_bytes(codec, name, start, dtype, seed, exponent, offset, zeros):
    codec, piece, given_group = CODECS[codec], Piece(start, 128), group(name, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(given_group.shape(128), generator=generator)
    # Zeros of both signs, among others or alone.
    tensor = torch.where(tensor.abs() < zeros, tensor * 0.0, (tensor + offset) * 10**exponent)
    tensor = tensor.clamp(-6e4, 6e4).to(given_group.spec.torch_dtype)
    parts = codec.encode(given_group, tensor, piece)
    again = codec.encode(given_group, codec.decode(given_group, piece, parts), piece)
    assert all(torch.equal(part.view(torch.uint8), again[field].view(torch.uint8)) for field, part in parts.items())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize(("dim", "tokens"), [(16, 64), (64, 128), (128, 200), (96, 64)])
def test_in_one_pass_and_in_torch_the_same_comes_out(monkeypatch, codec, name, dim, tokens):
    if fused.compile_all() is None:
        pytest.skip('numba is not installed: pip install "ghostcacher[fast]"')
    codec, given_group, piece = CODECS[codec], group(name, dim=dim, dtype="bfloat16"), Piece(0, tokens)
    tensor = (torch.randn(given_group.shape(tokens)) * 3 + 1).bfloat16()
    parts = codec.encode(given_group, tensor, piece)
    poisoned = torch.full(given_group.shape(tokens), torch.nan, dtype=torch.bfloat16)
    found = codec.decode(given_group, piece, parts, lambda _shape, _dtype: poisoned)
    assert found.data_ptr() == poisoned.data_ptr()
    monkeypatch.setattr(fused, "compile_all", lambda: None)
    plain = codec.decode(given_group, piece, parts)
    # torch may multiply and add in one rounding: where the two cancel, that is all that is left.
    assert torch.allclose(found.float(), plain.float(), rtol=2**-7, atol=1e-5)
    assert (found == plain).float().mean() > 0.99


def test_without_a_compiler_numba_is_left_alone(monkeypatch):
    numba = pytest.importorskip("numba", reason='numba: pip install "ghostcacher[fast]"')
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert fused.compile_all.__wrapped__() is None


def test_where_numba_cannot_keep_what_it_compiled_it_compiles_again(monkeypatch):
    numba = pytest.importorskip("numba", reason='numba: pip install "ghostcacher[fast]"')
    kept = numba.njit

    def njit(*given, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'int8_keys': no locator available")
        return kept(*given, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert fused.compile_all.__wrapped__() is not None


def test_the_first_tokens_of_a_prefix_do_not_widen_int4():
    tensor = torch.randn(3, 2, 64, 16)
    with_sinks = tensor.clone()
    with_sinks[:, :, :4] *= 1000
    parts = Int4Codec().encode(group("keys"), with_sinks, Piece(0, 64))
    assert (parts["keys.far"].float().abs() * torch.exp2(-parts["keys.shift"].float())[:, None, None, None]).max() < 10
    back = Int4Codec().decode(group("keys"), Piece(0, 64), parts)
    assert torch.equal(back[:, :, :4], with_sinks[:, :, :4].bfloat16().float())
    assert "keys.sinks" not in Int4Codec().encode(group("keys"), tensor, LATER)


@pytest.mark.parametrize("codec", CODECS)
def test_an_open_group_keeps_the_models_dtype(codec):
    tensor = torch.randn(3, 2, 100, 16).bfloat16()
    given_group, piece = group("keys", dtype="bfloat16"), Piece(128, 100)
    parts = CODECS[codec].encode(given_group, tensor, piece)
    assert torch.equal(parts["keys.rest"], tensor[:, :, 64:])
    assert torch.equal(CODECS[codec].decode(given_group, piece, parts)[:, :, 64:], tensor[:, :, 64:])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [1, 5])
def test_f10_nonfinite_values_are_refused(codec, bad, token):
    tensor = torch.randn(3, 2, 64, 16)
    tensor[1, 1, token, 3] = bad
    with pytest.raises(BlockError, match="nonfinite"):
        CODECS[codec].encode(group("keys"), tensor, Piece(0, 64))
