"""Rows of the catalogue of faults that have no place of their own; the number in a name is the row's."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.adapters import landing
from ghostcacher.errors import ConfigurationError, StoreError
from ghostcacher.stores.base import checked_key
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.testing.models import random_prompt
from ghostcacher.testing.store import key

PROMPT = random_prompt(100, seed=3)


def opened(folder, **given):
    return ghostcacher.open_store(folder, memory=None, block_tokens=16, **given)


def run(generate, model, store, prompt=PROMPT, new=3):
    cache = GhostCache(model, store)
    out = generate(model, prompt, cache, new=new)
    store.flush()
    return out, cache.report


def test_f13_a_block_of_another_format_is_a_miss_and_stays(models, generate, tmp_path):
    model = models("llama")
    with opened(tmp_path / "d") as store:
        run(generate, model, store)
    for file in (tmp_path / "d").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes().replace(b'\\"format\\":1', b'\\"format\\":2'))
    before = {file: file.read_bytes() for file in (tmp_path / "d").rglob("*.safetensors")}
    with opened(tmp_path / "d") as store:
        assert run(generate, model, store)[1].cached_tokens == 0
    assert {file: file.read_bytes() for file in before} == before


def test_f32_a_directory_that_is_deleted_under_us_is_made_again(models, generate, tmp_path):
    model = models("llama")
    expected = generate(model, PROMPT, new=3)
    with opened(tmp_path / "d") as store:
        for _ in range(3):
            out, _ = run(generate, model, store)
            assert torch.equal(out, expected)
            gc.collect()  # an answer's last tokens are stored when its cache goes away, and the tail that they
            store.flush()  # replace is deleted: late, that would be the tail which the next prompt has just stored
            while (tmp_path / "d").exists():
                shutil.rmtree(tmp_path / "d", ignore_errors=True)
            out, report = run(generate, model, store)
            assert torch.equal(out, expected)
            assert report.cached_tokens == 0
        assert run(generate, model, store)[1].cached_tokens == 99


@pytest.fixture
def ctrl_c():
    """SIGINT raises, also where this was started in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what was just being opened
def test_f53_ctrl_c_at_any_time_leaves_a_usable_cache(ctrl_c, models, generate, tmp_path, record_property):
    model, rng = models("llama"), random.Random(5)
    expected = generate(model, PROMPT, new=20)
    interrupted = 0
    with opened(tmp_path / "d") as store:
        cache = GhostCache(model, store)
        for _ in range(30):
            timer = threading.Timer(rng.uniform(0.001, 0.1), signal.raise_signal, [signal.SIGINT])
            try:
                timer.start()
                generate(model, PROMPT, cache, new=20)
                timer.join()
            except KeyboardInterrupt:
                interrupted += 1
            timer.cancel()
            timer.join()
            assert torch.equal(generate(model, PROMPT, cache, new=20), expected)
        store.flush()
    assert interrupted > 5
    with opened(tmp_path / "d") as store:
        out, report = run(generate, model, store, new=20)
        assert torch.equal(out, expected)
        assert report.cached_tokens == 99
    record_property("trials", interrupted)


def test_f58_memory_that_cannot_be_had_is_a_cold_run(models, generate, tmp_path, monkeypatch, record_property):
    model, allocate = models("llama"), torch.empty
    expected = generate(model, PROMPT, new=3)
    with opened(tmp_path / "d") as store:
        run(generate, model, store)
        for fails_at in range(1, 30):
            calls = [0]

            def failing(*sizes, calls=calls, fails_at=fails_at, **given):
                calls[0] += 1
                if calls[0] == fails_at:
                    raise torch.OutOfMemoryError("there is no more")
                return allocate(*sizes, **given)

            with monkeypatch.context() as patch:
                patch.setattr(landing.torch, "empty", failing)
                cache = GhostCache(model, store)
                try:
                    out = generate(model, PROMPT, cache, new=3)
                except torch.OutOfMemoryError:
                    continue  # in a layer, while the model runs: as it would be without us
            assert torch.equal(out, expected)
            if calls[0] < fails_at:
                break
        assert fails_at > 1
        assert run(generate, model, store)[1].cached_tokens == 99
    record_property("trials", fails_at - 1)


def test_f62_a_fork_in_the_middle_goes_on_on_both_sides(
    models, generate, tmp_path, in_another_process, record_property
):
    """As a data loader's worker does: the child has the parent's store object and none of its threads."""
    script = (
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "import torch; torch.set_num_threads(1)\n"
        "import ghostcacher; from ghostcacher import GhostCache\n"
        "from ghostcacher.testing.models import random_prompt, tiny_model\n"
        "model = tiny_model('llama')\n"
        "def run(store, seed):\n"
        "    ids = random_prompt(60, seed=seed); cache = GhostCache(model, store)\n"
        "    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1)\n"
        "    return cache.report.cached_tokens\n"
        "store = ghostcacher.open_store(sys.argv[1], memory=None, block_tokens=16)\n"
        "run(store, 1); store.flush()\n"
        "children = []\n"
        "for number in range(5):\n"
        "    run(store, 100 + number)\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        found = run(store, 1); run(store, 200 + number); store.flush(20)\n"
        "        os._exit(0 if found == 59 else 1)\n"
        "    children.append(pid)\n"
        "codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]\n"
        "store.close()\n"
        "store = ghostcacher.open_store(sys.argv[1], memory=None, block_tokens=16)\n"
        "print(codes, [run(store, 200 + number) for number in range(5)])\n"
    )
    done = in_another_process(script, tmp_path / "d")
    assert done.stdout.strip() == "[0, 0, 0, 0, 0] [59, 59, 59, 59, 59]", done.stderr
    record_property("trials", 5)


def test_f66_checks_are_made_without_asserts(tmp_path, in_another_process):
    """Under ``python -O``, with another hash seed, locale and umask: a changed block is refused there too."""
    script = (
        "import os, sys; os.umask(0)\n"
        "from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob\n"
        "from ghostcacher.codecs.raw import RawCodec\n"
        "from ghostcacher.errors import BlockError\n"
        "from ghostcacher.stores.directory import DirectoryStore\n"
        "from ghostcacher.testing.tier import LAYOUT, blocks_of, chain_of\n"
        "block = blocks_of(chain_of(16))[0]\n"
        "blob = bytearray(b''.join(bytes(part) for part in CodecChain(RawCodec()).encode(block)))\n"
        "store = DirectoryStore(sys.argv[1]); store.put_many({block.key.store_key: [blob]}, timeout_seconds=1.0)\n"
        "modes = {oct(path.stat().st_mode & 0o777) for path in store.root.rglob('*')}\n"
        "decode_blob(blob, block.key, LAYOUT); blob[-1] ^= 1\n"
        "try: decode_blob(blob, block.key, LAYOUT)\n"
        "except BlockError as error: print(error.reason, sorted(modes), block.key.digest.hex()[:16])\n"
    )
    said = set()
    for seed in ("0", "1234"):
        locale = "C" if seed == "0" else "tr_TR.UTF-8"
        done = in_another_process(script, tmp_path / seed, "-O", PYTHONHASHSEED=seed, LC_ALL=locale)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    (one,) = said
    assert one.startswith("corrupt ['0o600', '0o700'] ")


def test_f67_nothing_but_digests_becomes_a_path(models, generate, tmp_path, record_property):
    rng, letters = random.Random(2), "0123456789abcdefABCDEF/.\\\0~ %é"
    for _ in range(100_000):
        name = "".join(rng.choices(letters, k=rng.choice([0, 1, 64, 129, 130])))
        with pytest.raises(ConfigurationError):
            checked_key(name)
    model = models("llama")
    for salt in ("../../outside", "/absolute", "nul\0", "x" * 4096, "ä☃", "CON", "a/b"):
        with opened(tmp_path / "d", salt=salt) as store:
            run(generate, model, store, new=1)
    assert {path.name for path in tmp_path.iterdir()} == {"d"}
    assert {path.name for path in (tmp_path / "d").iterdir()} <= {"v1", ".sweep.lock"}
    assert all(len(path.name) == 64 for path in (tmp_path / "d/v1").iterdir())
    record_property("trials", 100_000)


def test_f70_a_file_that_changes_while_it_is_read_is_never_half_taken(tmp_path, record_property):
    """Someone overwrites and truncates in place, which we never do: bytes are private, and the digest decides."""
    from ghostcacher.codecs.raw import RawCodec
    from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
    from ghostcacher.errors import BlockError
    from ghostcacher.testing.tier import LAYOUT, blocks_of, chain_of

    block, store, seconds = blocks_of(chain_of(16))[0], DirectoryStore(tmp_path / "d"), 1.5
    blob = b"".join(bytes(part) for part in CodecChain(RawCodec()).encode(block))
    store.put_many({block.key.store_key: [blob]}, timeout_seconds=1.0)
    (path,) = (tmp_path / "d").rglob("*.safetensors")
    stop, taken, refused = threading.Event(), 0, 0

    def disturb():
        rng = random.Random(0)
        while not stop.is_set():
            with path.open("r+b") as file:
                file.seek(rng.randrange(len(blob)))
                file.write(rng.randbytes(64))
                file.truncate(rng.randrange(len(blob)))
                file.seek(0)
                file.write(blob)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = store.get_many([block.key.store_key], limit_bytes=2**20, timeout_seconds=1.0)
        value = found.get(block.key.store_key)
        if value is None or isinstance(value, StoreError):
            continue
        try:
            decoded = decode_blob(value, block.key, LAYOUT)
        except BlockError:
            refused += 1
            continue
        assert all(torch.equal(a, b) for a, b in zip(decoded.tensors, block.tensors, strict=True))
        taken += 1
    stop.set()
    disturber.join()
    assert refused > 0
    assert taken > 0
    record_property("trials", taken + refused)


def test_f77_prompts_that_nobody_knows_cost_no_memory(models, tmp_path, record_property):
    model = models("llama")
    ghostcacher.lookup(model, PROMPT[0].tolist(), opened(tmp_path / "warm"))
    with opened(tmp_path / "d", remote="memory://f77") as store:
        for turn in range(300):
            ghostcacher.lookup(model, random_prompt(200, seed=turn)[0].tolist(), store)
        assert store.stats().tiers[0].blocks == 0
        assert all(len(tier.index) == 0 for tier in store.tiers)
    record_property("trials", 300)


def test_f37_a_directory_behind_fsspec_is_written_whole(tmp_path):
    """``pipe_file`` writes in place there: what is read during a slow write must be the old value or the new one."""
    from ghostcacher.stores.filesystem import FilesystemStore

    store = FilesystemStore(f"file://{tmp_path}/blocks")
    values = [letter * 200_000 for letter in (b"a", b"b")]
    store.put_many({key(1): [values[0]]}, timeout_seconds=5.0)
    pipe = store._fs.pipe_file

    def slow(path, value, **given):
        pipe(path, value[: len(value) // 2], **given)
        time.sleep(0.05)
        pipe(path, value, **given)

    store._fs.pipe_file = slow
    writer = threading.Thread(
        target=lambda: [store.put_many({key(1): [value]}, timeout_seconds=5.0) for value in values * 3]
    )
    writer.start()
    while writer.is_alive():
        found = store.get_many([key(1)], limit_bytes=2**20, timeout_seconds=5.0)
        assert bytes(found[key(1)]) in values
    writer.join()


def test_f31_a_directory_that_became_read_only_is_read_on(models, generate, tmp_path):
    """A real read-only mount, where the machine lets us make one."""
    model, root = models("llama"), tmp_path / "d"
    with opened(root) as store:
        run(generate, model, store)
    bound = subprocess.run(["mount", "--bind", str(root), str(root)], check=False, capture_output=True)
    if bound.returncode:
        pytest.skip("nothing can be mounted here: needs root")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(root)], check=True)
        with opened(root) as store:
            out, report = run(generate, model, store)
            assert report.cached_tokens == 99
            assert torch.equal(out, generate(model, PROMPT, new=3))
            other = random_prompt(100, seed=77)
            assert torch.equal(run(generate, model, store, other)[0], generate(model, other, new=3))
            assert store.stats().tiers[0].errors > 0
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_f36_an_eviction_that_takes_what_another_process_just_stored_again_is_a_miss(models, generate, tmp_path):
    """Blocks are what their names say: a newer file of the same name is the same block, and losing it costs a hit."""
    model = models("llama")
    with opened(tmp_path / "d") as one, opened(tmp_path / "d") as two:
        run(generate, model, one)
        victims = [key for key in one.tiers[0].entries() if key.start == 0]
        delete = one.tiers[0].store.delete_many

        def stored_again_first(keys, **given):
            run(generate, model, two)
            delete(keys, **given)

        one.tiers[0].store.delete_many = stored_again_first
        one.tiers[0].remove(victims)
        for _ in range(2):
            out, report = run(generate, model, two)
            assert torch.equal(out, generate(model, PROMPT, new=3))
        assert report.cached_tokens == 99


@pytest.mark.parametrize("days", [-400, 400])
def test_f38_a_clock_that_jumps_makes_nothing_valid_and_nothing_invalid(days, models, generate, tmp_path, monkeypatch):
    model, now = models("llama"), time.time
    with opened(tmp_path / "d") as store:
        run(generate, model, store)
    monkeypatch.setattr(time, "time", lambda: now() + days * 86_400)
    for file in (tmp_path / "d").rglob("*.safetensors"):
        os.utime(file, (now() - days * 86_400,) * 2)
    with opened(tmp_path / "d", disk="60KiB") as store:
        assert run(generate, model, store)[1].cached_tokens == 99
        for seed in range(6):
            prompt = random_prompt(60, seed=seed)
            assert torch.equal(run(generate, model, store, prompt)[0], generate(model, prompt, new=3))
        assert sum(file.stat().st_size for file in (tmp_path / "d").rglob("*.safetensors")) <= 60 * 1024
        assert store.stats().tiers[0].evicted > 0


def test_f64_the_interpreter_ends_whatever_is_still_open(tmp_path, in_another_process):
    """Stores, caches and attachments that nobody closed, in globals, in cycles and in a thread."""
    script = (
        "import sys, threading, time, warnings; warnings.simplefilter('ignore')\n"
        "import torch; torch.set_num_threads(1)\n"
        "import ghostcacher; from ghostcacher import GhostCache\n"
        "from ghostcacher.testing.models import random_prompt, tiny_model\n"
        "model, ids = tiny_model('llama'), random_prompt(60, seed=1)\n"
        "store = ghostcacher.open_store(sys.argv[1], block_tokens=16)\n"
        "cache = GhostCache(model, store); cycle = [cache]; cycle.append(cycle)\n"
        "attached = ghostcacher.attach(model, store); attached.__enter__()\n"
        "model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3)\n"
        "threading.Thread(target=lambda: time.sleep(0.5) or store.stats()).start()\n"
        "print('done')\n"
    )
    done = in_another_process(script, tmp_path / "d")
    assert (done.returncode, done.stdout.strip()) == (0, "done")
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "d").rglob("*.safetensors"))
