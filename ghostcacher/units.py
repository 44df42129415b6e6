"""Bytes and durations, parsed and printed."""

from __future__ import annotations

import re

from ghostcacher.errors import ConfigurationError

_BYTES = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_bytes(value: int | str) -> int:
    """Bytes of ``"20GiB"``, ``"1.5 GB"``, ``"512M"`` (binary) or a plain number.

    Raises:
        ConfigurationError: not a size, or negative.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size_bytes = value
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if found is None or found[2].upper() not in _BYTES:
            raise ConfigurationError(f"{value!r} is not a size: write a number with a unit, such as '20GiB' or '512MB'")
        size_bytes = int(float(found[1]) * _BYTES[found[2].upper()])
    if size_bytes < 0:
        raise ConfigurationError(f"a size cannot be negative: {value!r}; 0 bytes is the least")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """``1536`` as ``"1.5 KiB"``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:  # noqa: PLR2004 (the step of the binary prefixes)
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_duration(value: str) -> float:
    """Seconds of ``"90s"``, ``"15m"``, ``"12h"``, ``"7d"`` or ``"2w"``.

    Raises:
        ConfigurationError: not a duration.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", value)
    if found is None:
        raise ConfigurationError(f"{value!r} is not a duration: write a number with s, m, h, d or w, such as '7d'")
    return float(found[1]) * _SECONDS[found[2]]


def format_seconds(seconds: float) -> str:
    """``0.0213`` as ``"21 ms"``, ``3.2`` as ``"3.20 s"``, ``7200`` as ``"2.0 h"``."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms" if seconds >= 0.001 else f"{seconds * 1e3:.2f} ms"  # noqa: PLR2004 (a millisecond)
    for limit, step, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / step:.2f} {unit}" if unit == "s" else f"{seconds / step:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"
