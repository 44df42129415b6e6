"""How codecs are spoken of: a name, and for some a number, such as ``ec(0.25)``. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAME_CHARS = 64
_LARGEST_NUMBER = 2**53
_SPOKEN = re.compile(r"(?P<name>[a-z0-9_.]+)(?:\((?P<number>[0-9.eE+-]+)\))?")


def spoken(record: Mapping[str, Any]) -> str:
    """What ``open_store(codec=…)`` takes for the codec that a header records: ``"ec(0.25)"``."""
    name, number = str(record.get("name", "?"))[:_NAME_CHARS], record.get("c", record.get("kl"))
    is_number = isinstance(number, int | float) and abs(number) < _LARGEST_NUMBER
    return f"{name}({number:g})" if is_number else name


def heard(text: str) -> tuple[str, str] | None:
    """Name and number of a `spoken` codec, which may have none; None for what names no codec."""
    found = _SPOKEN.fullmatch(text)
    return (found["name"], found["number"] or "") if found else None
