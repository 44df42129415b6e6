"""Stored bytes that are not what they should be: a miss or a shorter prefix, healed by the next store."""

from __future__ import annotations

import shutil

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.testing.models import FULL_ATTENTION, random_prompt, tiny_model

PROMPT = random_prompt(70, seed=1)


@pytest.fixture(params=FULL_ATTENTION)
def model(request, models):
    return models(request.param)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "blocks"


def opened(directory, **options):
    return ghostcacher.open_store(directory, memory=None, block_tokens=16, **options)


def fill(model, directory, generate, prompt=PROMPT, **options):
    with opened(directory, **options) as store:
        generate(model, prompt, GhostCache(model, store), new=1)
    return sorted(directory.rglob("*.safetensors"), key=start_of)


def start_of(path):
    text = path.read_bytes()[:6000].decode("latin-1")
    return int(text.split('\\"start\\":')[1].split(",")[0])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def extend(path):
    path.write_bytes(path.read_bytes() + b"\0" * 64)


def unlink(path):
    path.unlink()


def be_a_directory(path):
    path.unlink()
    path.mkdir()


DAMAGES = {"flipped bit": flip, "truncated": truncate, "empty": empty, "trailing bytes": extend, "missing": unlink,
           "a directory": be_a_directory}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [0, 2, 4])
def test_f01_to_f04_damage_shortens_the_prefix_and_heals(model, directory, generate, damage, number):
    files = fill(model, directory, generate)
    DAMAGES[damage](files[number])
    expected = generate(model, PROMPT)
    with opened(directory) as store:
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, PROMPT, cache), expected)
        assert cache.report.cached_tokens == min(16 * number, 69)
        store.flush()
    if damage == "a directory":
        return
    with opened(directory) as store:
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, PROMPT, cache), expected)
        assert cache.report.cached_tokens == 69


def test_f05_another_blocks_file_under_a_right_name(model, directory, generate):
    files = fill(model, directory, generate)
    shutil.copy(files[1], files[2])
    with opened(directory) as store:
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, PROMPT, cache), generate(model, PROMPT))
        assert cache.report.cached_tokens == 32
        assert store.stats().tiers[0].rejected == 1


@pytest.mark.parametrize("model_type", FULL_ATTENTION)
def test_f05_another_namespaces_file_under_a_right_name(directory, tmp_path, generate, model_type):
    model, other = tiny_model(model_type, seed=1), tiny_model(model_type, seed=2)
    files = fill(model, directory, generate)
    foreign = fill(other, tmp_path / "other", generate)
    for mine, theirs in zip(files, foreign, strict=True):
        shutil.copy(theirs, mine)
    with opened(directory) as store:
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, PROMPT, cache), generate(model, PROMPT))
        assert cache.report.cached_tokens == 0
        assert store.stats().tiers[0].rejected == len(files)
        store.flush()
    with opened(directory) as store:
        cache = GhostCache(model, store)
        generate(model, PROMPT, cache)
        assert cache.report.cached_tokens == 69


def test_changed_weights_never_meet_old_state(model, directory, generate):
    fill(model, directory, generate)
    parameter = next(iter(model.parameters()))
    kept = parameter.detach().clone()
    try:
        parameter.data.add_(0.05)
        with opened(directory) as store:
            cache = GhostCache(model, store)
            assert torch.equal(generate(model, PROMPT, cache), generate(model, PROMPT))
            assert cache.report.cached_tokens == 0
    finally:
        parameter.data.copy_(kept)
    with opened(directory) as store:
        cache = GhostCache(model, store)
        generate(model, PROMPT, cache)
        assert cache.report.cached_tokens == 69


def test_f15_weights_changed_under_a_live_cache(directory, generate):
    model = tiny_model("llama", seed=9)
    with opened(directory) as store:
        cache = GhostCache(model, store)
        out = generate(model, PROMPT, cache)
        model.model.layers[0].self_attn.v_proj.weight.data.mul_(1.5)
        assert torch.equal(generate(model, out, cache), generate(model, out))
        assert cache.report.cached_tokens == 0


def test_f55_an_exact_store_never_takes_lossy_blocks(directory, generate):
    model = tiny_model("llama")
    prompt = random_prompt(150, seed=3)
    with ghostcacher.open_store(directory, memory=None, block_tokens=128, codec="int8") as store:
        generate(model, prompt, GhostCache(model, store), new=1)
        store.flush()
        cache = GhostCache(model, store)
        generate(model, prompt, cache, new=1)
        assert (cache.report.cached_tokens, cache.report.lossy) == (149, True)
        assert "lossy" in str(cache.report)
        assert store.stats().tiers[0].lossy
    with ghostcacher.open_store(directory, memory=None, block_tokens=128) as store:
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, prompt, cache), generate(model, prompt))
        assert cache.report.cached_tokens == 0
        store.flush()
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, prompt, cache), generate(model, prompt))
        assert (cache.report.cached_tokens, cache.report.lossy) == (149, False)


def test_f55_what_follows_lossy_state_is_lossy(directory, generate):
    model = tiny_model("llama")
    prompt = random_prompt(128, seed=3)
    longer = torch.cat([prompt, random_prompt(64, seed=4)], 1)
    with ghostcacher.open_store(directory, memory=None, block_tokens=64, codec="int8") as store:
        generate(model, prompt, GhostCache(model, store), new=1)
        store.flush()
        generate(model, longer, GhostCache(model, store), new=1)
        store.flush()
        assert all(entry.lossy for entry in store.tiers[0].index.entries())
    with ghostcacher.open_store(directory, block_tokens=64, codec="int8") as store:
        generate(model, longer, GhostCache(model, store), new=1)
        store.flush()
        memory, disk = store.tiers
        assert all(entry.lossy for entry in memory.index.entries())
        assert disk.stats().stored == 0, "no block is coded twice"


@pytest.mark.parametrize("door", ["own", "attach"])
def test_f52_a_failure_after_half_the_prefix_was_placed_runs_cold(directory, generate, monkeypatch, door):
    """The first attempt ends at a hole and commits; the second raises: nothing of the first may stay."""
    model = tiny_model("llama")
    files = fill(model, directory, generate)
    expected = generate(model, PROMPT)
    with opened(directory) as store:
        matches = []
        real = store.match

        def match(chain, **options):
            matches.append(chain)
            if len(matches) == 2:
                raise RuntimeError("on command")
            found = real(chain, **options)
            files[2].unlink(missing_ok=True)
            return found

        monkeypatch.setattr(store, "match", match)
        if door == "own":
            cache = GhostCache(model, store)
            assert torch.equal(generate(model, PROMPT, cache), expected)
            report = cache.report
        else:
            with ghostcacher.attach(model, store) as attached:
                assert torch.equal(generate(model, PROMPT), expected)
            report = attached.reports[0]
        assert report.reason == "bypass: internal error (RuntimeError: on command)"
        assert len(matches) == 2
