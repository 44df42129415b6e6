"""Codecs by name: what ``open_store(codec=…)`` takes and what a block's header records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ghostcacher.codecs.base import Codec, TensorCodec
from ghostcacher.codecs.bf16 import Bf16Codec
from ghostcacher.codecs.bnb import BnbFp4Codec, BnbInt8Codec, BnbNf4Codec
from ghostcacher.codecs.ec import EntropyCodec
from ghostcacher.codecs.int4 import Int4Codec
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.planes import PlaneCodec
from ghostcacher.codecs.quality import QualityCodec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.spoken import heard
from ghostcacher.errors import ConfigurationError

Factory = Callable[..., Any]
Finder = Callable[[str], Factory | None]

ENTRY_POINTS = "ghostcacher.codecs"
CODECS: Mapping[str, Factory] = {
    "bf16": Bf16Codec, "ec": EntropyCodec.of, "int4": Int4Codec, "int8": Int8Codec, "kvt": KvtCodec.of,
    "quality": QualityCodec.of, "raw": RawCodec, "raw.z": PlaneCodec.of, "bnb_int8": BnbInt8Codec.of,
    "bnb_nf4": BnbNf4Codec.of, "bnb_fp4": BnbFp4Codec.of,
}  # fmt: skip


def codec_named(text: str, find: Finder | None = None) -> Any:
    """The codec that ``text`` stands for: a name, and for some a number, such as ``"ec(0.25)"``.

    ``find`` is asked in place of `factory_of`.

    Codecs of other packages are found by their entry point in the group ``ghostcacher.codecs``.

    Raises:
        ConfigurationError: no codec of that name, or not with that number.
        MissingExtraError: it needs a package that is not installed.
    """
    name, number = heard(text) or ("", "")
    make = (find or factory_of)(name)
    if make is None:
        raise ConfigurationError(f"codec={text!r} is unknown; choose one of {', '.join(sorted(CODECS))}")
    try:
        return make(*([float(number)] if number else []))
    except (TypeError, ValueError) as error:
        needs = "needs a number, such as ec(0.25)" if not number else "takes no such number"
        raise ConfigurationError(f"codec={text!r}: {name} {needs}") from error


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
        codec: TensorCodec = make(**parameters)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigurationError(f"codec {name!r} does not take these parameters") from error
    return codec


def factory_of(name: str) -> Factory | None:
    """What makes a codec of this name: one of `CODECS`, or what an installed package offers; None if nobody does.

    Raises:
        ConfigurationError: what the package offers cannot be loaded.
    """
    if name in CODECS:
        return CODECS[name]
    entry = offered().get(name)
    try:
        found: Factory | None = entry.load() if entry else None
    except Exception as error:  # a foreign package
        raise ConfigurationError(f"codec {name!r} of another package cannot be loaded: {error}") from error
    return found


@cache
def offered() -> Mapping[str, EntryPoint]:
    """Codecs of installed packages."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def record_of(codec: Codec) -> dict[str, Any]:
    """The inverse of `codec_from`."""
    return {"name": codec.name, **codec.parameters()}
