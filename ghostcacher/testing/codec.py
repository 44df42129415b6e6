"""What every codec must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import pytest
import torch

from ghostcacher.blocks import TOKENS, KVBlock, KVLayout, LayerSpec, Role, TensorGroup, TensorSpec
from ghostcacher.codecs import symbols
from ghostcacher.codecs.base import SAFETENSORS_DTYPES, Piece, TensorCodec
from ghostcacher.codecs.header import VARIABLE
from ghostcacher.codecs.registry import Finder, codec_from, record_of
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.codecs.scratch import Scratch
from ghostcacher.keys import Namespace, PrefixChain

ONE_LAYER = 2**12
"""Values: so many are coded and decoded at once, where that is to be one layer of `block`."""

_Item = TypeVar("_Item")


def group(name: str = "keys", *, heads: int = 2, dim: int = 16, dtype: str = "float32", layers: int = 3) -> TensorGroup:
    """A group of equal tensors."""
    role: Role | None = "keys" if name == "keys" else "values" if name == "values" else None
    return TensorGroup(name, TensorSpec(name, dtype, (heads, TOKENS, dim), role=role), tuple(range(layers)))


def block(tokens: int = 128, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> KVBlock:
    """A random block of 3 layers; values have another width than keys."""
    name = str(dtype).removeprefix("torch.")
    specs = (
        TensorSpec("keys", name, (2, TOKENS, 16), role="keys"),
        TensorSpec("values", name, (2, TOKENS, 12), role="values"),
    )
    layout = KVLayout(tuple(LayerSpec("full", specs) for _ in range(3)))
    chain = PrefixChain.of(list(range(tokens)), Namespace(bytes(32)), max(16, tokens))
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = [group.shape(tokens) for group in layout.groups]
    tensors = tuple(torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes)
    return KVBlock(chain.tail(tokens), layout, tensors)


class CodecContract:
    """Subclass it and give a fixture ``codec``; set ``relative_error`` to the bound that a lossy codec states.

    A codec that does not stand in the registry gives ``find`` too: what makes one from its record.
    """

    relative_error = 0.0
    find: Finder | None = None

    @pytest.mark.parametrize("tokens", [1, 16, 63, 64, 65, 128, 130])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("name", ["keys", "values", "index"])
    def test_fields_are_what_encode_gives(self, codec: TensorCodec, tokens: int, dtype: str, name: str) -> None:
        given = group(name, dtype=dtype)
        tensor = torch.randn(given.shape(tokens)).to(given.spec.torch_dtype)
        parts = codec.encode(given, tensor, Piece(0, tokens))
        fields = {field.name: field for field in codec.fields(given, Piece(0, tokens))}
        assert fields.keys() == parts.keys()
        for field, part in ((fields[key], part) for key, part in parts.items()):
            assert field.dtype == SAFETENSORS_DTYPES[str(part.dtype).removeprefix("torch.")]
            assert field.shape in {tuple(part.shape), (VARIABLE,)}
            assert len(field.shape) == part.dim()
        back = codec.decode(given, Piece(0, tokens), parts)
        assert back.shape == tensor.shape
        assert back.dtype == tensor.dtype

    @pytest.mark.parametrize("tokens", [1, 64, 128, 130])
    @pytest.mark.parametrize("kind", ["random", "constant", "zero", "tiny", "large", "outlier"])
    def test_error_is_within_the_stated_bound(self, codec: TensorCodec, tokens: int, kind: str) -> None:
        for name in ("keys", "values"):
            given = group(name)
            tensor = inputs(kind, given.shape(tokens))
            back = codec.decode(given, Piece(0, tokens), codec.encode(given, tensor, Piece(0, tokens)))
            if not codec.lossy:
                assert torch.equal(back, tensor)
            assert float((back - tensor).abs().max()) <= self.relative_error * float(tensor.abs().max())

    @pytest.mark.parametrize("heads", [1, 2])
    def test_the_input_is_not_changed(self, codec: TensorCodec, heads: int) -> None:
        given = group(heads=heads)
        tensor = torch.randn(given.shape(64))
        kept = tensor.clone()
        codec.decode(given, Piece(0, 64), codec.encode(given, tensor, Piece(0, 64)))
        assert torch.equal(tensor, kept)

    def test_its_record_builds_an_equal_codec(self, codec: TensorCodec) -> None:
        assert codec_from(record_of(codec), self.find) == codec

    @pytest.mark.parametrize("tokens", [5, 64, 100, 128])
    def test_a_block_survives_the_blob(self, codec: TensorCodec, tokens: int) -> None:
        given = block(tokens, dtype=torch.bfloat16)
        blob = b"".join(CodecChain(codec).encode(given))
        back = decode_blob(bytearray(blob), given.key, given.layout, find=self.find)
        assert back.has_expected_shape()
        assert back.lossy == codec.lossy
        if not codec.lossy:
            assert all(torch.equal(a, b) for a, b in zip(back.tensors, given.tensors, strict=True))

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layers_may_be_decoded_at_once(
        self, codec: TensorCodec, dtype: torch.dtype, mode: Callable[[], AbstractContextManager[None]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(symbols, "RUN_VALUES", ONE_LAYER)
        given = block(130, dtype=dtype)
        blob = bytearray(b"".join(CodecChain(codec).encode(given)))
        plain, room = decode_blob(blob, given.key, given.layout, find=self.find), Scratch()
        for _ in range(5):
            room.reuse()
            with mode():
                back = decode_blob(blob, given.key, given.layout, find=self.find, room=room, spread=at_once)
            assert all(torch.equal(a, b) for a, b in zip(back.tensors, plain.tensors, strict=True))

    @pytest.mark.parametrize("tokens", [5, 64, 130])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_device_users_make_their_default_changes_nothing(
        self, codec: TensorCodec, tokens: int, dtype: torch.dtype
    ) -> None:
        given = block(tokens, dtype=dtype)
        blob = b"".join(CodecChain(codec).encode(given))
        plain = decode_blob(bytearray(blob), given.key, given.layout, find=self.find)
        with torch.device("meta"):  # where nothing can be read
            again = b"".join(CodecChain(codec).encode(given))
            back = decode_blob(bytearray(blob), given.key, given.layout, find=self.find)
        assert again == blob
        assert all(torch.equal(a, b) for a, b in zip(back.tensors, plain.tensors, strict=True))


def at_once(function: Callable[[_Item], None], items: Sequence[_Item], /) -> None:
    """A `Spread` with a thread for each item."""
    with ThreadPoolExecutor(max(1, len(items))) as pool:
        list(pool.map(function, items))


def inputs(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random, constant, zero, tiny or large values, or random ones with an outlying channel."""
    random = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if kind == "outlier":
        random[..., 0] *= 1e3
    return {
        "random": random, "constant": torch.full(shape, 0.7), "zero": torch.zeros(shape), "tiny": random * 1e-20,
        "large": random * 1e20, "outlier": random,
    }[kind]  # fmt: skip
