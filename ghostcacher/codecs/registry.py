"""Codecs by name: what ``open_store(codec=…)`` takes and what a block's header records."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ghostcacher.codecs.base import TensorCodec
from ghostcacher.codecs.bf16 import Bf16Codec
from ghostcacher.codecs.ec import EntropyCodec
from ghostcacher.codecs.int4 import Int4Codec
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.planes import PlaneCodec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.errors import ConfigurationError

CODECS: Mapping[str, Callable[..., TensorCodec]] = {
    "bf16": Bf16Codec, "ec": EntropyCodec.of, "int4": Int4Codec, "int8": Int8Codec, "raw": RawCodec,
    "raw.z": PlaneCodec,
}  # fmt: skip
_SPOKEN = re.compile(r"(?P<name>[a-z0-9_.]+)(?:\((?P<number>[0-9.eE+-]+)\))?")


def codec_named(text: str) -> TensorCodec:
    """The codec that ``text`` stands for: a name, and for some a number, such as ``"ec(0.25)"``.

    Raises:
        ConfigurationError: no codec of that name, or not with that number.
        MissingExtraError: it needs a package that is not installed.
    """
    spoken = _SPOKEN.fullmatch(text)
    if spoken is None or spoken["name"] not in CODECS:
        raise ConfigurationError(f"codec={text!r} is unknown; choose one of {', '.join(sorted(CODECS))}")
    try:
        numbers = [float(spoken["number"])] if spoken["number"] else []
        return CODECS[spoken["name"]](*numbers)
    except (TypeError, ValueError) as error:
        needs = "needs a number, such as ec(0.25)" if not spoken["number"] else "takes no such number"
        raise ConfigurationError(f"codec={text!r}: {spoken['name']} {needs}") from error


def codec_from(record: Mapping[str, Any]) -> TensorCodec:
    """The codec that a block's header records as ``{"name": …, **parameters}``.

    Raises:
        ConfigurationError: an unknown name or parameter.
    """
    parameters = dict(record)
    name = parameters.pop("name", None)
    if name not in CODECS:
        raise ConfigurationError(f"codec {name!r} is unknown to this version")
    try:
        return CODECS[name](**parameters)
    except TypeError as error:
        raise ConfigurationError(f"codec {name!r} does not take these parameters") from error


def record_of(codec: TensorCodec) -> dict[str, Any]:
    """The inverse of `codec_from`."""
    return {"name": codec.name, **codec.parameters()}
