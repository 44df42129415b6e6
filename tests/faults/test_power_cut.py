"""After a power cut: every state that the calls of a put can leave a directory in, in order or not (row 4 and 24).

What a file system may do (Pillai et al., OSDI 2014, call it ALICE): calls that change names are kept in order, up to
any of them; of what was written and not synced, anything may be there: nothing, zeros, some pages. Some give a file its
new name before its data: then the digest of the block decides.
"""

from __future__ import annotations

import os

import pytest
import torch

from ghostcacher.blocks import KVBlock, KVLayout
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.errors import BlockError
from ghostcacher.keys import PrefixChain
from ghostcacher.stores import directory
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.testing.store import key
from ghostcacher.testing.tier import NAMESPACE

PAGE = 4096
OLD, NEW = b"o" * 9000, [b"n" * 5000, b"N" * 6000]
RECORDED = ("open", "writev", "fsync", "link", "unlink", "replace")


class RecordingOs:
    """`os`, which remembers the calls that change something: name, and path or what was written to which path."""

    def __init__(self):
        self.calls, self._paths = [], {}

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in RECORDED:
            return real

        def call(first, *rest, **given):
            result = real(first, *rest, **given)
            if name == "open":
                self._paths[result] = first
                if rest[0] & os.O_CREAT:
                    self.calls.append(("create", first))
            elif name == "writev":
                self.calls.append(("write", self._paths[first], b"".join(map(bytes, rest[0]))[:result]))
            elif name == "fsync":
                self.calls.append(("sync", self._paths[first]))
            else:
                self.calls.append((name, first, *rest[:1]))
            return result

        return call


def recorded(root, monkeypatch, *, replace):
    recorder = RecordingOs()
    store = DirectoryStore(root)
    if replace:
        store.put_many({key(1): [OLD]}, timeout_seconds=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(directory, "os", recorder)
        store.put_many({key(1): NEW}, timeout_seconds=1.0, replace=replace)
    return recorder.calls


def torn(data):
    """What may lie there of ``data`` that was not synced."""
    yield b""
    yield bytes(len(data))
    yield from (data[: page * PAGE] + bytes(len(data) - page * PAGE) for page in range(1, len(data) // PAGE + 1))
    yield from (data[: page * PAGE] for page in range(1, len(data) // PAGE + 1))
    yield data


def states(calls, path):
    """All contents of ``path`` that a cut after some of ``calls`` may leave; None: there is no such file."""
    for end in range(len(calls) + 1):
        files = {path: [OLD]} if calls and any(name == "replace" for name, *_ in calls) else {}
        for name, first, *rest in calls[:end]:
            if name == "create":
                files[first] = [b""]
            elif name == "write":
                files[first] = list(torn(files[first][-1] + rest[0]))
            elif name == "sync":
                files[first] = files[first][-1:]
            elif name == "unlink":
                files.pop(first, None)
            else:
                files[rest[0]] = files[first] if name == "link" else files.pop(first)
        yield from files.get(path, [None])


@pytest.mark.parametrize("replace", [False, True])
def test_f24_a_power_cut_leaves_the_old_value_the_new_one_or_none(tmp_path, monkeypatch, replace, record_property):
    calls = recorded(tmp_path, monkeypatch, replace=replace)
    names = [name for name, *_ in calls]
    assert names.index("write") < names.index("sync") < names.index("replace" if replace else "link")
    path = DirectoryStore(tmp_path)._path(key(1))
    found = set(states(calls, path))
    assert found == {OLD if replace else None, b"".join(NEW)}
    record_property("trials", len(list(states(calls, path))))


def test_negative_control_without_the_sync_torn_values_are_among_them(tmp_path, monkeypatch):
    calls = [call for call in recorded(tmp_path, monkeypatch, replace=True) if call[0] != "sync"]
    path = DirectoryStore(tmp_path)._path(key(1))
    assert len(set(states(calls, path))) > 2


def test_f04_a_name_that_was_there_before_its_data_is_no_block(record_property):
    """Every page lost, all after it lost, cut there, or in the place of its neighbour."""
    layout = KVLayout.uniform(layers=4, heads=2, head_dim=64, dtype="float32")
    block = PrefixChain.of(list(range(64)), NAMESPACE, 64).block(0)
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(group.shape(64), generator=generator) for group in layout.groups)
    whole = b"".join(CodecChain(RawCodec()).encode(KVBlock(block, layout, tensors)))
    decode_blob(bytearray(whole), block, layout)
    assert len(whole) > 60 * PAGE
    for begin in range(0, len(whole), PAGE):
        end = min(begin + PAGE, len(whole))
        after = whole[end : end + PAGE]
        for damaged in (
            whole[:begin] + bytes(end - begin) + whole[end:], whole[:begin] + bytes(len(whole) - begin), whole[:begin],
            whole[:begin] + after + whole[begin:end] + whole[end + len(after) :],
        ):  # fmt: skip
            if damaged == whole:
                continue
            with pytest.raises(BlockError):
                decode_blob(bytearray(damaged), block, layout)
    record_property("trials", 4 * len(whole) // PAGE)
