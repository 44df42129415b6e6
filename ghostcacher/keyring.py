"""Secrets that seal a store: given as bytes, in files, or by the environment."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ghostcacher.errors import ConfigurationError

SECRET_BYTES = 32
KEY_VARIABLE = "GHOSTCACHER_KEY"
KEY_FILE_VARIABLE = "GHOSTCACHER_KEY_FILE"

_LOOKS_SECRET = re.compile(r"[0-9a-fA-F]{32,}")

Secret = bytes | str | os.PathLike[str]
"""Bytes are the secret itself; a text or path names the file that holds it."""


def read_keyring(
    given: Secret | Sequence[Secret] | None, environment: Mapping[str, str] = os.environ
) -> tuple[bytes, ...]:
    """The secrets of ``given``; of the environment if None; empty if there are none.

    ``$GHOSTCACHER_KEY_FILE`` names files, ``$GHOSTCACHER_KEY`` holds hexadecimal digits; several are separated by
    ``:``. The first of several seals, all open.

    Raises:
        ConfigurationError: a file cannot be read, or holds too little; the text of no secret is repeated.
    """
    if given is None:
        return tuple(_of_environment(environment))
    several = [given] if isinstance(given, bytes | str | os.PathLike) else list(given)
    if not several:
        raise ConfigurationError("key=() has no secret; give one, or None for a store that is not sealed")
    return tuple(_checked(each, "key=") if isinstance(each, bytes) else read_key(each) for each in several)


def read_key(path: str | os.PathLike[str]) -> bytes:
    """The secret in the file at ``path``: 64 hexadecimal digits or more, or 32 bytes or more as they are.

    Raises:
        ConfigurationError: the file cannot be read, or holds too little.
    """
    if _LOOKS_SECRET.fullmatch(os.fspath(path)):
        raise ConfigurationError("key= takes bytes, or the path of a file; this text looks like a secret itself")
    try:
        content = Path(path).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no path"
        raise ConfigurationError(
            f"cannot read the key file {os.fspath(path)!r}: {why}; `ghostcacher new-key FILE` makes one"
        ) from None
    return _checked(_decoded(content), f"the key file {os.fspath(path)}")


def write_key(path: str | os.PathLike[str]) -> None:
    """Write a new random secret to ``path``, which only its user may read.

    Raises:
        ConfigurationError: the file stands already, or cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigurationError(f"cannot make the key file {os.fspath(path)}: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(SECRET_BYTES) + "\n")


def _of_environment(environment: Mapping[str, str]) -> Iterator[bytes]:
    files, digits = environment.get(KEY_FILE_VARIABLE), environment.get(KEY_VARIABLE)
    if files and digits:
        raise ConfigurationError(f"{KEY_FILE_VARIABLE} and {KEY_VARIABLE} are both set; leave one")
    for path in (files or "").split(os.pathsep):
        if path:
            yield read_key(path)
    for text in (digits or "").split(":"):
        if text:
            try:
                secret = bytes.fromhex(text)
            except ValueError:
                raise ConfigurationError(f"${KEY_VARIABLE} is not made of hexadecimal digits") from None
            yield _checked(secret, f"${KEY_VARIABLE}")


def _decoded(content: bytes) -> bytes:
    try:
        return bytes.fromhex(content.decode("ascii").strip())
    except ValueError:
        return content


def _checked(secret: bytes, where: str) -> bytes:
    if len(secret) < SECRET_BYTES:
        raise ConfigurationError(
            f"{where} holds a secret of {len(secret)} bytes; give {SECRET_BYTES} or more: `ghostcacher new-key FILE`"
        )
    return secret
