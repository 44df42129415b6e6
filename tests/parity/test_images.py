"""Prompts with images: exact, and never a block shared between different images behind equal token ids."""

from __future__ import annotations

import inspect

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.adapters import table
from ghostcacher.testing.images import (
    IMAGE_RECIPES,
    IMAGE_START,
    VIDEO_TOKEN,
    image_inputs,
    random_image,
    tiny_image_model,
)

FIRST, SECOND, OTHER = (random_image(seed) for seed in range(3))
SYSTEM = [*range(2, 23), IMAGE_START]
MIDDLE = [*range(20, 29), IMAGE_START]
PROMPT = [*SYSTEM, FIRST, *MIDDLE, SECOND, *range(30, 50)]
IN_TEXT = [*SYSTEM, FIRST, *MIDDLE, SECOND, *range(30, 45), *range(60, 70)]
OTHER_SECOND = [*SYSTEM, FIRST, *MIDDLE, OTHER, *range(30, 50)]
OTHER_FIRST = [*SYSTEM, OTHER, *MIDDLE, SECOND, *range(30, 50)]
NEEDS_SNAPSHOTS = frozenset({"qwen3_5"})

TYPES = pytest.mark.parametrize("model_type", IMAGE_RECIPES)


@pytest.fixture(scope="session")
def image_models():
    built = {}

    def get(model_type):
        if model_type not in built:
            built[model_type] = tiny_image_model(model_type)
        return built[model_type]

    return get


def cache_name(model):
    return next(name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters)


def generate(model, rows, cache=None, **options):
    given = {} if cache is None else {cache_name(model): cache}
    options.setdefault("do_sample", False)
    out = model.generate(
        **image_inputs(model, rows), max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **given,
        **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def assert_same(left, right):
    torch.testing.assert_close(left[1], right[1], atol=1e-4, rtol=0)
    assert torch.equal(left[0], right[0])


def warm(model, store, rows, **options):
    """The report of a warm run, which must be what a cold one gives."""
    cold = generate(model, rows, **options)
    cache = GhostCache(model, store)
    assert_same(generate(model, rows, cache, **options), cold)
    store.flush()
    return cache.report


@TYPES
def test_one_prefix_with_several_continuations(image_models, memory_store, model_type):
    model = image_models(model_type)
    assert warm(model, memory_store, [PROMPT]).cached_tokens == 0
    again = warm(model, memory_store, [PROMPT])
    in_text = warm(model, memory_store, [IN_TEXT])
    if model_type in NEEDS_SNAPSHOTS:
        assert (again.cached_tokens, in_text.cached_tokens) == (48, 48)
    else:
        assert (again.cached_tokens, in_text.cached_tokens) == (59, 55)


@TYPES
def test_equal_ids_with_other_images_share_nothing_from_the_image_on(image_models, memory_store, model_type):
    model = image_models(model_type)
    warm(model, memory_store, [PROMPT])
    second = warm(model, memory_store, [OTHER_SECOND]).cached_tokens
    first = warm(model, memory_store, [OTHER_FIRST]).cached_tokens
    if model_type in NEEDS_SNAPSHOTS:
        assert (second, first) == (0, 0)
        # Where they parted, a snapshot was taken: rounded down to 32 tokens, which the first image ends before.
        assert warm(model, memory_store, [[*SYSTEM, FIRST, *MIDDLE, OTHER, *range(50, 60)]]).cached_tokens == 32
    else:
        assert (second, first) == (36, 22)


@TYPES
def test_pixels_given_to_a_forward(image_models, memory_store, model_type):
    """A loop of the caller's own gives pixels (as `generate` does before 5.24), not encoded features."""
    model = image_models(model_type)
    name = cache_name(model)

    def last_logits(prompt, cache=None):
        inputs = image_inputs(model, [prompt])
        if "qwen" in model_type:
            inputs["position_ids"] = positions(model, inputs)
        with torch.no_grad():
            given = {} if cache is None else {name: cache}
            return model(**inputs, use_cache=True, logits_to_keep=1, return_dict=True, **given).logits

    for prompt, cached in ((PROMPT, 0), (PROMPT, 59), (OTHER_SECOND, 36), (OTHER_FIRST, 22)):
        cache = GhostCache(model, memory_store)
        warmed = last_logits(prompt, cache)
        torch.testing.assert_close(warmed, last_logits(prompt), atol=1e-4, rtol=0)
        memory_store.flush()
        assert cache.report.cached_tokens == cached or model_type in NEEDS_SNAPSHOTS, cache.report


def positions(model, inputs):
    """``[4, rows, tokens]`` as `generate` counts them for rope of three dimensions."""
    kept = {n: v for n, v in inputs.items() if n in {"image_grid_thw", "mm_token_type_ids", "attention_mask"}}
    rope, _ = model.model.get_rope_index(inputs["input_ids"], **kept)
    text = torch.arange(inputs["input_ids"].shape[1]).expand(1, *inputs["input_ids"].shape)
    return torch.cat([text, rope])


@TYPES
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=["beams", "two"]
)
def test_rows_that_generate_repeats(image_models, memory_store, model_type, options):
    model = image_models(model_type)
    warm(model, memory_store, [PROMPT])
    cached = warm(model, memory_store, [IN_TEXT], **options).cached_tokens
    if cache_name(model) == "cache":
        assert cached >= 48
    # Before 5.24 `generate` repeats some types' images one by one: a row then sees the first image twice, also cold.


@TYPES
def test_a_left_padded_batch(image_models, memory_store, model_type):
    model = image_models(model_type)
    rows = [PROMPT, [*SYSTEM, FIRST, *MIDDLE, OTHER, *range(30, 46)]]
    cold = warm(model, memory_store, rows)
    if model_type in NEEDS_SNAPSHOTS:
        assert "unequal length" in cold.reason
        return
    assert warm(model, memory_store, rows).cached_tokens == 59
    # One column for both rows, and never inside an image of either: the longer row's first ends at 26.
    shorter = [IN_TEXT, [*SYSTEM, SECOND, *MIDDLE, OTHER, *range(30, 51)]]
    assert warm(model, memory_store, shorter).cached_tokens == 26


@TYPES
def test_a_conversation_that_adds_images(image_models, memory_store, model_type):
    model = image_models(model_type)
    cache = GhostCache(model, memory_store)
    first = [*SYSTEM, FIRST, *MIDDLE]
    answer = generate(model, [first], cache)[0][0, 36:].tolist()
    second = [*first, *answer, *range(40, 50), SECOND, *range(50, 56)]
    assert_same(generate(model, [second], cache), generate(model, [second]))
    assert cache.report.cached_tokens >= 32
    third = [*second, *range(60, 66)]
    assert_same(generate(model, [third], cache), generate(model, [third]))
    assert cache.report.cached_tokens >= 48


@TYPES
def test_under_attach_with_and_without_images(image_models, memory_store, model_type):
    model = image_models(model_type)
    text = list(range(2, 60))
    cold = [generate(model, [prompt]) for prompt in (PROMPT, text)]
    with ghostcacher.attach(model, memory_store) as attached:
        for _ in range(2):
            for prompt, expected in zip((PROMPT, text), cold, strict=True):
                assert_same(generate(model, [prompt]), expected)
                memory_store.flush()
    cached = [report.cached_tokens for report in attached.reports]
    assert cached[0] == 0
    assert cached[1] == (0 if model_type in NEEDS_SNAPSHOTS else len(SYSTEM) - 1)
    assert min(cached[2:]) >= 48


@TYPES
def test_other_ways_of_generating(image_models, memory_store, model_type):
    model = image_models(model_type)
    options = [{"do_sample": True, "top_k": 20}]
    if model_type not in NEEDS_SNAPSHOTS:
        options.append({"prompt_lookup_num_tokens": 3})
    if cache_name(model) == "cache":
        options.append({"prefill_chunk_size": 20})
    for given in options:
        for _ in range(2):
            torch.manual_seed(3)
            cold = generate(model, [PROMPT], **given)
            torch.manual_seed(3)
            assert_same(generate(model, [PROMPT], GhostCache(model, memory_store), **given), cold)
            memory_store.flush()
    assert warm(model, memory_store, [IN_TEXT]).cached_tokens >= 48


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "gemma3"])
def test_static_caches_under_attach(image_models, memory_store, model_type):
    model = image_models(model_type)
    options = {"cache_implementation": "static", "disable_compile": True}
    cold = generate(model, [IN_TEXT], **options)
    warm(model, memory_store, [PROMPT])
    with ghostcacher.attach(model, memory_store) as attached:
        assert_same(generate(model, [IN_TEXT], **options), cold)
    assert [report.cached_tokens for report in attached.reports] == [55]


def test_videos(image_models, memory_store):
    """A video is placeholders too; before 5.24 its pixels reach the forward, and are not read."""
    model = image_models("qwen2_vl")

    def run(seed, cache=None):
        pixels = torch.randn((32, 1176), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        pixels = pixels.to(torch.get_default_device())
        ids = torch.tensor([[*range(2, 23), IMAGE_START, *[VIDEO_TOKEN] * 8, *range(30, 50)]])
        given = {} if cache is None else {cache_name(model): cache}
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), pixel_values_videos=pixels, max_new_tokens=6, do_sample=False,
            video_grid_thw=torch.tensor([[2, 4, 4]]), mm_token_type_ids=(ids == VIDEO_TOKEN).int() * 2, **given,
        )  # fmt: skip

    cached = []
    for seed in (1, 1, 2):
        cache = GhostCache(model, memory_store)
        assert torch.equal(run(seed, cache), run(seed))
        memory_store.flush()
        cached.append(cache.report.cached_tokens)
    assert cached == ([0, 49, 22] if cache_name(model) == "cache" else [0, 0, 0])


def test_a_forward_without_positions_is_not_served_where_the_model_remembers_some(image_models, memory_store):
    """After a prompt with images, Qwen's forward adds that prompt's offset to whatever has a filled cache."""
    model = image_models("qwen2_vl")
    ids = torch.tensor([list(range(2, 50))])
    name = cache_name(model)

    def last_logits(**given):
        with torch.no_grad():
            return model(ids, use_cache=True, logits_to_keep=1, return_dict=True, **given).logits

    cold = last_logits()
    generate(model, [PROMPT])
    for _ in range(2):
        cache = GhostCache(model, memory_store)
        torch.testing.assert_close(last_logits(**{name: cache}), cold)
        assert cache.report.reason.startswith("bypass: no position_ids")
        memory_store.flush()


def test_media_that_cannot_be_told_runs_cold(image_models, memory_store):
    model = image_models("gemma3")
    inputs = image_inputs(model, [list(range(2, 50))])
    inputs["token_type_ids"][0, 5] = 1
    cache = GhostCache(model, memory_store)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, **{cache_name(model): cache})
    assert torch.equal(out, expected)
    assert cache.report.reason == "bypass: token types other than 0 outside of media"


def test_a_type_not_proven_with_images_says_so(image_models, memory_store, monkeypatch):
    monkeypatch.setattr(table, "WITH_IMAGES", frozenset())
    model = tiny_image_model("llava")
    cache = GhostCache(model, memory_store)
    assert_same(generate(model, [PROMPT], cache), generate(model, [PROMPT]))
    assert cache.report.reason.startswith("bypass: images are not proven for this model type")
