"""Tensor parallel: two processes with half of the heads each agree on what they restore."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.adapters.base import ModelAdapter
from ghostcacher.adapters.ranks import Ranks
from ghostcacher.testing.models import random_prompt, tiny_model

ROOT = Path(__file__).parents[2]
PROMPT = random_prompt(200, seed=4)


def launch(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = started.communicate(timeout=90)
    except subprocess.TimeoutExpired:  # ranks that wait for each other outlive who started them
        os.killpg(started.pid, signal.SIGKILL)
        raise
    assert started.returncode == 0, errors[-3000:]
    return out


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each rank of one launch saw, the whole model, and the folder with their stores."""
    model, folder, saved = tiny_model("llama"), tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("model")
    model.save_pretrained(saved)
    with ghostcacher.open_store(folder / "whole", memory=None, block_tokens=16) as store:
        ghostcache = GhostCache(model, store)
        model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), past_key_values=ghostcache, max_new_tokens=1)
    launch(Path(__file__).with_name("ranks_worker.py"), saved, folder, "whole")
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return ranks, model, folder


def both(launched, name):
    first, second = (rank[name] for rank in launched[0])
    assert first["tokens"] == second["tokens"] == launched[0][0]["cold"]["tokens"], name
    assert first["cached"] == second["cached"], name
    return first, second


def test_each_rank_finds_its_own_heads_byte_for_byte(launched):
    assert [rank["shape"][1] for rank in launched[0]] == [1, 1]
    first, second = both(launched, "second")
    assert both(launched, "first")[0]["cached"] == 0
    assert first["cached"] == 199
    assert first["equal"]
    assert second["equal"]


def test_a_cache_used_twice_is_right(launched):
    for rank in launched[0]:
        assert rank["again"]["tokens"] == rank["cold"]["other"]


def test_all_take_what_the_one_has_that_has_least(launched):
    assert both(launched, "a hole on one rank")[0]["cached"] == 96
    assert both(launched, "nothing on one rank")[0]["cached"] == 0
    assert both(launched, "a short fetch on one rank")[0]["cached"] == 48


@pytest.mark.parametrize(
    "name", ["a failing fetch on one rank", "a failure after agreeing", "switched off on one rank"]
)
def test_what_fails_on_one_rank_runs_cold_on_all(launched, name):
    first, second = both(launched, name)
    assert first["cached"] == 0
    assert first["reason"] != second["reason"]


def test_nothing_of_a_failure_stays(launched):
    assert both(launched, "and then")[0]["cached"] == 199


def test_prompts_in_chunks(launched):
    for rank in launched[0]:
        assert rank["chunks"]["tokens"] == [rank["cold"]["tokens"]] * 2
        assert rank["chunks"]["cached"] == 200 - 4  # each of four chunks leaves one token


def test_padded_batches(launched):
    for rank in launched[0]:
        assert rank["padded"]["tokens"] == rank["padded again"]["tokens"] == rank["rows"]["cold"]
        assert rank["padded again"]["cached"] == 149


def test_a_budget_needs_a_model_that_can_be_run_alone(launched):
    assert both(launched, "budget")[0]["lossy"] == 0


def test_the_rank_is_part_of_the_identity(models, tmp_path):
    adapter, namespaces = ModelAdapter(models("llama")), []
    adapter.prepare(models("llama"))
    with ghostcacher.open_store(tmp_path / "d", memory=None) as store:
        for ranks in (None, Ranks(0, 2, None), Ranks(1, 2, None), Ranks(0, 4, None)):
            adapter.ranks, adapter._known_fields, adapter._known_config = ranks, {}, {}
            namespaces.append(adapter.identify(models("llama"), store.config, "sampled", 10).namespace)
    assert len(set(namespaces)) == 4


def test_state_that_is_valid_at_one_length_runs_cold_by_name(models):
    adapter = ModelAdapter(models("mamba"))
    adapter.ranks = Ranks(0, 2, None)
    adapter.prepare(models("mamba"))
    assert "tensor parallel" in (adapter.refusal or "")


@pytest.mark.launched
def test_the_example_says_what_each_rank_reused(tmp_path):
    example = ROOT / "examples/tensor_parallel.py"
    lines = [launch(example, "--directory", tmp_path).splitlines() for _ in range(2)]
    cold, warm = ([line for line in run if line.startswith("rank ")] for run in lines)
    assert [line.partition(" [")[0] for line in cold] == [line.partition(" [")[0] for line in warm]
    assert [line.partition(":")[0] for line in warm] == ["rank 0", "rank 1"]
    assert all("reused none" in line for line in cold)
    assert all("reused 511 of 512 prompt tokens from disk" in line for line in warm)


def test_another_topology_is_a_miss(launched):
    ranks, model, folder = launched
    assert both(launched, "blocks of the whole model")[0]["cached"] == 0
    with ghostcacher.open_store(folder / "one", memory=None, block_tokens=16) as store:
        cache = GhostCache(model, store)
        out = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), past_key_values=cache, max_new_tokens=4,
                             do_sample=False)  # fmt: skip
        assert cache.report.cached_tokens == 0
        assert out[:, 200:].tolist() == ranks[0]["cold"]["tokens"]
