"""What is said of a model, before and after it is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import ghostcacher
from ghostcacher import GhostCache, supported
from ghostcacher.adapters import table
from ghostcacher.adapters.calls import CallReader
from ghostcacher.cli import models
from ghostcacher.cli.app import app
from ghostcacher.support import known_types
from ghostcacher.testing.models import random_prompt, tiny_model

EXPECTED = {
    "llama": ("proven", "any length", {"full"}),
    "deepseek_v3": ("proven", "any length", {"latent"}),
    "gemma2": ("proven", "any length", {"window", "full"}),
    "lfm2": ("proven", "block ends", {"conv", "full"}),
    "qwen3_next": ("proven", "snapshots", {"recurrent", "full"}),
    "qwen3": ("certified", "any length", {"full"}),
    "recurrent_gemma": ("refused", "none", set()),
    "minimax": ("refused", "none", set()),
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_loaded_model(recipe):
    found = supported(tiny_model(recipe))
    assert (found.status, found.capability, set(found.layers)) == EXPECTED[recipe]
    assert bool(found.reason) == (found.status == "refused")
    assert str(found).startswith(f"{found.model_type}: {found.status}")


def test_a_type_that_fails_its_probe_is_refused_with_the_measure(monkeypatch):
    """A proven type whose probe is made to see another model must not pass."""
    monkeypatch.setattr(table, "PROVEN", frozenset())
    model = tiny_model("llama", seed=8)
    calls = []

    def drift(*_):
        calls.append(1)
        with torch.no_grad():
            model.lm_head.weight.add_(0.1)

    handle = model.lm_head.register_forward_hook(drift)
    found = supported(model)
    handle.remove()
    assert calls
    assert found.status == "refused"
    assert "a probe gave other logits with restored state" in found.reason


def test_a_layer_class_that_nobody_knows_is_never_guessed():
    class Mystery(ghostcacher.adapters.kinds.GrowingLayer):
        pass

    with pytest.raises(ghostcacher.UnsupportedModelError, match="Mystery are not known"):
        ghostcacher.adapters.kinds.kind_of(Mystery())


def test_every_type_of_the_installed_transformers_is_listed():
    found = {support.model_type: support for support in known_types()}
    assert len(found) > 150
    assert all(support.reason for support in found.values() if support.status == "refused")
    assert all(support.capability != "none" for support in found.values() if support.status != "refused")
    assert found["qwen3_next"].capability == "snapshots"
    assert found["llama"].capability == "any length"


@pytest.fixture
def run():
    try:
        models.register(app)
        yield lambda *args: CliRunner().invoke(app, ["models", *args])
    finally:
        app.registered_commands[:] = [c for c in app.registered_commands if c.callback is not models.models]


def test_the_command_prints_json_and_a_table(run):
    document = json.loads(run("recurrent_gemma", "--format", "json").stdout)
    assert [found["status"] for found in document["models"]] == ["refused"]
    assert "not in the cache" in run("recurrent_gemma").stdout


def test_the_command_says_what_matches_nothing(run):
    done = run("no-such-model")
    assert done.exit_code == 2
    assert "no-such-model" in done.output


def test_a_hand_written_call_gets_all_its_logits_from_a_type_that_cannot_say(store):
    """Without ``logits_to_keep`` in the forward only ``generate`` is known to want the last logits alone."""
    model = tiny_model("trocr")
    reader = CallReader(model)
    assert not reader.last_logits
    prompt = random_prompt(20)
    with torch.no_grad():
        expected = model(prompt, use_cache=True).logits
        for _ in range(2):
            cache = GhostCache(model, store)
            logits = model(prompt, use_cache=True, **{reader.cache_name: cache}).logits
            assert torch.equal(logits, expected)
            assert cache.report.reason == "bypass: logits of the whole prompt are wanted"
