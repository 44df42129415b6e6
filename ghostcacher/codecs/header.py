"""The head of a stored block: who it is, how it is coded, what tensors follow. Needs no torch.

A stored block is a safetensors file. Its ``__metadata__`` begins with the payload digest, at a fixed place, and
holds one JSON document about the block. ``docs/format.md`` specifies every byte.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Self, TypedDict

import xxhash

from ghostcacher.codecs.spoken import spoken
from ghostcacher.errors import BlockError
from ghostcacher.keys import SEAL_MAGIC, BlockKey, pack_tokens, unpack_tokens

FORMAT_VERSION = 1
HEADER_LIMIT_BYTES = 2**20
ALIGNMENT_BYTES = 64
LENGTH_BYTES = 8
DIGEST_CHARS = 32
DIGEST_OPENING = b'{"__metadata__":{"digest":"'
_DIGEST_AT = LENGTH_BYTES + len(DIGEST_OPENING)
_DATA_AT_LEAST = _DIGEST_AT + DIGEST_CHARS
_BLANK_DIGEST = b"0" * DIGEST_CHARS
_HEX_DIGEST_CHARS = 64

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}

VARIABLE = -1
"""Stands for a size that follows from the values in a codec's `TensorField`; never in a header."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class TensorField:
    """One tensor of a stored block: safetensors name, dtype (``"F32"``) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a block may cost and what it did, in nats a token.

    ``budget`` is what was allowed, ``predicted`` what the model's curve said (None: there is none), ``replayed`` the
    KL of the prompt's last tokens on the coded prefix.
    """

    budget: float
    predicted: float | None
    replayed: float

    @classmethod
    def parse(cls, document: Any) -> Self | None:
        """What a header says; ValueError for what is no certificate."""
        if document is None:
            return None
        names = ("budget", "predicted", "replayed")
        budget, predicted, replayed = (document[name] for name in names)
        numbers = [budget, replayed] if predicted is None else [budget, replayed, predicted]
        is_sound = all(isinstance(n, float) and math.isfinite(n) and n >= 0 for n in numbers)
        if len(document) != len(names) or not is_sound:
            raise ValueError("no certificate")
        return cls(budget, predicted, replayed)


class Coding(TypedDict):
    """How a block was coded, for an index: the codec as `spoken`, and the KL that was replayed if it was certified."""

    lossy: bool
    codec: str
    kl: float | None


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """Everything a stored block says of itself. Equal headers render to equal bytes."""

    key: BlockKey
    layout_digest: str
    codec: dict[str, Any]
    lossy: bool
    model: str
    fields: tuple[TensorField, ...]
    certificate: Certificate | None = None

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(field.size_bytes for field in self.fields)

    @property
    def coding(self) -> Coding:
        """What an index notes of it."""
        kl = self.certificate.replayed if self.certificate else None
        return Coding(lossy=self.lossy, codec=spoken(self.codec), kl=kl)

    def render(self) -> bytes:
        """Length prefix and JSON, padded to 64 bytes, with zeros where the digest goes."""
        metadata = {"digest": _BLANK_DIGEST.decode(), "ghostcacher": _dump(self._document())}
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for field in self.fields:
            end = offset + field.size_bytes
            header[field.name] = {"dtype": field.dtype, "shape": list(field.shape), "data_offsets": [offset, end]}
            offset = end
        text = _dump(header).encode()
        text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT_BYTES)
        return struct.pack("<Q", len(text)) + text

    def _document(self) -> dict[str, Any]:
        kind = {"kind": "snapshot"} if self.key.is_snapshot else {}
        certified = {"certificate": asdict(self.certificate)} if self.certificate else {}
        return {
            "format": FORMAT_VERSION,
            **kind,
            "namespace": self.key.namespace.hex(),
            "key": self.key.digest.hex(),
            "parent": self.key.parent.hex(),
            "start": self.key.start,
            "tokens": unpack_tokens(self.key.tokens),
            "layout": self.layout_digest,
            "codec": self.codec,
            "lossy": self.lossy,
            "model": self.model,
            **certified,
        }

    @classmethod
    def parse(cls, blob: Buffer) -> Self:
        """Read the header at the front of ``blob`` (the tensors need not be there).

        Checks structure and that the key is the key of the tokens; does not check the digest.

        Raises:
            BlockError: ``header`` (malformed, or longer than 1 MiB), ``version`` (another format), ``key_echo``
                (the recorded key is not the key of the recorded tokens).
        """
        text = bytes(memoryview(blob)[LENGTH_BYTES : header_bytes(blob)])
        try:
            header = json.loads(text)
            document = json.loads(header.pop("__metadata__")["ghostcacher"])
            _check_version(document["format"])
            key = BlockKey(
                _digest(document["key"]), _digest(document["parent"]), _digest(document["namespace"]),
                int(document["start"]), pack_tokens(document["tokens"]), document.get("kind") == "snapshot",
            )  # fmt: skip
            fields = tuple(_field(name, found) for name, found in header.items())
            parsed = cls(key, str(document["layout"]), dict(document["codec"]), bool(document["lossy"]),
                         str(document["model"]), fields, Certificate.parse(document.get("certificate")))  # fmt: skip
        except BlockError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise BlockError("header", f"not a block's header ({type(error).__name__})") from error
        if not key.is_genuine():
            raise BlockError("key_echo", "the recorded key is not the key of the recorded tokens")
        return parsed

    def expecting(self, key: BlockKey, layout_digest: str, fields: Sequence[TensorField]) -> BlockHeader:
        """This header with everything that the reader knows better put in its place."""
        return replace(self, key=key, layout_digest=layout_digest, fields=tuple(fields))


def _field(name: str, found: Mapping[str, Any]) -> TensorField:
    dtype, shape = found["dtype"], tuple(map(int, found["shape"]))
    if dtype not in ITEM_BYTES or any(size < 0 for size in shape):
        raise ValueError("no tensor")
    return TensorField(name, dtype, shape)


def header_bytes(blob: Buffer) -> int:
    """Length of prefix and JSON, as the blob's first 8 bytes say.

    Raises:
        BlockError: ``header``: shorter than a header, above 1 MiB, or not beginning as a block does; ``sealed``: it
            can be read with a key only.
    """
    if bytes(blob[: len(SEAL_MAGIC)]) == SEAL_MAGIC:
        raise BlockError("sealed", "a sealed block, and this store has no key")
    if len(blob) < _DATA_AT_LEAST:
        raise BlockError("header", f"{len(blob)} bytes are too few for a header")
    (text_bytes,) = struct.unpack_from("<Q", blob)
    if text_bytes > HEADER_LIMIT_BYTES or LENGTH_BYTES + text_bytes > len(blob):
        raise BlockError("header", f"the header's length reads {text_bytes} of {len(blob)} bytes")
    if bytes(blob[LENGTH_BYTES:_DIGEST_AT]) != DIGEST_OPENING:
        raise BlockError("header", "the metadata does not begin with a digest")
    return LENGTH_BYTES + int(text_bytes)


def sealed(header: bytes, parts: Iterable[Buffer]) -> bytes:
    """``header`` (as rendered) with the digest over header and ``parts`` put in."""
    digest = payload_digest(header, parts).encode()
    return header[:_DIGEST_AT] + digest + header[_DATA_AT_LEAST:]


def payload_digest(header: Buffer, parts: Iterable[Buffer]) -> str:
    """XXH3-128 over the header with its digest zeroed, then the tensors; 32 hexadecimal digits.

    It finds accidents, not forgeries: whoever can write the store can compute it.
    """
    state = xxhash.xxh3_128()
    state.update(bytes(header[:_DIGEST_AT]) + _BLANK_DIGEST + bytes(header[_DATA_AT_LEAST:]))
    for part in parts:
        state.update(part)
    return state.hexdigest()


def blanked(header: Buffer) -> bytes:
    """``header`` with zeros in place of the digest, as `BlockHeader.render` gives it."""
    return bytes(header[:_DIGEST_AT]) + _BLANK_DIGEST + bytes(header[_DATA_AT_LEAST:])


def check_digest(blob: Buffer) -> None:
    """Compare the recorded digest with the bytes.

    Raises:
        BlockError: ``header`` (no header) or ``corrupt`` (the bytes differ from what was written).
    """
    end = header_bytes(blob)
    view = memoryview(blob)
    if payload_digest(view[:end], [view[end:]]) != bytes(view[_DIGEST_AT:_DATA_AT_LEAST]).decode("ascii", "replace"):
        raise BlockError("corrupt", "the digest does not match the bytes")


def recorded_digest(blob: Buffer) -> str:
    """The digest that ``blob`` says it has.

    Raises:
        BlockError: ``header`` or ``sealed``, as `header_bytes`.
    """
    header_bytes(blob)
    return bytes(blob[_DIGEST_AT:_DATA_AT_LEAST]).decode("ascii", "replace")


def _check_version(version: object) -> None:
    if version != FORMAT_VERSION:
        raise BlockError("version", f"format {version!r}, this reader knows {FORMAT_VERSION}")


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest(text: str) -> bytes:
    if len(text) != _HEX_DIGEST_CHARS:
        raise ValueError(f"{len(text)} digits in a digest")
    return bytes.fromhex(text)
