from __future__ import annotations

import os
import stat
import time

import pytest

from ghostcacher.errors import ConfigurationError, StoreError
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.testing.store import key

ASK = {"limit_bytes": 1000, "timeout_seconds": 10.0}


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path / "blocks")


def put(store, number=1, value=b"value"):
    store.put_many({key(number): [value]}, timeout_seconds=10.0)
    return store.root / "v1" / f"{0:064x}" / f"{number:064x}"[:2] / f"{number:064x}.safetensors"


def test_files_and_folders_are_private(store):
    path = put(store)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (path.parent, path.parent.parent, path.parent.parent.parent, store.root):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_f66_whatever_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        path = put(DirectoryStore(tmp_path / "blocks"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_f69_a_directory_that_others_may_write_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigurationError, match="chmod"):
        DirectoryStore(tmp_path)


def test_a_directory_of_another_user_is_refused(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(ConfigurationError, match="65534"):
        DirectoryStore(tmp_path)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="not a directory"):
        DirectoryStore(tmp_path / "file")


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "dangling"])
def test_f68_anything_but_a_regular_file_is_absent(store, tmp_path, kind):
    path = put(store)
    path.unlink()
    if kind == "symlink":
        (tmp_path / "target").write_bytes(b"forged")
        path.symlink_to(tmp_path / "target")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    started = time.monotonic()
    found = store.get_many([key(1)], **ASK)
    assert not [value for value in found.values() if not isinstance(value, StoreError)]
    assert time.monotonic() - started < 1
    assert list(store.list_keys(timeout_seconds=10.0)) == []


def test_f25_partials_of_dead_processes_are_swept_at_the_next_open(store):
    folder = put(store).parent
    dead = folder / ".999999999-0123456789abcdef.partial"
    old = folder / f".{os.getpid()}-0123456789abcdef.partial"
    young = folder / f".{os.getpid()}-fedcba9876543210.partial"
    other = folder / "something else"
    for path in (dead, old, young, other):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    DirectoryStore(store.root)
    assert [path.exists() for path in (dead, old, young, other)] == [False, False, True, True]
    assert len(list(store.list_keys(timeout_seconds=10.0))) == 1


def test_names_that_are_no_process_do_not_keep_anyone_from_opening(store):
    bucket = put(store).parent
    for number in ("99999999999999999999", "999999999"):
        (bucket / f".{number}-0123456789abcdef.partial").touch()
    DirectoryStore(store.root)


def test_a_failed_write_leaves_nothing_behind(store, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    folder = put(store).parent
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError) as caught:
        put(store, 2)
    assert caught.value.errno == 28
    assert [path.name for path in folder.iterdir()] == [f"{1:064x}.safetensors"]


def test_many_small_parts_are_written_whole(store):
    parts = [bytes([n % 256]) * (n % 7) for n in range(3000)]
    store.put_many({key(1): parts}, timeout_seconds=10.0)
    assert bytes(store.get_many([key(1)], limit_bytes=10**6, timeout_seconds=10.0)[key(1)]) == b"".join(parts)


def test_touching_makes_parents_the_most_recent(store):
    paths = [put(store, number) for number in (1, 2, 3)]
    store.touch_many([key(1), key(2), key(3), key(9)])
    times = [path.stat().st_mtime_ns for path in paths]
    assert times == sorted(times, reverse=True)
