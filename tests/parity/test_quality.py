"""A budget in place of a codec: what is stored keeps it, says so, and is exact where that cannot be told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import ghostcacher
from ghostcacher import GhostCache, attach
from ghostcacher.adapters.guard import Guard
from ghostcacher.codecs.header import BlockHeader, Certificate
from ghostcacher.codecs.quality import MARGIN, divergence
from ghostcacher.errors import BlockError, ConfigurationError
from ghostcacher.hooks import hooks_of
from ghostcacher.keys import Namespace, PrefixChain
from ghostcacher.research import calibrate
from ghostcacher.testing.codec import block
from ghostcacher.testing.models import random_prompt, tiny_model
from ghostcacher.tiers import certifying

PROMPT = random_prompt(200, seed=4)
BUDGET = 0.05


@pytest.fixture(scope="module")
def learned(models):
    texts = [random_prompt(160, seed=seed) for seed in (11, 12, 13)]
    return calibrate(models("llama"), texts, prefix_tokens=128, scored_tokens=32)


def opened(tmp_path, quality=BUDGET, **given):
    return ghostcacher.open_store(tmp_path, block_tokens=64, quality=quality, **{"memory": None, **given})


def headers(tmp_path):
    """Of all blocks, by position."""
    found = []
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        try:
            found.append(BlockHeader.parse(path.read_bytes()))
        except BlockError:
            continue  # tables
    return sorted(found, key=lambda header: header.key.start)


def test_whole_blocks_are_certified_within_the_budget_and_open_ones_exact(models, generate, tmp_path):
    model = models("llama")
    with opened(tmp_path) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        stats = store.stats().tiers[0]
    *whole, tail = headers(tmp_path)
    assert [header.codec["name"] for header in whole] == ["int8"] * 3
    assert len({header.certificate for header in whole}) == 1
    certificate = whole[0].certificate
    assert certificate.budget == BUDGET
    assert certificate.predicted is None
    assert 0 < certificate.replayed * MARGIN <= BUDGET
    assert (tail.codec["name"], tail.certificate, tail.lossy) == ("raw", None, False)
    assert (stats.codec, stats.lossy, stats.certified) == ("quality(0.05)", True, 3)
    assert stats.kl_quartiles == (certificate.replayed,) * 5


@pytest.mark.parametrize(("quality", "replays"), [(0.3, 1), (0.003, 2)])
def test_a_calibrated_model_takes_the_step_of_its_curve(
    quality, replays, models, generate, learned, monkeypatch, tmp_path
):
    model, found = models("llama"), []
    monkeypatch.setattr(certifying, "divergence", lambda *given: found.append(divergence(*given)) or found[-1])
    with opened(tmp_path, quality) as store:
        store.shelf.put(*learned)
        generate(model, PROMPT, GhostCache(model, store), new=1)
    whole = [header for header in headers(tmp_path) if header.certificate]
    assert len(whole) == 3
    certificate, codec = whole[0].certificate, whole[0].codec
    assert certificate.replayed == found[-1]
    assert [replayed * MARGIN <= quality for replayed in found] == [False] * (len(found) - 1) + [True]
    # What the curve says is too coarse for this prompt under the small budget: its replay takes the finer rung. It is
    # so by little: the curve of a GPU, which adds in another order, may say a step that is fine enough.
    assert len(found) == replays or torch.get_default_device().type != "cpu"
    assert codec["name"] == "kvt"
    assert codec["c"] == pytest.approx(learned.tables.step(quality / MARGIN) / 2 ** (len(found) - 1))
    assert certificate.predicted == pytest.approx(learned.tables.kl(codec["c"]))
    assert certificate.predicted <= quality / MARGIN * 1.001


def test_the_certificate_is_what_the_blocks_do(models, generate, tmp_path):
    """Measured again, from what lies in the store, with nothing but transformers."""
    model = models("llama")
    with opened(tmp_path) as store:
        generate(model, PROMPT[:, :192], GhostCache(model, store), new=1)
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64, codec="int8") as store:
        cache = GhostCache(model, store)
        generate(model, PROMPT[:, :193], cache, new=1)
        assert cache.report.cached_tokens == 192
        held = [(layer.keys[:, :, :160], layer.values[:, :, :160]) for layer in cache.layers]
    restored = DynamicCache(held, config=model.config)
    with torch.no_grad():
        coded = model(PROMPT[:, 160:192], past_key_values=restored).logits[0]
        exact = model(PROMPT[:, :192]).logits[0, 160:]
    certificate = next(header.certificate for header in headers(tmp_path) if header.certificate)
    assert certificate.replayed == pytest.approx(divergence(exact, coded), rel=0.02)


def test_what_keeps_no_budget_is_stored_exactly(models, generate, learned, tmp_path):
    model = models("llama")
    with opened(tmp_path, 1e-6) as store:
        store.shelf.put(*learned)
        generate(model, PROMPT, GhostCache(model, store), new=1)
    assert {header.codec["name"] for header in headers(tmp_path)} == {"raw"}
    assert not any(header.lossy or header.certificate for header in headers(tmp_path))
    with opened(tmp_path, 1e-6) as store:
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, PROMPT, cache, new=8), generate(model, PROMPT, new=8))
        assert (cache.report.cached_tokens, cache.report.lossy) == (199, False)


@pytest.mark.parametrize("recipe", ["qwen3_next", "falcon_h1", "mamba2"])
def test_kinds_that_cannot_be_replayed_are_stored_exactly(recipe, models, generate, tmp_path):
    model = models(recipe)
    with opened(tmp_path) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    assert {header.codec["name"] for header in headers(tmp_path)} == {"raw"}


@pytest.mark.parametrize("recipe", ["gemma2", "deepseek_v3", "mistral"])
def test_windows_and_latents_are_certified(recipe, models, with_logits, tmp_path):
    model = models(recipe)
    cold = with_logits(model, PROMPT, new=1)[1]
    for _ in range(2):
        with opened(tmp_path) as store:
            cache = GhostCache(model, store)
            warm = with_logits(model, PROMPT, cache, new=1)[1]
            store.flush()
            assert store.stats().failed == 0
    assert sum(header.certificate is not None for header in headers(tmp_path)) == 3
    assert cache.report.lossy
    assert 0 < divergence(cold[:, 0], warm[:, 0]) < BUDGET


def test_a_conversation_is_certified_turn_by_turn(models, generate, tmp_path):
    """Blocks that are stored already take part as they lie there."""
    model = models("llama")
    with opened(tmp_path) as store:
        cache, ids = GhostCache(model, store), PROMPT
        for turn in range(3):
            ids = torch.cat([generate(model, ids, cache, new=20), random_prompt(60, seed=turn)], dim=1)
            store.flush()
        events = store.stats()
    found = headers(tmp_path)
    assert events.failed == 0
    assert [header.key.start for header in found if header.certificate] == [0, 64, 128, 192, 256]
    assert len({header.certificate.replayed for header in found if header.certificate}) >= 3


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("calibrates", [False, True])
def test_a_budget_is_spent_once_however_often_a_conversation_is_restored(
    calibrates, is_remote, models, generate, learned, tmp_path
):
    """Turn after turn in a new process, on what the one before stored; then against a cold run of everything.

    A remote store names its blocks; what they have cost is known when they are read.
    """
    model, text = models("llama"), random_prompt(64 * 8 + 1, seed=21)
    tiers = {"disk": None, "remote": f"file://{tmp_path}"} if is_remote else {}
    for end in [148, 212, 290, 360, 420, 500, 512]:
        with opened(tmp_path, **tiers) as store:
            if calibrates:
                store.shelf.put(*learned)
            generate(model, text[:, :end], GhostCache(model, store), new=1)
            store.flush()
            stats = store.stats().tiers[0]
    found = headers(tmp_path)
    certified = [header.certificate.replayed for header in found if header.certificate]
    assert len(certified) == 8
    assert certified == sorted(certified)
    assert max(certified) <= BUDGET
    assert stats.kl_quartiles == pytest.approx(np.quantile(certified, [0, 0.25, 0.5, 0.75, 1]))
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64, codec="int8", **tiers) as store:
        cache = GhostCache(model, store)
        generate(model, text, cache, new=1)
        assert cache.report.cached_tokens == 512
        held = [(layer.keys[:, :, :448], layer.values[:, :, :448]) for layer in cache.layers]
    with torch.no_grad():
        coded = model(text[:, 448:480], past_key_values=DynamicCache(held, config=model.config)).logits[0]
        exact = model(text[:, :480]).logits[0, 448:]
    assert 0 < divergence(exact, coded) <= BUDGET


def test_a_tier_that_only_named_its_blocks_is_asked_what_they_cost(models, generate, tmp_path):
    """The near tier gives them back; the far one has the same, in a process that never read them there."""
    model, text = models("llama"), random_prompt(420, seed=21)
    for end in [148, 290, 420]:
        with opened(tmp_path / "near", remote=f"file://{tmp_path}/far") as store:
            cache = GhostCache(model, store)
            generate(model, text[:, :end], cache, new=1)
            assert cache.report.tier in {"", "disk"}
    near, far = (
        [header.certificate.replayed for header in headers(tmp_path / name) if header.certificate]
        for name in ("near", "far")
    )
    assert near == sorted(near) == far
    assert len(set(far)) == 3


def test_what_ram_holds_of_a_restored_conversation_is_still_coded_elsewhere(models, generate, tmp_path):
    """Tensors that stand on lossy ones are lossy, and not coded."""
    model, text = models("llama"), random_prompt(512, seed=21)
    for end in [148, 290, 420, 512]:
        with opened(tmp_path, memory="16MiB") as store:
            generate(model, text[:, :end], GhostCache(model, store), new=1)
    found = headers(tmp_path)
    whole = [header for header in found if header.key.length == 64]
    assert len(whole) == 8
    assert all(header.codec["name"] == "int8" and header.certificate for header in whole)
    certified = [header.certificate.replayed for header in whole]
    assert certified == sorted(certified)


@pytest.mark.parametrize("is_remote", [False, True])
def test_what_was_restored_without_a_certificate_leaves_no_budget(is_remote, models, generate, tmp_path):
    model, tiers = models("llama"), {"disk": None, "remote": f"file://{tmp_path}"} if is_remote else {}
    with ghostcacher.open_store(tmp_path, memory=None, block_tokens=64, codec="int8", **tiers) as store:
        generate(model, PROMPT[:, :128], GhostCache(model, store), new=1)
    with opened(tmp_path, **tiers) as store:
        cache = GhostCache(model, store)
        generate(model, PROMPT, cache, new=1)
        assert cache.report.lossy
    assert not any(header.certificate for header in headers(tmp_path))
    assert [header.codec["name"] for header in headers(tmp_path)].count("int8") == 2


def test_two_tiers_of_one_budget_each_have_what_was_certified_for_them(models, generate, tmp_path):
    far = f"file://{tmp_path}/far"
    with opened(tmp_path / "near", remote=far) as store:
        generate(models("llama"), PROMPT, GhostCache(models("llama"), store), new=1)
        store.flush()
        assert [tier.certified for tier in store.stats().tiers] == [3, 3]


def test_other_stores_see_the_certificates(models, generate, tmp_path):
    with opened(tmp_path) as store:
        generate(models("llama"), PROMPT, GhostCache(models("llama"), store), new=1)
    with opened(tmp_path) as other:
        cache = GhostCache(models("llama"), other)
        generate(models("llama"), PROMPT, cache, new=1)
        stats = other.stats().tiers[0]
    assert stats.certified == 3
    assert stats.kl_quartiles[-1] == headers(tmp_path)[0].certificate.replayed


def test_replays_are_no_prompts_of_anybodys(models, generate, tmp_path):
    model = models("llama")
    with opened(tmp_path) as store, attach(model, store) as attached:
        generate(model, PROMPT, new=1)
        store.flush()
        assert len(attached.reports) == 1
        assert store.stats().prompts == 1
    assert headers(tmp_path)[0].certificate


def test_a_model_that_cannot_be_run_again_is_stored_exactly(generate, tmp_path, monkeypatch):
    model, events = tiny_model("llama"), []
    with opened(tmp_path) as store:
        store.observers.append(events.append)
        monkeypatch.setattr("ghostcacher.adapters.guard.logits_after", lambda *_: 1 / 0)
        generate(model, PROMPT, GhostCache(model, store), new=1)
    assert {header.codec["name"] for header in headers(tmp_path)} == {"raw"}
    assert any(event.kind == "error" and "cannot replay" in event.reason for event in events)


def test_a_model_in_training_is_not_run(generate, tmp_path):
    model = tiny_model("llama")
    with opened(tmp_path) as store:
        model.train()
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
    assert not any(header.certificate for header in headers(tmp_path))


@pytest.mark.parametrize(
    "given", [{"quality": 0.0}, {"quality": 2}, {"quality": "x"}, {"quality": 0.1, "codec": "int8"}]
)
def test_budgets_that_mean_nothing(given, tmp_path):
    with pytest.raises(ConfigurationError, match="quality"):
        ghostcacher.open_store(tmp_path, **given)


def test_a_tier_may_have_a_budget_of_its_own(models, generate, tmp_path):
    with ghostcacher.open_store(
        tmp_path, memory="16MiB", disk="1GiB:quality(0.05)", block_tokens=64, remote=f"file://{tmp_path}/far"
    ) as store:
        generate(models("llama"), PROMPT, GhostCache(models("llama"), store), new=1)
        store.flush()
        assert [tier.codec for tier in store.stats().tiers] == ["decoded", "quality(0.05)", "raw"]
        assert [tier.certified for tier in store.stats().tiers] == [0, 3, 0]


@pytest.mark.parametrize(
    "certificate",
    [[], {}, {"budget": 1.0}, {"budget": "x", "predicted": None, "replayed": 0.1}, 3,
     {"budget": 0.1, "predicted": None, "replayed": -1.0}, {"budget": 0.1, "predicted": None, "replayed": 1},
     {"budget": 0.1, "predicted": 0.1, "replayed": 1.0, "more": 1.0}],
)  # fmt: skip
def test_certificates_that_are_none_make_a_header_none(certificate):
    given = block(64)
    header = BlockHeader(
        given.key, given.layout.digest, {"name": "raw"}, lossy=False, model="", fields=(),
        certificate=Certificate(0.1, None, 0.01),
    )  # fmt: skip
    assert BlockHeader.parse(header.render()) == header
    good = json.dumps(json.dumps({"budget": 0.1, "predicted": None, "replayed": 0.01}, separators=(",", ":")))[1:-1]
    bad = json.dumps(json.dumps(certificate, separators=(",", ":")))[1:-1]
    rendered = header.render().replace(good.encode(), bad.encode())
    assert good.encode() in header.render()
    rendered = (len(rendered) - 8).to_bytes(8, "little") + rendered[8:]
    with pytest.raises(BlockError, match="header"):
        BlockHeader.parse(rendered)


def test_tokens_that_stand_for_images_cannot_be_run_again(models):
    adapter = hooks_of(models("llama")).adapter
    adapter.prepare(models("llama"))
    guard = Guard(models("llama"), adapter.shape)
    ids = PROMPT[0].tolist()
    assert guard.trial(PrefixChain.of(ids, Namespace(bytes(32)), 64), 200) is not None
    assert guard.trial(PrefixChain.of([*ids[:5], 2**30, *ids[6:]], Namespace(bytes(32)), 64), 200) is None
    assert guard.trial(PrefixChain.of(ids, Namespace(bytes(32)), 64), 32) is None
