r"""Identity: what may be reused by whom, as digests. Knows neither tensors nor stores.

A *namespace* digests everything that changes KV state. A *block* is a run of tokens at a fixed position of one
namespace; its key chains over all tokens before it, so equal keys mean equal prefixes:

    key = SHA-256("ghostcacher/block/1\0" | parent key | token count as uint32 LE | token ids as int32 LE)

The parent of the first block is the namespace digest. All 256 bits are kept.

A *snapshot* is state that is valid after exactly one prefix and has no token axis (recurrent, convolutional,
compressed layers). Its key is that of a block of the same tokens, in a domain of its own
("ghostcacher/snapshot/1\0"): it stands beside the blocks and is looked up, stored and evicted on its own.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from ghostcacher.errors import ConfigurationError

BLOCK_DOMAIN = b"ghostcacher/block/1\0"
SNAPSHOT_DOMAIN = b"ghostcacher/snapshot/1\0"
NAMESPACE_DOMAIN = b"ghostcacher/namespace/1\0"
TABLES_DOMAIN = b"ghostcacher/tables/1\0"
SEAL_MAGIC = b"GHOSTKV\x01"
"""How values begin that are sealed with a key, whoever's."""
FLIGHTS_DOMAIN = b"ghostcacher/flights/1\0"
TOKEN_BYTES = 4
_TOKEN_ID_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that changes KV state, digested. Two namespaces never share a block."""

    digest: bytes

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> Self:
        """Digest ``fields`` as canonical JSON (sorted keys, no spaces, UTF-8).

        Raises:
            ConfigurationError: a field is not JSON.
        """
        try:
            text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=True)
        except TypeError as error:
            raise ConfigurationError(f"a namespace is a digest over JSON values: {error}") from error
        return cls(hashlib.sha256(NAMESPACE_DOMAIN + text.encode()).digest())

    @property
    def hex(self) -> str:
        """64 lower-case hexadecimal digits, as used in paths."""
        return self.digest.hex()


TABLES = Namespace(hashlib.sha256(TABLES_DOMAIN).digest())
"""Where a store keeps what codecs have learned of models. It holds no blocks."""


FLIGHTS = Namespace(hashlib.sha256(FLIGHTS_DOMAIN).digest())
"""Where a store keeps who is computing what. It holds no blocks."""


def holds_no_block(store_key: str) -> bool:
    """Whether a store key is in a namespace of the library's own."""
    return store_key.startswith((TABLES.hex, FLIGHTS.hex))


@dataclass(frozen=True, slots=True)
class BlockKey:
    """Identity of one block: ``tokens`` (int32 LE) at position ``start`` after ``parent``, in ``namespace``.

    With ``is_snapshot``, of the state after these tokens that has no token axis.
    """

    digest: bytes
    parent: bytes = field(repr=False)
    namespace: bytes = field(repr=False)
    start: int
    tokens: bytes = field(repr=False)
    is_snapshot: bool = False

    @property
    def length(self) -> int:
        """Tokens in this block."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def end(self) -> int:
        """Position one past the last token."""
        return self.start + self.length

    @property
    def store_key(self) -> str:
        """``<namespace hex>/<key hex>``: the name under which stores keep the block."""
        return f"{self.namespace.hex()}/{self.digest.hex()}"

    def is_genuine(self) -> bool:
        """Whether ``digest`` really is the key of these tokens after this parent."""
        return chain_digest(self.parent, self.tokens, is_snapshot=self.is_snapshot) == self.digest


def chain_digest(parent: bytes, tokens: bytes, *, is_snapshot: bool = False) -> bytes:
    """The 32-byte key of ``tokens`` (int32 LE) after ``parent``; see the module's formula."""
    domain = SNAPSHOT_DOMAIN if is_snapshot else BLOCK_DOMAIN
    return hashlib.sha256(domain + parent + struct.pack("<I", len(tokens) // TOKEN_BYTES) + tokens).digest()


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as int32 little-endian.

    Raises:
        ConfigurationError: an id is negative or above 2^31 - 1.
    """
    try:
        packed = array("i", token_ids)
    except OverflowError as error:
        raise ConfigurationError(f"token ids are 0 to {_TOKEN_ID_LIMIT - 1}: {error}") from error
    if len(packed) and min(packed) < 0:
        raise ConfigurationError(f"token ids are 0 to {_TOKEN_ID_LIMIT - 1}, not {min(packed)}")
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(tokens: bytes) -> list[int]:
    """The inverse of `pack_tokens`."""
    return list(struct.unpack(f"<{len(tokens) // TOKEN_BYTES}i", tokens))


def common_tokens(left: bytes, right: bytes) -> int:
    """How many leading tokens two packed runs share."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size // TOKEN_BYTES
    low, high = 0, size // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if left[: middle * TOKEN_BYTES] == right[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixChain:
    """A prompt's token ids as a chain of block keys. Keys are computed once, when first asked for."""

    def __init__(self, namespace: Namespace, tokens: bytes, block_tokens: int, keys: tuple[BlockKey, ...] = ()) -> None:
        self.namespace = namespace
        self.tokens = tokens
        self.block_tokens = block_tokens
        self._keys = list(keys)

    @classmethod
    def of(cls, token_ids: Sequence[int], namespace: Namespace, block_tokens: int) -> Self:
        """The chain of ``token_ids``; see `pack_tokens` for what it refuses."""
        return cls(namespace, pack_tokens(token_ids), block_tokens)

    def __len__(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    @property
    def reusable_tokens(self) -> int:
        """Tokens that may come from a store: all but one, because the model must see at least one."""
        return max(0, len(self) - 1)

    @property
    def whole_blocks(self) -> int:
        """Number of complete blocks in the prompt."""
        return len(self) // self.block_tokens

    def parent_of(self, index: int) -> bytes:
        """The digest that block ``index`` chains from."""
        return self.namespace.digest if index == 0 else self.block(index - 1).digest

    def block(self, index: int) -> BlockKey:
        """Key of whole block ``index``.

        Raises:
            IndexError: the prompt has no such whole block.
        """
        if index >= self.whole_blocks:
            raise IndexError(f"block {index} of a prompt with {self.whole_blocks} whole blocks")
        while len(self._keys) <= index:
            number = len(self._keys)
            self._keys.append(self._key(number, (number + 1) * self.block_tokens))
        return self._keys[index]

    def tail(self, end: int) -> BlockKey:
        """Key of the block that starts at the last whole-block boundary before ``end`` and stops at ``end``."""
        index = (end - 1) // self.block_tokens
        return self.block(index) if end == (index + 1) * self.block_tokens else self._key(index, end)

    def snapshot(self, end: int) -> BlockKey:
        """Key of the snapshot after exactly the first ``end`` tokens."""
        return self._key((end - 1) // self.block_tokens, end, is_snapshot=True)

    def covering(self, start: int, end: int) -> Iterator[BlockKey]:
        """Keys of the blocks that hold tokens ``start`` to ``end``; the last may be a tail block."""
        for index in range(start // self.block_tokens, -(-end // self.block_tokens)):
            yield self.tail(min((index + 1) * self.block_tokens, end))

    def run(self, start: int, end: int) -> bytes:
        """Token ids ``start`` to ``end``, packed."""
        return self.tokens[start * TOKEN_BYTES : end * TOKEN_BYTES]

    def cut(self, tokens: int) -> PrefixChain:
        """The chain of the first ``tokens`` tokens."""
        keys = tuple(self.block(index) for index in range(tokens // self.block_tokens))
        return PrefixChain(self.namespace, self.run(0, tokens), self.block_tokens, keys)

    def extended(self, token_ids: Sequence[int]) -> PrefixChain:
        """A chain that goes on with ``token_ids``; whole-block keys known here are not computed again."""
        tokens = self.tokens + pack_tokens(token_ids)
        return PrefixChain(self.namespace, tokens, self.block_tokens, tuple(self._keys))

    def _key(self, index: int, end: int, *, is_snapshot: bool = False) -> BlockKey:
        parent = self.parent_of(index)
        start = index * self.block_tokens
        tokens = self.run(start, end)
        digest = chain_digest(parent, tokens, is_snapshot=is_snapshot)
        return BlockKey(digest, parent, self.namespace.digest, start, tokens, is_snapshot)
