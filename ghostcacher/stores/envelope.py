"""Values sealed with a key: nobody without it reads, forges or even names them. Needs ``ghostcacher[seal]``.

    magic 8 | key id 16 | salt 32 | head size 4 | label 64 + 16 | head + 16 | body + 16

Label, head and body are each AES-256-GCM with a tag of 16 bytes, so that either can be read without what follows. The
label is the value's true key (namespace and block); its name in the store is an HMAC of it. ``docs/format.md``
specifies every byte. Every value has keys of its own, drawn from the secret and 32 random bytes (the salt), so no
nonce is ever used twice with one key (NIST SP 800-38D, 8.3).
"""

from __future__ import annotations

import functools
import hmac
import importlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from ghostcacher.errors import MissingExtraError, StoreForgedError, StoreRefusedError
from ghostcacher.keys import SEAL_MAGIC
from ghostcacher.stores.base import Buffer, checked_key

MAGIC = SEAL_MAGIC
KEY_ID_BYTES = 16
SALT_BYTES = 32
TAG_BYTES = 16
DIGEST_BYTES = 32
LABEL_BYTES = 2 * DIGEST_BYTES
PREFIX_BYTES = len(MAGIC) + KEY_ID_BYTES + SALT_BYTES + 4
HEAD_AT = PREFIX_BYTES + LABEL_BYTES + TAG_BYTES
OVERHEAD_BYTES = HEAD_AT + 2 * TAG_BYTES
BODY_LIMIT_BYTES = 2**31 - 2**16
_SALT_AT = len(MAGIC) + KEY_ID_BYTES
_HEAD_NONCE, _BODY_NONCE = bytes(12), bytes(11) + b"\1"


@dataclass(frozen=True, slots=True)
class Sealing:
    """What follows from one secret: an id that may be seen, and keys for names and contents that may not."""

    key_id: bytes
    naming: bytes
    content: bytes

    def __repr__(self) -> str:
        return f"Sealing({self.key_id.hex()[:8]})"

    @classmethod
    def of(cls, secret: bytes) -> Self:
        """Keys drawn from ``secret`` by HMAC, each for one purpose.

        Raises:
            MissingExtraError: the package cryptography is not installed.
        """
        _ciphers()
        drawn = [hmac.digest(secret, b"ghostcacher/" + purpose, "sha256") for purpose in (b"id", b"names", b"content")]
        return cls(drawn[0][:KEY_ID_BYTES], drawn[1], drawn[2])

    def name(self, key: str) -> str:
        """The store key under which ``key`` lies: two digests that say nothing to who lacks the secret."""
        namespace, digest = checked_key(key).split("/")
        hidden = hmac.digest(self.naming, b"value\0" + bytes.fromhex(namespace + digest), "sha256")
        return f"{self.namespace(namespace)}/{hidden.hex()}"

    def namespace(self, namespace: str) -> str:
        """The namespace, in hexadecimal, under which those of ``namespace`` lie."""
        return hmac.digest(self.naming, b"namespace\0" + bytes.fromhex(namespace), "sha256").hex()

    def seal(self, key: str, head: Buffer, body: Buffer) -> Sequence[Buffer]:
        """The envelope of a value as buffers that follow one another.

        Raises:
            StoreRefusedError: the body is larger than AES-GCM takes at once, 2 GiB.
        """
        if len(body) > BODY_LIMIT_BYTES:
            raise StoreRefusedError("a block above 2 GiB cannot be sealed: open the store with smaller block_tokens")
        prefix = MAGIC + self.key_id + os.urandom(SALT_BYTES) + struct.pack("<I", len(head))
        label = bytes.fromhex(key.replace("/", ""))
        cipher, bound = self._cipher(prefix, label), prefix + label
        sealed_label = self._cipher(prefix).encrypt(_HEAD_NONCE, label, prefix)
        sealed_body = bytearray(len(body) + TAG_BYTES)
        cipher.encrypt_into(_BODY_NONCE, body, bound, sealed_body)
        return [prefix, sealed_label, cipher.encrypt(_HEAD_NONCE, bytes(head), bound), sealed_body]

    def label(self, envelope: Buffer) -> str:
        """The key of the value in ``envelope``, of which at least 140 bytes are there.

        Raises:
            StoreForgedError: it was not sealed with this secret, or was changed.
        """
        prefix, sealed = bytes(envelope[:PREFIX_BYTES]), bytes(envelope[PREFIX_BYTES:HEAD_AT])
        digits = _opened(self._cipher(self._checked(prefix)), _HEAD_NONCE, sealed, prefix).hex()
        return f"{digits[: 2 * DIGEST_BYTES]}/{digits[2 * DIGEST_BYTES :]}"

    def head(self, key: str, envelope: Buffer) -> bytes:
        """The head of the value of ``key``; ``envelope`` reaches at least to its end. Raises as `label`."""
        prefix, end = self._checked(bytes(envelope[:PREFIX_BYTES])), body_at(envelope)
        label = bytes.fromhex(key.replace("/", ""))
        cipher = self._cipher(prefix, label)
        return _opened(cipher, _HEAD_NONCE, bytes(envelope[HEAD_AT:end]), prefix + label)

    def value(self, key: str, envelope: Buffer) -> bytearray:
        """The whole value of ``key``: head and body. Raises as `label`."""
        head = self.head(key, envelope)
        prefix, label = bytes(envelope[:PREFIX_BYTES]), bytes.fromhex(key.replace("/", ""))
        body = memoryview(envelope)[body_at(envelope) :]
        if len(body) < TAG_BYTES:
            raise StoreForgedError("a sealed value ends early")
        made = bytearray(len(head) + len(body) - TAG_BYTES)
        made[: len(head)] = head
        cipher = self._cipher(prefix, label)
        try:
            cipher.decrypt_into(_BODY_NONCE, body, prefix + label, memoryview(made)[len(head) :])
        except Exception as error:
            raise StoreForgedError("a sealed value does not open") from error
        return made

    def owns(self, envelope: Buffer) -> bool:
        """Whether ``envelope`` says that this secret sealed it."""
        return bytes(envelope[:_SALT_AT]) == MAGIC + self.key_id

    def _checked(self, prefix: bytes) -> bytes:
        if len(prefix) < PREFIX_BYTES or not self.owns(prefix):
            raise StoreForgedError("not sealed with this key")
        return prefix

    def _cipher(self, prefix: bytes, label: bytes = b"") -> Any:
        purpose = b"value\0" if label else b"label\0"
        key = hmac.digest(self.content, purpose + prefix[_SALT_AT : _SALT_AT + SALT_BYTES] + label, "sha256")
        return _ciphers().AESGCM(key)


def is_sealed(value: Buffer) -> bool:
    """Whether ``value`` begins as an envelope does, whoever sealed it."""
    return bytes(value[: len(MAGIC)]) == MAGIC


def body_at(envelope: Buffer) -> int:
    """Where the body of ``envelope`` begins, as its first 60 bytes say; larger than any envelope if they lie."""
    return HEAD_AT + int(struct.unpack_from("<I", envelope, PREFIX_BYTES - 4)[0]) + TAG_BYTES


def _opened(cipher: Any, nonce: bytes, sealed: bytes, bound: bytes) -> bytes:
    try:
        opened: bytes = cipher.decrypt(nonce, sealed, bound)
    except Exception as error:
        raise StoreForgedError("a sealed value does not open") from error
    return opened


@functools.cache
def _ciphers() -> Any:
    try:
        return importlib.import_module("cryptography.hazmat.primitives.ciphers.aead")
    except ImportError as error:
        raise MissingExtraError("cryptography", "seal", "key=") from error
