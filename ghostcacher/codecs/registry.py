"""Codecs by name: what ``open_store(codec=…)`` takes and what a block's header records."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from ghostcacher.codecs.base import TensorCodec
from ghostcacher.codecs.bf16 import Bf16Codec
from ghostcacher.codecs.bnb import BnbFp4Codec, BnbInt8Codec, BnbNf4Codec
from ghostcacher.codecs.ec import EntropyCodec
from ghostcacher.codecs.int4 import Int4Codec
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.planes import PlaneCodec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.errors import ConfigurationError

Factory = Callable[..., TensorCodec]
Finder = Callable[[str], Factory | None]

ENTRY_POINTS = "ghostcacher.codecs"
CODECS: Mapping[str, Factory] = {
    "bf16": Bf16Codec, "ec": EntropyCodec.of, "int4": Int4Codec, "int8": Int8Codec, "raw": RawCodec,
    "raw.z": PlaneCodec, "bnb_int8": BnbInt8Codec, "bnb_nf4": BnbNf4Codec, "bnb_fp4": BnbFp4Codec,
}  # fmt: skip
_SPOKEN = re.compile(r"(?P<name>[a-z0-9_.]+)(?:\((?P<number>[0-9.eE+-]+)\))?")


def codec_named(text: str) -> TensorCodec:
    """The codec that ``text`` stands for: a name, and for some a number, such as ``"ec(0.25)"``.

    Codecs of other packages are found by their entry point in the group ``ghostcacher.codecs``.

    Raises:
        ConfigurationError: no codec of that name, or not with that number.
        MissingExtraError: it needs a package that is not installed.
    """
    spoken = _SPOKEN.fullmatch(text)
    make = factory_of(spoken["name"]) if spoken else None
    if spoken is None or make is None:
        raise ConfigurationError(f"codec={text!r} is unknown; choose one of {', '.join(sorted(CODECS))}")
    try:
        numbers = [float(spoken["number"])] if spoken["number"] else []
        return make(*numbers)
    except (TypeError, ValueError) as error:
        needs = "needs a number, such as ec(0.25)" if not spoken["number"] else "takes no such number"
        raise ConfigurationError(f"codec={text!r}: {spoken['name']} {needs}") from error


def codec_from(record: Mapping[str, Any], find: Finder | None = None) -> TensorCodec:
    """The codec that a block's header records as ``{"name": …, **parameters}``; ``find`` in place of `factory_of`.

    Raises:
        ConfigurationError: an unknown name or parameter.
        MissingExtraError: it needs a package that is not installed.
    """
    parameters = dict(record)
    name = str(parameters.pop("name", None))
    make = (find or factory_of)(name)
    if make is None:
        raise ConfigurationError(f"codec {name!r} is unknown to this version")
    try:
        return make(**parameters)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"codec {name!r} does not take these parameters") from error


@cache
def factory_of(name: str) -> Factory | None:
    """What makes a codec of this name: one of `CODECS`, or what an installed package offers; None if nobody does."""
    if name in CODECS:
        return CODECS[name]
    offered = entry_points(group=ENTRY_POINTS, name=name)
    found: Factory | None = next((entry.load() for entry in offered), None)
    return found


def record_of(codec: TensorCodec) -> dict[str, Any]:
    """The inverse of `codec_from`."""
    return {"name": codec.name, **codec.parameters()}
