"""Every system call of the directory store failed in turn, with eight errors: whole values, right answers."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.errors import ConfigurationError, StoreError
from ghostcacher.stores import directory
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.testing.models import random_prompt
from ghostcacher.testing.store import key

ERRNOS = [
    errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENAMETOOLONG, errno.EROFS,
]  # fmt: skip
CALLS = {
    "open", "close", "writev", "preadv", "fsync", "fstat", "link", "unlink", "replace", "scandir", "utime",
}  # fmt: skip
VALUE = [b"head", b"x" * 5000]
PROMPT = random_prompt(100, seed=6)


class FailingOs:
    """`os`, whose ``at``-th call of those in ``CALLS`` fails with ``number``. What it should do is not done.

    But closing: a descriptor is gone, whatever close says.
    """

    def __init__(self, at=0, number=errno.EIO):
        self.at, self.number, self.calls, self.failed = at, number, 0, ""

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments, **given):
            self.calls += 1
            if self.calls == self.at:
                self.failed = name
                if name == "close":
                    real(*arguments, **given)
                raise OSError(self.number, os.strerror(self.number))
            return real(*arguments, **given)

        return call


def partials(root):
    return [path for path in root.rglob("*") if path.is_file() and path.name.endswith(".partial")]


def read(store, name):
    return store.get_many([name], limit_bytes=2**20, timeout_seconds=1.0).get(name)


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("replace", [True, False])
def test_f29_f30_a_put_that_fails_anywhere_leaves_all_or_nothing(
    number, replace, tmp_path, monkeypatch, record_property
):
    store, tried = DirectoryStore(tmp_path / "d"), 0
    while True:
        failing = FailingOs(tried + 1, number)
        name = key(tried, namespace=tried)
        with monkeypatch.context() as patch:
            patch.setattr(directory, "os", failing)
            raised = None
            try:
                store.put_many({name: VALUE}, timeout_seconds=1.0, replace=replace)
            except StoreError as error:
                raised = error.errno
        if not failing.failed:
            break
        tried += 1
        found = read(store, name)
        assert raised in {None, number}
        assert found == b"".join(VALUE) or (found is None and raised)
        # What could not be removed is all that may be left, for the sweep at the next opening.
        assert len(partials(tmp_path)) <= (failing.failed == "unlink")
        for path in partials(tmp_path):
            path.unlink()
        store.put_many({name: VALUE}, timeout_seconds=1.0)
        assert read(store, name) == b"".join(VALUE)
    assert tried >= 4
    record_property("trials", tried)


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_f30_a_get_that_fails_anywhere_gives_an_error_or_the_value(number, tmp_path, monkeypatch, record_property):
    store, tried = DirectoryStore(tmp_path / "d"), 0
    store.put_many({key(1): VALUE}, timeout_seconds=1.0)
    while True:
        failing = FailingOs(tried + 1, number)
        with monkeypatch.context() as patch:
            patch.setattr(directory, "os", failing)
            found = read(store, key(1))
        if not failing.failed:
            break
        tried += 1
        assert isinstance(found, StoreError) or found == b"".join(VALUE)
        assert read(store, key(1)) == b"".join(VALUE)
    assert tried >= 3
    record_property("trials", tried)


@pytest.mark.parametrize(
    "number",
    [*ERRNOS[:2], *(pytest.param(number, marks=pytest.mark.slow) for number in ERRNOS[2:])],
    ids=errno.errorcode.get,
)
def test_f29_f30_generate_goes_on_whatever_fails(number, models, generate, tmp_path, monkeypatch, record_property):
    model = models("llama")
    expected, tried, refused = generate(model, PROMPT, new=2), 0, 0
    while True:
        failing = FailingOs(tried + 1, number)
        root = tmp_path / str(tried)
        with monkeypatch.context() as patch:
            patch.setattr(directory, "os", failing)
            for _ in range(2):
                try:
                    store = ghostcacher.open_store(root, memory=None, block_tokens=64)
                except (StoreError, ConfigurationError):  # opening may fail, generating may not
                    refused += 1
                    continue
                with store:
                    assert torch.equal(generate(model, PROMPT, GhostCache(model, store), new=2), expected)
                    store.flush()
        if not failing.failed:
            break
        tried += 1
        with ghostcacher.open_store(root, memory=None, block_tokens=64) as store:
            for _ in range(2):
                cache = GhostCache(model, store)
                assert torch.equal(generate(model, PROMPT, cache, new=2), expected)
                store.flush()
            assert cache.report.cached_tokens == 99
    assert tried > 15
    assert refused <= 2
    record_property("trials", tried)


@pytest.mark.parametrize("size", ["1MiB"])
def test_f29_a_full_disk_drops_and_reads_on(size, models, generate, tmp_path):
    """On a file system of its own, where the machine lets us mount one."""
    import subprocess

    mount = ["mount", "-t", "tmpfs", "-o", f"size={size.removesuffix('iB')}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here: needs root")
    try:
        model = models("llama")
        with ghostcacher.open_store(tmp_path / "d", memory=None, block_tokens=16) as store:
            generate(model, PROMPT, GhostCache(model, store), new=1)
            store.flush()
            for seed in range(20):
                prompt = random_prompt(200, seed=seed)
                assert torch.equal(
                    generate(model, prompt, GhostCache(model, store), new=2), generate(model, prompt, new=2)
                )
            store.flush()
            assert store.stats().tiers[0].errors > 0
            cache = GhostCache(model, store)
            generate(model, PROMPT, cache, new=1)
            assert cache.report.cached_tokens == 99
        assert not partials(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
