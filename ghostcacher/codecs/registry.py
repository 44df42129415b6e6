"""Codecs by name: what ``open_store(codec=…)`` takes and what a block's header records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ghostcacher.codecs.base import TensorCodec
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.errors import ConfigurationError

CODECS: Mapping[str, Callable[..., TensorCodec]] = {"raw": RawCodec, "int8": Int8Codec}


def codec_named(name: str) -> TensorCodec:
    """The codec that ``name`` stands for.

    Raises:
        ConfigurationError: no codec of that name.
    """
    if name not in CODECS:
        raise ConfigurationError(f"codec={name!r} is unknown; choose one of {', '.join(sorted(CODECS))}")
    return CODECS[name]()


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
