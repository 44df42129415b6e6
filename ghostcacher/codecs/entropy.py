"""Symbols to bytes and back: stock zstd, kept from looking for matches.

At its ordinary levels zstd finds repetitions in quantized symbols that cost more than they save. With a hash of 64
entries it does little but Huffman coding, and comes within 0.06 bit a value of the symbols' entropy.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from ghostcacher.errors import BlockError, MissingExtraError

_LARGEST_WINDOW_LOG = 27


def require() -> None:
    """Make sure that zstd is there.

    Raises:
        MissingExtraError: neither Python's own zstd nor the package for it is there.
    """
    _zstd()


def compress(symbols: bytes | memoryview) -> bytes:
    """An ordinary zstd frame.

    Raises:
        MissingExtraError: neither Python's own zstd nor the package for it is there.
    """
    zstd = _zstd()
    parameter = zstd.CompressionParameter
    options = {
        parameter.compression_level: 1, parameter.strategy: zstd.Strategy.fast, parameter.hash_log: 6,
        parameter.min_match: 7,
    }  # fmt: skip
    frame: bytes = zstd.compress(symbols, options=options)
    return frame


def decompress(frame: bytes | memoryview, size_bytes: int) -> bytes:
    """The symbols of a frame, which must be ``size_bytes``; never more memory than that, whatever the frame claims.

    Raises:
        BlockError: ``frame``: not one whole frame of that size.
        MissingExtraError: as for `compress`.
    """
    zstd = _zstd()
    reader = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _LARGEST_WINDOW_LOG})
    try:
        symbols: bytes = reader.decompress(frame, max_length=size_bytes + 1)
    except zstd.ZstdError as error:
        raise BlockError("frame", f"not a zstd frame ({error})") from error
    if len(symbols) != size_bytes or not reader.eof or reader.unused_data:
        raise BlockError("frame", f"a frame of {len(symbols)} bytes or more where {size_bytes} were coded")
    return symbols


@cache
def _zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingExtraError("backports-zstd", "zstd", "this codec")
