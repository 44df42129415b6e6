"""Real processes on one directory, some of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import ghostcacher
from ghostcacher.cli.upkeep import unsound
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.testing.store import key

WRITER = """
import os, sys
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.testing.store import key
store = DirectoryStore(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    value = bytes([number % 256]) * 200_000
    store.put_many({key(number % 20): [value[:7], value[7:]]}, timeout_seconds=60.0)
    number += 1
"""
GENERATOR = """
import sys, torch, warnings
warnings.simplefilter("ignore")
torch.set_num_threads(1)
import ghostcacher
from ghostcacher import gate
from ghostcacher.testing.models import random_prompt, tiny_model
from ghostcacher.adapters.calls import CallReader
gate.GRACE_SECONDS, gate.GRACE_SHARE = 30.0, float("inf")
model = tiny_model("llama")
name = CallReader(model).cache_name
with ghostcacher.open_store(sys.argv[1], memory=None, block_tokens=16) as store:
    for turn in range(int(sys.argv[2])):
        prompt = torch.cat([random_prompt(40, seed=turn % 5), random_prompt(8, seed=1000 + turn)], 1)
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
        cache = ghostcacher.GhostCache(model, store)
        given = {"attention_mask": torch.ones_like(prompt), name: cache}
        out = model.generate(prompt, max_new_tokens=6, do_sample=False, **given)
        assert torch.equal(out, expected), turn
    store.flush()
    print(store.stats().cached_tokens, store.stats().tiers[0].rejected, flush=True)
"""


def start(script, *args):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_in_a_loop(directory, kills):
    """Start a writer, let it write for a moment, kill it; the values then visible, all read whole."""
    for turn in range(kills):
        process = start(WRITER, directory)
        process.stdout.readline()
        time.sleep(0.005 + 0.01 * (turn % 7))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        store = DirectoryStore(directory)
        found = store.get_many([key(n) for n in range(20)], limit_bytes=10**6, timeout_seconds=60.0)
        for value in found.values():
            assert len(value) == 200_000
            assert bytes(value) == bytes(value[:1]) * 200_000
    leftovers = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert leftovers == []


def test_f24_kill_nine_leaves_no_torn_entry_and_no_partial(tmp_path, record_property):
    kill_in_a_loop(tmp_path / "blocks", kills=25)
    record_property("trials", 25)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_f24_kill_nine_many_times(tmp_path, record_property):
    kill_in_a_loop(tmp_path / "blocks", kills=1000)
    record_property("trials", 1000)


def test_f26_two_processes_share_one_directory(tmp_path):
    processes = [start(GENERATOR, tmp_path / "blocks", 25) for _ in range(2)]
    for process in processes:
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        cached_tokens, rejected = map(int, out.split())
        assert cached_tokens > 0
        assert rejected == 0
    store = DirectoryStore(tmp_path / "blocks")
    entries = list(store.list_keys(timeout_seconds=60.0))
    assert entries
    assert list(unsound(store, entries, lambda size_bytes: None)) == []


def test_p19_what_one_process_stored_another_finds_whatever_its_hash_seed(tmp_path, monkeypatch):
    def tokens(seed):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        out, errors = start(GENERATOR, tmp_path / "blocks", 1).communicate(timeout=200)
        return int(out.split()[0]), errors

    assert tokens("1")[0] == 0
    assert tokens("random")[0] == 47
    with ghostcacher.open_store(tmp_path / "blocks", memory=None, block_tokens=16) as store:
        assert store.stats().tiers[0].blocks == 0, "nothing is listed before it is asked for"
