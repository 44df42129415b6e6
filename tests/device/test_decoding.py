"""Decoding where state is wanted. Without a GPU, torch's meta device shows that nothing is mixed or read back."""

from __future__ import annotations

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.blocks import Rotation
from ghostcacher.codecs.base import Piece
from ghostcacher.codecs.bf16 import Bf16Codec
from ghostcacher.codecs.bnb import BnbFp4Codec, BnbInt8Codec, BnbNf4Codec
from ghostcacher.codecs.ec import EntropyCodec
from ghostcacher.codecs.int4 import Int4Codec
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.planes import PlaneCodec
from ghostcacher.codecs.scratch import Scratch
from ghostcacher.codecs.tables import Table, Tables
from ghostcacher.testing.codec import group
from ghostcacher.testing.models import random_prompt, tiny_model

ROTATION = Rotation((1.0, 0.3, 0.1))
DTYPES = ("float32", "bfloat16", "float16")


def kvt():
    basis = torch.linalg.qr(torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)))[0]
    table = Table.of(torch.zeros(3, 32), basis, torch.ones(3, 32))
    return KvtCodec(0.02, Tables({"keys": table, "values": table}, ROTATION, ()))


CODECS = {
    "raw.z": PlaneCodec(), "int8": Int8Codec(), "int4": Int4Codec(), "bf16": Bf16Codec(),
    "ec": EntropyCodec(0.02, ROTATION), "kvt": kvt(), "bnb_int8": BnbInt8Codec(), "bnb_nf4": BnbNf4Codec(),
    "bnb_fp4": BnbFp4Codec(),
}  # fmt: skip
CODED = {"raw.z": ("float32", "bfloat16"), "bf16": ("float32",)}


def coded(codec, name, dtype, tokens):
    given, piece = group(name, dtype=dtype), Piece(0, tokens)
    tensor = torch.randn(given.shape(tokens), generator=torch.Generator().manual_seed(1)) * 3
    tensor[0, 0, 5, 1] = 60.0  # codes far out
    tensor = tensor.to(given.spec.torch_dtype)
    return given, piece, tensor, codec.encode(given, tensor, piece)


@pytest.mark.parametrize("tokens", [64, 130, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_computed_is_computed_where_the_room_is(codec, name, dtype, tokens):
    if dtype not in CODED.get(codec, DTYPES):
        pytest.skip("this codec stores it as it is")
    codec = CODECS[codec]
    given, piece, tensor, parts = coded(codec, name, dtype, tokens)
    found = codec.decode(given, piece, parts, Scratch("meta"))
    assert found.device.type == "meta"
    assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("tokens", [64, 130, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_gpu_codes_and_decodes_as_the_cpu_does(codec, name, dtype, tokens):
    codec = CODECS[codec]
    given, piece, tensor, parts = coded(codec, name, dtype, tokens)
    plain = codec.decode(given, piece, parts)
    scratch = Scratch("cuda")
    found = codec.decode(given, piece, parts, scratch)
    scratch.settle()
    exact = {"rtol": 2e-2 if dtype != "float32" else 1e-5, "atol": 1e-4}
    torch.testing.assert_close(found.cpu(), plain, **exact)
    there = codec.encode(given, tensor.cuda(), piece)
    again = codec.decode(given, piece, {field: part.cpu() for field, part in there.items()})
    assert (again - tensor).abs().max() <= 1.1 * (plain - tensor).abs().max() + 1e-4


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_sums_are_whole_numbers_at_any_precision(precision, sums_with_outliers):
    """With "high" a GPU multiplies numbers of eleven bits."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found, wanted = sums_with_outliers(torch.device("cuda"))
    finally:
        torch.set_float32_matmul_precision(kept)
    assert torch.equal(found, wanted)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("codec", ["raw", "raw.z", "bf16", "int8", "int4", "ec(0.02)"])
def test_a_model_on_a_gpu_goes_on_from_what_a_tier_decodes_there(codec, with_logits, tmp_path):
    model, prompt = tiny_model("llama").cuda(), random_prompt(200, seed=3).cuda()
    expected = with_logits(model, prompt)
    for turn in range(2):
        with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64, codec=codec) as store:
            cache = GhostCache(model, store)
            found = with_logits(model, prompt, cache)
            assert cache.report.cached_tokens == 199 * turn
            # Of the first token alone: after another one the logits are those of another text.
            atol = 1e-3 if codec.startswith("raw") else 0.6 if codec == "int4" else 0.1  # as on a CPU
            torch.testing.assert_close(found[1][0], expected[1][0], atol=atol, rtol=0)
