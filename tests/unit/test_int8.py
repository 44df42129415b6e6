from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostcacher.blocks import KVBlock, KVLayout
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.safetensors_format import CodecChain
from ghostcacher.errors import BlockError
from ghostcacher.keys import PrefixChain
from ghostcacher.testing.codec import group
from ghostcacher.testing.tier import NAMESPACE

CODEC = Int8Codec()


def test_keys_are_grouped_by_channel_and_values_by_token():
    keys = CODEC.encode(group("keys", heads=3, dim=64), torch.randn(3, 3, 128, 64))
    assert keys["keys.scale"].shape == (3, 3, 2, 64)
    values = CODEC.encode(group("values", heads=3, dim=64), torch.randn(3, 3, 128, 64))
    assert values["values.scale"].shape == (3, 3, 128, 1)
    assert values["values.codes"].dtype == torch.uint8


def test_wide_heads_are_cut_at_64_channels():
    values = CODEC.encode(group("values", dim=128), torch.randn(3, 2, 64, 128))
    assert values["values.minimum"].shape == (3, 2, 64, 2)


def test_the_definition_by_hand():
    tensor = torch.randn(3, 2, 64, 16)
    parts = CODEC.encode(group("keys"), tensor)
    minimum, maximum = tensor.amin(2), tensor.amax(2)
    scale = ((maximum - minimum) / 255).bfloat16()
    codes = ((tensor - minimum.bfloat16().float()[:, :, None]) / scale.float()[:, :, None]).round().clamp(0, 255)
    assert torch.equal(parts["keys.scale"][:, :, 0], scale)
    assert torch.equal(parts["keys.minimum"][:, :, 0], minimum.bfloat16())
    assert torch.equal(parts["keys.codes"].float(), codes)


def test_eight_and_a_half_bits():
    layout = KVLayout.uniform(layers=30, heads=3, head_dim=64, dtype="bfloat16")
    chain = PrefixChain.of(list(range(128)), NAMESPACE, 128)
    tensors = tuple(torch.randn(g.shape(128)).bfloat16() for g in layout.groups)
    blob = CodecChain(CODEC).encode(KVBlock(chain.block(0), layout, tensors))
    values = sum(tensor.numel() for tensor in tensors)
    assert sum(len(part) for part in blob[1:]) * 8 / values == 8.5
    assert len(blob[0]) < 4096


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["keys", "values"]), st.sampled_from([64, 128]), st.integers(0, 10**6), st.floats(-8, 8))
def test_coding_twice_moves_a_value_by_one_step_at_most(name, tokens, seed, exponent):
    given_group = group(name, dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(given_group.shape(tokens), generator=generator) * 10**exponent
    parts = CODEC.encode(given_group, tensor)
    decoded = CODEC.decode(given_group, tokens, parts)
    again = CODEC.decode(given_group, tokens, CODEC.encode(given_group, decoded))
    assert (again - decoded).abs().max() <= 1.01 * parts[f"{name}.scale"].float().max()


def test_an_open_group_keeps_the_models_dtype():
    tensor = torch.randn(3, 2, 100, 16).bfloat16()
    given_group = group("keys", dtype="bfloat16")
    parts = CODEC.encode(given_group, tensor)
    assert parts["keys.codes"].shape[2] == 64
    assert torch.equal(parts["keys.rest"], tensor[:, :, 64:])
    assert torch.equal(CODEC.decode(given_group, 100, parts)[:, :, 64:], tensor[:, :, 64:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_values_are_refused(bad):
    tensor = torch.randn(3, 2, 64, 16)
    tensor[1, 1, 5, 3] = bad
    with pytest.raises(BlockError, match="nonfinite"):
        CODEC.encode(group("keys"), tensor)
