"""KVBlock ↔ one safetensors blob, verified to the last bit before a tensor is made of it.

The safetensors library is not used to read: it maps files (a shared file may change under the map), and it
checks structure, not values. The header is rebuilt from what the reader expects and compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from ghostcacher.blocks import DTYPES, KVBlock, KVLayout
from ghostcacher.codecs.base import SAFETENSORS_DTYPES, Codec, Piece, Room, Spread, TensorCodec, fresh, one_by_one
from ghostcacher.codecs.header import (
    ITEM_BYTES,
    VARIABLE,
    BlockHeader,
    Buffer,
    Certificate,
    TensorField,
    blanked,
    check_digest,
    header_bytes,
    sealed,
)
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.registry import Finder, codec_from, record_of
from ghostcacher.errors import BlockError, ConfigurationError, MissingExtraError
from ghostcacher.keys import BlockKey
from ghostcacher.transfers import in_ram

SLACK_BYTES = 2**16
_TORCH_DTYPES = {short: DTYPES[name] for name, short in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Coded:
    """A block as it is stored: its header and the bytes of its tensors."""

    header: BlockHeader
    parts: tuple[Buffer, ...]

    @classmethod
    def parse(cls, blob: Buffer, key: BlockKey) -> Self:
        """The stored block of ``key`` in ``blob``, verified but for its geometry, not decoded.

        Raises:
            BlockError: ``header``, ``version``, ``key_echo``, ``corrupt``, or ``geometry`` (of another length).
        """
        header, end = BlockHeader.parse(blob), header_bytes(blob)
        if header.key != key:
            raise BlockError("key_echo", "these are the bytes of another block")
        if len(blob) != end + header.data_bytes or header.render() != blanked(memoryview(blob)[:end]):
            raise BlockError("geometry", "not the header that its content gives")
        check_digest(blob)
        return cls(header, (memoryview(blob)[end:],))

    @property
    def blob(self) -> Sequence[Buffer]:
        """Buffers to be written one after another."""
        return [sealed(self.header.render(), self.parts), *self.parts]

    def certified(self, certificate: Certificate) -> Coded:
        """The same with a certificate."""
        return Coded(replace(self.header, certificate=certificate), self.parts)


@dataclass(frozen=True, slots=True)
class CodecChain:
    """A tensor codec, then the safetensors serializer. ``find`` knows the codecs of blocks that are read."""

    codec: Codec
    find: Finder | None = field(default=None, compare=False)

    def encode(self, block: KVBlock, *, model: str = "") -> Sequence[Buffer]:
        """The blob as buffers to be written one after another. Raises what `code` raises."""
        return self.code(block, model=model).blob

    def code(self, block: KVBlock, *, model: str = "") -> Coded:
        """``block`` as it is stored. Does not change it.

        Raises:
            BlockError: ``geometry`` (the block is not of its own layout), or what the codec raises: ``nonfinite``,
                ``uncalibrated``, ``tables``.
        """
        if not block.has_expected_shape():
            raise BlockError("geometry", "the block's tensors do not have the shapes of its layout")
        coded = _coded(self.codec.for_layout(block.layout), block, model)
        # Values that a codec was not made for may take more than they do raw, and more than a reader will read.
        is_larger = sum(map(len, coded.parts)) > block.layout.bytes_of(block.key) + SLACK_BYTES
        return _coded(RawCodec(), block, model) if is_larger else coded


def _coded(codec: TensorCodec, block: KVBlock, model: str) -> Coded:
    piece = Piece.of(block.key)
    tensors: dict[str, torch.Tensor] = {}
    for group, tensor in zip(block.layout.groups_of(block.key), block.tensors, strict=True):
        tensors.update(codec.encode(group, in_ram(tensor.detach()), piece))
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    header = BlockHeader(
        block.key, block.layout.digest, record_of(codec), block.lossy or codec.lossy, model,
        blob_fields(codec, block.layout, block.key, sizes),
    )  # fmt: skip
    return Coded(header, tuple(_bytes_of(tensors[field.name]) for field in header.fields))


def decode_blob(
    blob: Buffer, key: BlockKey, layout: KVLayout, *, exact_only: bool = False, find: Finder | None = None,
    room: Room = fresh, spread: Spread = one_by_one,
) -> KVBlock:  # fmt: skip
    """Verify ``blob`` as exactly ``key`` in ``layout`` and decode it.

    The block's tensors lie in memory from ``room``, or share that of ``blob``; ``spread`` decodes their layers.

    Any codec that ``find`` knows (all of this version) is read, whatever the store writes now.

    Raises:
        BlockError: with the reason, for anything that is not bit for bit what was written for this key.
    """
    claimed = BlockHeader.parse(blob)
    if claimed.key != key:
        raise BlockError("key_echo", "these are the bytes of another block")
    if exact_only and claimed.lossy:
        raise BlockError("lossy", "a lossy block in an exact store")
    try:
        with torch.inference_mode(mode=False):  # a thread's own: else others could not write to what this one makes
            return _verified(blob, claimed, key, layout, find, room, spread)
    except BlockError:
        raise
    except (ConfigurationError, MissingExtraError) as error:
        raise BlockError("codec", str(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise BlockError("memory", "not enough memory to decode it") from error
    except Exception as error:
        raise BlockError("frame", f"not what its codec writes ({type(error).__name__}: {error})") from error


def _verified(
    blob: Buffer, claimed: BlockHeader, key: BlockKey, layout: KVLayout, find: Finder | None, room: Room,
    spread: Spread,
) -> KVBlock:  # fmt: skip
    codec = codec_from(claimed.codec, find)
    if codec.lossy and not claimed.lossy:
        raise BlockError("geometry", "a lossy codec in a block that says it is exact")
    claims = {field.name: field.shape[0] for field in claimed.fields if len(field.shape) == 1}
    fields = blob_fields(codec, layout, key, claims)
    expected = claimed.expecting(key, layout.digest, fields)
    end = header_bytes(blob)
    if expected.render() != blanked(memoryview(blob)[:end]) or len(blob) != end + expected.data_bytes:
        raise BlockError("geometry", "the header is not the one that this layout and codec give")
    check_digest(blob)
    parts = _parts(blob, end, fields)
    groups, piece = layout.groups_of(key), Piece.of(key)
    tensors = tuple(codec.decode(group, piece, parts, room, spread) for group in groups)
    return KVBlock(key, layout, tensors, lossy=claimed.lossy)


def blob_fields(
    codec: TensorCodec, layout: KVLayout, key: BlockKey, sizes: Mapping[str, int]
) -> tuple[TensorField, ...]:
    """Every tensor of a blob in storing order: widest dtype first, so that each begins aligned.

    ``sizes`` are those of tensors whose size follows from the values.
    """
    piece = Piece.of(key)
    fields = [
        replace(field, shape=(max(0, sizes.get(field.name, 0)),)) if VARIABLE in field.shape else field
        for group in layout.groups_of(key) for field in codec.fields(group, piece)
    ]  # fmt: skip
    return tuple(sorted(fields, key=lambda field: (-ITEM_BYTES[field.dtype], field.name)))


def _parts(blob: Buffer, offset: int, fields: Sequence[TensorField]) -> dict[str, torch.Tensor]:
    data = blob if not memoryview(blob).readonly else bytearray(blob)
    parts: dict[str, torch.Tensor] = {}
    for each in fields:
        count = each.size_bytes // ITEM_BYTES[each.dtype]
        dtype = _TORCH_DTYPES[each.dtype]
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=offset) if count else fresh((0,), dtype)
        parts[each.name] = flat.view(each.shape)
        offset += each.size_bytes
    return parts


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    view: memoryview = flat.numpy().data
    return view
