"""Settings of a store, parsed once, here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ghostcacher.errors import ConfigurationError
from ghostcacher.keyring import Secret, read_keyring
from ghostcacher.units import parse_bytes

DEFAULT_BLOCK_TOKENS = 128
BLOCK_TOKENS_RANGE = (16, 4096)
AUTO_MEMORY_SHARE = 0.10
AUTO_MEMORY_LIMIT_BYTES = 4 * 2**30
REMOTE_TIMEOUT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 600.0
Role = Literal["writer", "reader"]
Admission = Literal["always", "second-sight"]


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What `ghostcacher.open_store` was asked for, in bytes, paths and seconds. Its repr shows no secret."""

    directory: Path
    device_bytes: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    remote: str | None = field(default=None, repr=False)
    memory_codec: str = "raw"
    disk_codec: str = "raw"
    remote_codec: str = "raw"
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    salt: str | None = field(default=None, repr=False)
    strict: bool = False
    role: Role = "writer"
    admit: Admission = "always"
    quota_bytes: int | None = None
    remote_timeout_seconds: float = REMOTE_TIMEOUT_SECONDS
    single_flight_seconds: float | None = None
    audit_share: float = 0.0
    secrets: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def parse(
        cls,
        *,
        directory: str | os.PathLike[str] | None,
        device: int | str | None,
        memory: int | str | None,
        disk: int | str | None,
        remote: str | None,
        codec: str,
        remote_codec: str | None = None,
        quality: float | None = None,
        block_tokens: int,
        salt: str | None,
        strict: bool,
        role: str = "writer",
        admit: str = "always",
        namespace_quota: int | str | None = None,
        key: Secret | Sequence[Secret] | None = None,
        single_flight: float | None = None,
        audit: float = 0.0,
        environment: Mapping[str, str] = os.environ,
    ) -> Self:
        """Turn the arguments of ``open_store`` and the environment into numbers and paths.

        Reads ``GHOSTCACHER_HOME``, ``HF_HOME``, ``XDG_CACHE_HOME``, ``GHOSTCACHER_REMOTE_TIMEOUT_SECONDS``,
        ``GHOSTCACHER_KEY`` and ``GHOSTCACHER_KEY_FILE``.

        Raises:
            ConfigurationError: a size, block size, timeout or secret is malformed or out of its range.
        """
        if quality is not None:
            if codec != "raw":
                raise ConfigurationError(f"codec={codec!r} and quality={quality!r}: give one of the two")
            codec = f"quality({quality!r})"
        memory_size, memory_codec = _with_codec(memory, "raw")
        disk_size, disk_codec = _with_codec(disk, codec)
        return cls(
            directory=Path(directory).expanduser() if directory is not None else default_directory(environment),
            device_bytes=None if device is None else parse_bytes(device),
            memory_bytes=_memory_bytes(memory_size),
            disk_bytes=None if disk_size is None else parse_bytes(disk_size),
            remote=remote,
            memory_codec=memory_codec,
            disk_codec=disk_codec,
            remote_codec=remote_codec if remote_codec is not None else codec,
            block_tokens=_checked_block_tokens(block_tokens),
            salt=salt,
            strict=strict,
            role=_one_of("role", role, get_args(Role)),
            admit=_one_of("admit", admit, get_args(Admission)),
            quota_bytes=None if namespace_quota is None else parse_bytes(namespace_quota),
            remote_timeout_seconds=_timeout_seconds(environment),
            single_flight_seconds=_checked_wait(single_flight),
            audit_share=_checked_share(audit),
            secrets=read_keyring(key, environment),
        )


def default_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """``$GHOSTCACHER_HOME``, or ``ghostcacher`` under ``$HF_HOME`` (``~/.cache/huggingface``)."""
    if home := environment.get("GHOSTCACHER_HOME"):
        return Path(home).expanduser()
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    hub = environment.get("HF_HOME") or f"{cache}/huggingface"
    return Path(hub).expanduser() / "ghostcacher"


def is_disabled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether ``GHOSTCACHER_DISABLE`` asks for every prompt to run cold."""
    return environment.get("GHOSTCACHER_DISABLE", "").lower() in {"1", "true", "yes", "on"}


def physical_memory_bytes() -> int:
    """RAM of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _one_of(name: str, given: str, choices: tuple[Any, ...]) -> Any:
    if given not in choices:
        raise ConfigurationError(f"{name}={given!r}: choose one of {', '.join(map(repr, choices))}")
    return given


def _with_codec(size: int | str | None, codec: str) -> tuple[int | str | None, str]:
    """``"8GiB:int8"`` as size and codec; the codec is ``codec`` where the text names none."""
    if not isinstance(size, str) or ":" not in size:
        return size, codec
    text, _, named = size.partition(":")
    return text.strip(), named.strip()


def _memory_bytes(memory: int | str | None) -> int | None:
    if memory is None:
        return None
    if memory == "auto":
        return min(AUTO_MEMORY_LIMIT_BYTES, int(physical_memory_bytes() * AUTO_MEMORY_SHARE))
    return parse_bytes(memory)


def _checked_share(audit: float) -> float:
    if isinstance(audit, bool) or not isinstance(audit, int | float) or not 0 <= audit <= 1:
        raise ConfigurationError(f"audit={audit!r}: a share of the prompts, from 0 to 1; 0.01 is one in a hundred")
    return float(audit)


def _checked_block_tokens(block_tokens: int) -> int:
    least, most = BLOCK_TOKENS_RANGE
    if isinstance(block_tokens, bool) or not isinstance(block_tokens, int) or not least <= block_tokens <= most:
        raise ConfigurationError(
            f"block_tokens={block_tokens!r}: a whole number from {least} to {most}; 128 is the default"
        )
    return block_tokens


def _checked_wait(seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds <= LONGEST_WAIT_SECONDS:
        raise ConfigurationError(
            f"single_flight={seconds!r}: from 0 to {LONGEST_WAIT_SECONDS:g} s, about what a prompt takes to compute"
        )
    return seconds


def _timeout_seconds(environment: Mapping[str, str]) -> float:
    text = environment.get("GHOSTCACHER_REMOTE_TIMEOUT_SECONDS")
    if text is None:
        return REMOTE_TIMEOUT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigurationError(f"GHOSTCACHER_REMOTE_TIMEOUT_SECONDS={text!r}: a number of seconds above 0, such as 5")
    return seconds
