"""A store behind any fsspec URL: ``s3://bucket/prefix``, ``memory://…``, ``file://…``, ``gs://…``.

Object stores write an object whole or not at all. A local ``file://`` is written under a partial name and moved.
Credentials come from where the fsspec implementation looks for them (environment, profile, ``~/.config/fsspec``);
they never appear in this store's name or errors.
"""

from __future__ import annotations

import calendar
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ghostcacher.errors import ConfigurationError, MissingExtraError, StoreError
from ghostcacher.stores.base import (
    WITHOUT_LINKS,
    Blob,
    Buffer,
    StoredEntry,
    checked_key,
    key_of_path,
    relative_path,
)

_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
_NEEDS_MOVE = frozenset({"file", "local"})
_CREATING = ("s3fs.", "gcsfs.", "fsspec.implementations.memory")
"""Modules of implementations that write an object only if there is none, in one step."""
_Result = TypeVar("_Result")


class FilesystemStore:
    """Objects at ``<url>/v1/<namespace>/<2 hex>/<key>.safetensors``.

    The client blocks; the tier above it keeps the deadline. Of two writers at once who do not replace, one is told that
    the other was first: on S3, Google and local files by the store itself, elsewhere (also through obstore) by looking
    before writing, which two may do at once.
    """

    name = "remote"

    def __init__(self, url: str, **options: Any) -> None:
        """Connects on first use, not here. ``options`` go to the fsspec implementation.

        Raises:
            ConfigurationError: ``url`` has no scheme that fsspec knows.
            MissingExtraError: the scheme's package is not installed.
        """
        scheme = urlsplit(url).scheme
        if not scheme:
            raise ConfigurationError(f"remote={redacted(url)!r} is not a URL; write one such as 's3://bucket/prefix'")
        self.scheme = scheme
        self._fs, self._root = _open(url, scheme, options)

    def __repr__(self) -> str:
        return f"FilesystemStore({self.scheme}://…)"

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`."""
        paths = {self._path(key): key for key in keys}
        if not paths:
            return {}
        found = self._call("read", lambda: self._heads(list(paths), limit_bytes))
        values: dict[str, Buffer | StoreError] = {}
        for key, value in zip(paths.values(), found, strict=True):
            if isinstance(value, Exception):
                if not _is_absence(value):
                    values[key] = StoreError(f"cannot read from {self.scheme}://: {type(value).__name__}")
            else:
                values[key] = value
        return values

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """See `Store.put_many`."""
        values = {self._path(key): b"".join(blob) for key, blob in items.items()}
        if not values:
            return frozenset()
        if replace and self.scheme not in _NEEDS_MOVE:
            self._call("write", lambda: self._fs.pipe(values))
            return frozenset()
        written = {key: self._put(self._path(key), values[self._path(key)], replace=replace) for key in items}
        return frozenset(key for key, is_written in written.items() if not is_written)

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`. Reads one byte of each, as that is what fsspec does concurrently."""
        found = self.get_many(keys, limit_bytes=1, timeout_seconds=timeout_seconds)
        if error := next((value for value in found.values() if isinstance(value, StoreError)), None):
            raise error
        return frozenset(found)

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`."""
        for key in keys:
            try:
                self._call("delete", lambda key=key: self._fs.rm_file(self._path(key)))  # type: ignore[misc]
            except StoreError as error:
                if not _is_absence(error.__cause__):
                    raise

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`."""
        namespace, slash, _ = prefix.partition("/")
        root = f"{self._root}/v1" + (f"/{namespace}" if slash else "")
        try:
            found = self._call("list", lambda: self._fs.find(root, detail=True))
        except StoreError as error:
            if _is_absence(error.__cause__):
                return
            raise
        for path, info in found.items():
            key = key_of_path(path)
            if key is not None and key.startswith(prefix):
                yield StoredEntry(key, int(info["size"]), _modified_seconds(info))

    def _path(self, key: str) -> str:
        return f"{self._root}/{relative_path(checked_key(key))}"

    def _heads(self, paths: list[str], limit_bytes: int) -> list[Any]:
        """The first bytes of each object or its error; one by one where an implementation raises the first error."""
        starts, ends = [0] * len(paths), [limit_bytes] * len(paths)
        try:
            return list(self._fs.cat_ranges(paths, starts, ends, on_error="return"))
        except FileNotFoundError as error:
            if len(paths) == 1:
                return [error]
            return [self._heads([path], limit_bytes)[0] for path in paths]

    def _put(self, path: str, value: bytes, *, replace: bool) -> bool:
        """Write one object; False if one stands that is not to be replaced."""
        try:
            if self.scheme in _NEEDS_MOVE:
                self._call("write", lambda: self._put_moving(path, value, replace=replace))
            elif type(self._fs).__module__.startswith(_CREATING):
                self._call("write", lambda: self._fs.pipe_file(path, value, mode="create"))
            elif self._call("look up", lambda: self._fs.exists(path)):
                return False
            else:
                self._call("write", lambda: self._fs.pipe_file(path, value))
        except StoreError as error:
            if not replace and _is_presence(error.__cause__):
                return False
            raise
        return True

    def _put_moving(self, path: str, value: bytes, *, replace: bool) -> None:
        partial = f"{path}.{secrets.token_hex(8)}.partial"
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        try:
            self._fs.pipe_file(partial, value)
            if replace:
                self._fs.mv(partial, path)
            else:
                self._link(partial, path)
        except BaseException:
            if self._fs.exists(partial):
                self._fs.rm_file(partial)
            raise

    def _link(self, partial: str, path: str) -> None:
        try:
            self._fs.link(partial, path)
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
            if self._fs.exists(path):
                raise FileExistsError(path) from None
            self._fs.mv(partial, path)
        else:
            self._fs.rm_file(partial)

    def _call(self, what: str, function: Callable[[], _Result]) -> _Result:
        try:
            return function()
        except Exception as error:
            raise StoreError(f"cannot {what} at {self.scheme}://: {type(error).__name__}") from error


def redacted(url: str) -> str:
    """``url`` without user, password and query."""
    parts = urlsplit(url)
    host = parts.netloc.rsplit("@", 1)[-1]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else parts.path


def _open(url: str, scheme: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    import fsspec  # noqa: PLC0415 (0.2 s that a store without a remote tier does not pay)

    try:
        fs, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package, extra = _EXTRAS.get(scheme, (f"the fsspec implementation of {scheme}://", scheme))
        raise MissingExtraError(package, extra, f"remote={scheme}://") from error
    except ValueError as error:
        raise ConfigurationError(f"remote={redacted(url)!r}: fsspec knows no scheme {scheme!r}") from error
    return fs, str(root).rstrip("/")


def _is_absence(error: BaseException | None) -> bool:
    return isinstance(error, FileNotFoundError)


def _is_presence(error: BaseException | None) -> bool:
    return isinstance(error, FileExistsError) or type(error).__name__ == "AlreadyExistsError"  # obstore's own


def _modified_seconds(info: Mapping[str, Any]) -> float:
    stamp = info.get("LastModified") or info.get("mtime") or info.get("created") or info.get("last_modified")
    if isinstance(stamp, datetime):
        return stamp.timestamp() if stamp.tzinfo else float(calendar.timegm(stamp.timetuple()))
    return float(stamp) if isinstance(stamp, int | float) else time.time()
