"""A store in a local directory that many processes may share.

A value is written under a name nobody else uses, synced, and renamed: a reader sees all of it or none. Values are
read into private memory, never mapped (a truncated map kills the process, an overwritten one changes under it).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ghostcacher.errors import ConfigurationError, StoreError
from ghostcacher.stores.base import (
    WITHOUT_LINKS,
    Blob,
    Buffer,
    StoredEntry,
    checked_key,
    key_of_path,
    relative_path,
)

STALE_PARTIAL_SECONDS = 3600.0
_PARTIAL = re.compile(r"\.(\d{1,9})-[0-9a-f]{16}\.partial")
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_IOV_LIMIT = 512


class DirectoryStore:
    """Files under ``root/v1/<namespace>/<2 hex>/<key>.safetensors``, mode 0600 in directories of mode 0700.

    Anything but a regular file of this user counts as absent.
    """

    name = "disk"

    def __init__(self, root: str | os.PathLike[str], *, is_sealed: bool = False, is_read_only: bool = False) -> None:
        """Creates ``root`` if need be and sweeps partial files that dead processes left, but for a reader.

        If ``is_sealed``, what is written here can be forged by nobody: ``root`` may belong to another user and others
        may write to it, and files and directories below it get its mode.

        Raises:
            ConfigurationError: ``root`` is not a directory, belongs to another user, or others may write to it.
            StoreError: it cannot be created.
        """
        self.root = Path(root).absolute()
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.root.stat()
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigurationError(f"{self.root} is not a directory; give open_store another one") from error
        except OSError as error:
            raise StoreError(error.errno, f"cannot create the store's directory {self.root}") from error
        self._owner = None if is_sealed else os.geteuid()
        self._mode = 0o700
        if is_sealed:
            self._mode |= status.st_mode & 0o077
        else:
            _refuse_untrusted(self.root, status)
        if not is_read_only:
            with contextlib.suppress(StoreError):  # another opening sweeps them
                self._sweep_partials()

    @property
    def lock_mode(self) -> int:
        """Of a file beside the entries that every user of the directory must be able to lock."""
        return self._mode & 0o666

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`. Anything but a regular file of this user counts as absent."""
        found: dict[str, Buffer | StoreError] = {}
        for key in keys:
            try:
                value = _read(self._path(key), limit_bytes, self._owner)
            except OSError as error:
                found[key] = StoreError(error.errno, f"cannot read a block: {error.strerror}")
            else:
                found |= {} if value is None else {key: value}
        return found

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """See `Store.put_many`."""
        stood = set()
        for key, blob in items.items():
            try:
                if not self._write(self._path(key), blob, replace=replace):
                    stood.add(key)
            except OSError as error:
                raise StoreError(error.errno, f"cannot write a block: {error.strerror}") from error
        return frozenset(stood)

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`."""
        return frozenset(key for key in keys if os.path.lexists(self._path(key)))

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`."""
        for key in keys:
            try:
                os.unlink(self._path(key))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StoreError(error.errno, f"cannot delete a block: {error.strerror}") from error

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`."""
        namespace, _, digest = prefix.partition("/")
        for bucket in self.buckets(namespace):
            if bucket.name.startswith(digest[:2]) or digest.startswith(bucket.name):
                yield from (entry for entry in self.entries_in(bucket.path) if entry.key.startswith(prefix))

    def namespaces(self) -> list[str]:
        """Hexadecimal digests of the namespaces that stand here."""
        return [entry.name for entry in _scan(self.root / "v1") if entry.is_dir(follow_symlinks=False)]

    def buckets(self, namespace: str = "") -> Iterator[os.DirEntry[str]]:
        """The two-digit directories of the namespaces that begin with ``namespace``."""
        is_shared = self._owner is None
        for found in self.namespaces():
            if found.startswith(namespace):
                entries = _scan(self.root / "v1" / found, is_lenient=is_shared)
                yield from (e for e in entries if e.is_dir(follow_symlinks=False))

    def entries_in(self, bucket: str) -> Iterator[StoredEntry]:
        """The stored values in one bucket directory."""
        for entry in _scan(Path(bucket), is_lenient=self._owner is None):
            key = key_of_path(entry.path)
            with contextlib.suppress(OSError):  # an entry that cannot be looked at is not there
                if key is not None and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    yield StoredEntry(key, status.st_size, status.st_mtime)

    def touch_many(self, keys: Sequence[str]) -> None:
        """Mark values as used now, the last key first, so that parents end up the most recent."""
        for key in reversed(keys):
            with contextlib.suppress(OSError):
                os.utime(self._path(key), follow_symlinks=False)

    def _path(self, key: str) -> str:
        return f"{self.root}/{relative_path(checked_key(key))}"

    def _write(self, path: str, blob: Blob, *, replace: bool) -> bool:
        """Whether it was written: it is not where something stands that is not to be replaced."""
        if not replace and os.path.lexists(path):
            return False
        folder = os.path.dirname(path)
        partial = f"{folder}/.{os.getpid()}-{secrets.token_hex(8)}.partial"
        descriptor = self._create(folder, partial)
        try:
            try:
                _write_all(descriptor, blob)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            return _moved(partial, path, replace=replace)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    def _create(self, folder: str, partial: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return self._opened(partial, flags)
        except FileNotFoundError:
            bucket = Path(folder)
            for level in (bucket.parent.parent.parent, bucket.parent.parent, bucket.parent, bucket):
                self._made(level)
            return self._opened(partial, flags)

    def _opened(self, partial: str, flags: int) -> int:
        descriptor = os.open(partial, flags, self._mode & 0o666)
        if self._owner is None:  # a directory that is shared gives its mode, whatever this user's umask is
            os.fchmod(descriptor, self._mode & 0o666)
        return descriptor

    def _made(self, level: Path) -> None:
        try:
            level.mkdir(mode=self._mode)
        except FileExistsError:
            return
        if self._owner is None:
            level.chmod(self._mode | (self.root.stat().st_mode & stat.S_ISGID))

    def _sweep_partials(self) -> None:
        for bucket in self.buckets():
            for entry in _scan(Path(bucket.path)):
                found = _PARTIAL.fullmatch(entry.name)
                if found and _is_abandoned(entry, int(found[1])):
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


def _moved(partial: str, path: str, *, replace: bool) -> bool:
    """Give ``partial`` its name; False if something has it that is not to be replaced."""
    if not replace:
        try:
            os.link(partial, path, follow_symlinks=False)
        except FileExistsError:
            os.unlink(partial)
            return False
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
        else:
            os.unlink(partial)
            return True
    os.replace(partial, path)
    return True


def _read(path: str, limit_bytes: int, owner: int | None) -> bytearray | None:
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            return None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or (owner is not None and status.st_uid != owner):
            return None
        return _read_whole(descriptor, min(status.st_size, limit_bytes))
    finally:
        os.close(descriptor)


def _read_whole(descriptor: int, size_bytes: int) -> bytearray:
    value = bytearray(size_bytes)
    view = memoryview(value)
    filled = 0
    while filled < size_bytes:
        count = os.preadv(descriptor, [view[filled:]], filled)
        if count == 0:
            break
        filled += count
    view.release()
    del value[filled:]
    return value


def _write_all(descriptor: int, blob: Blob) -> None:
    pending = [memoryview(part).cast("B") for part in blob if len(part)]
    while pending:
        written = os.writev(descriptor, pending[:_IOV_LIMIT])
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]


def _scan(folder: Path, *, is_lenient: bool = False) -> list[os.DirEntry[str]]:
    """What is in ``folder``; nothing, if it is not there, or ``is_lenient`` and it is another user's own."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if is_lenient and error.errno == errno.EACCES:
            return []
        raise StoreError(error.errno, f"cannot list {folder}: {error.strerror}") from error


def _refuse_untrusted(root: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise ConfigurationError(
            f"{root} belongs to user {status.st_uid}, not to this one ({os.geteuid()}); choose your own"
        )
    if status.st_mode & _OTHERS_MAY_WRITE:
        raise ConfigurationError(f"others may write to {root}, and blocks in it could be forged: chmod go-w {root}")


def _is_abandoned(entry: os.DirEntry[str], process: int) -> bool:
    try:
        is_old = time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_PARTIAL_SECONDS
    except OSError:
        return False
    return is_old or not _is_alive(process)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
