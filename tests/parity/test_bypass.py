"""Every call that must not be served runs cold and right, and says why."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.testing.models import random_prompt, tiny_model

PROMPT = random_prompt(40, seed=1)


def warmed(model, store, generate):
    generate(model, PROMPT, GhostCache(model, store))
    store.flush()


CALLS = {
    "hidden states or attentions are wanted": {"output_hidden_states": True, "return_dict_in_generate": True},
    "mask with holes or right padding": {"attention_mask": torch.tensor([[1] * 10 + [0] * 3 + [1] * 27])},
}


@pytest.mark.parametrize("reason", CALLS)
def test_f54_calls_that_are_not_served(llama, store, generate, reason):
    warmed(llama, store, generate)
    options = CALLS[reason]
    expected = generate(llama, PROMPT, **options)
    cache = GhostCache(llama, store)
    out = generate(llama, PROMPT, cache, **options)
    assert torch.equal(getattr(out, "sequences", out), getattr(expected, "sequences", expected))
    assert cache.report.reason == f"bypass: {reason}"
    assert cache.report.cached_tokens == 0


TOKEN_TYPES = {
    "gpt2": ("bypass: argument 'token_type_ids'", "bypass: argument 'token_type_ids'"),
    "bert": ("hit", "bypass: token types other than 0 outside of media"),
}


@pytest.mark.parametrize("model_type", TOKEN_TYPES)
def test_token_types_change_the_state(models, store, generate, model_type):
    """GPT-2 adds an embedding even for types of 0; to BERT none are 0."""
    model = models(model_type)
    warmed(model, store, generate)
    for types, reason in enumerate(TOKEN_TYPES[model_type]):
        given = {"token_type_ids": torch.full_like(PROMPT, types)}
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, PROMPT, cache, **given), generate(model, PROMPT, **given))
        assert cache.report.reason == reason


def test_inputs_embeds(llama, store, generate):
    warmed(llama, store, generate)
    embeds = llama.get_input_embeddings()(PROMPT)
    ask = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(PROMPT)}
    expected = llama.generate(**ask, max_new_tokens=8, do_sample=False)
    cache = GhostCache(llama, store)
    name = ghostcacher_name(llama)
    for _ in range(2):
        out = llama.generate(**ask, max_new_tokens=8, do_sample=False, **{name: cache})
        assert torch.equal(out, expected)
        assert cache.report.reason == "bypass: inputs_embeds"
    assert torch.equal(generate(llama, PROMPT, cache), generate(llama, PROMPT))


def ghostcacher_name(model):
    from ghostcacher.adapters.calls import CallReader

    return CallReader(model).cache_name


def test_a_bare_forward_that_wants_all_logits(llama, store, generate):
    warmed(llama, store, generate)
    with torch.no_grad():
        expected = llama(PROMPT).logits
        cache = GhostCache(llama, store)
        out = llama(PROMPT, **{ghostcacher_name(llama): cache}).logits
    assert torch.equal(out, expected)
    assert "logits" in cache.report.reason


def test_a_bare_forward_with_gradients(llama, store, generate):
    warmed(llama, store, generate)
    cache = GhostCache(llama, store)
    out = llama(PROMPT, **{ghostcacher_name(llama): cache}, logits_to_keep=1).logits
    out.sum().backward()
    assert cache.report.reason == "bypass: gradients are on"
    llama.zero_grad()


def test_positional_arguments_are_seen(llama, store, generate):
    warmed(llama, store, generate)
    cache = GhostCache(llama, store)
    with torch.no_grad():
        expected = llama(PROMPT, logits_to_keep=1).logits
        out = llama(PROMPT, None, None, cache, logits_to_keep=1, use_cache=True).logits
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < 1e-5
    assert cache.report.cached_tokens == 39


def test_training_mode_with_dropout(store, generate):
    model = tiny_model("gpt2", resid_pdrop=0.1)
    warmed(model, store, generate)
    model.train()
    cache = GhostCache(model, store)
    generate(model, PROMPT, cache)
    assert cache.report.reason == "bypass: training with dropout or gradient checkpointing"
    store.flush()
    model.eval()
    assert torch.equal(generate(model, PROMPT, GhostCache(model, store)), generate(model, PROMPT))


def test_training_mode_without_dropout_is_served(store, generate):
    model = tiny_model("llama", seed=5).train()
    expected = generate(model, PROMPT)
    warmed(model, store, generate)
    cache = GhostCache(model, store)
    assert torch.equal(generate(model, PROMPT, cache), expected)
    assert cache.report.cached_tokens == 39


def test_hooks_on_layers_are_not_trusted(llama, store, generate):
    warmed(llama, store, generate)
    handle = llama.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    cache = GhostCache(llama, store)
    assert torch.equal(generate(llama, PROMPT, cache), generate(llama, PROMPT))
    handle.remove()
    assert cache.report.reason == "bypass: hooks on the model's layers"


def test_disabled_by_the_environment(llama, store, generate, monkeypatch):
    warmed(llama, store, generate)
    monkeypatch.setenv("GHOSTCACHER_DISABLE", "1")
    cache = GhostCache(llama, store)
    assert torch.equal(generate(llama, PROMPT, cache), generate(llama, PROMPT))
    assert cache.report.reason == "bypass: GHOSTCACHER_DISABLE is set"


def test_padded_rows_of_a_type_that_counts_from_the_past_run_cold(store, generate):
    model = tiny_model("bart", d_model=64, num_hidden_layers=2, decoder_layers=2, decoder_attention_heads=4,
                       decoder_ffn_dim=96, encoder_layers=2, is_encoder_decoder=False, is_decoder=True)  # fmt: skip
    ids = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), PROMPT[:, :20]], 1), PROMPT[:, :25]])
    mask = (ids != 0).long()
    expected = generate(model, ids, attention_mask=mask)
    for _ in range(2):
        cache = GhostCache(model, store)
        assert torch.equal(generate(model, ids, cache, attention_mask=mask), expected)
        assert "padded" in cache.report.reason


def test_types_outside_the_table_are_certified(store, generate):
    model = tiny_model("qwen2")
    warmed(model, store, generate)
    cache = GhostCache(model, store)
    assert torch.equal(generate(model, PROMPT, cache), generate(model, PROMPT))
    assert cache.report.cached_tokens == 39


class Forgetful(LlamaForCausalLM):
    """A model type that nobody proved, and whose restored state is not as good as computed: it peeks at lengths."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits + input_ids.shape[1] * torch.arange(out.logits.shape[-1]) * 0.01
        return out


def test_f21_a_type_that_fails_its_probe_is_refused(store, generate):
    donor = tiny_model("llama")
    config = LlamaConfig(**donor.config.to_dict())
    config.model_type = "forgetful"
    model = Forgetful(config).eval()
    cache = GhostCache(model, store)
    expected = generate(model, PROMPT)
    for _ in range(2):
        assert torch.equal(generate(model, PROMPT, cache), expected)
        assert cache.report.reason.startswith("bypass: a probe")


def test_f21_models_that_cannot_take_a_cache_are_refused_by_name(store):
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ghostcacher.UnsupportedModelError, match="encoder-decoder"):
        GhostCache(t5, store)
    gpt = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("openai-gpt", n_embd=16, n_layer=1, n_head=2, vocab_size=64)
    )
    with pytest.raises(ghostcacher.UnsupportedModelError, match="openai-gpt"):
        GhostCache(gpt, store)
    with pytest.raises(ghostcacher.UnsupportedModelError, match="int"):
        GhostCache(3, store)


def test_f54_custom_positions_run_cold(llama, store, generate):
    warmed(llama, store, generate)
    cache = GhostCache(llama, store)
    positions = torch.arange(40)[None] * 2
    name = ghostcacher_name(llama)
    ask = {"input_ids": PROMPT, "position_ids": positions, "logits_to_keep": 1, "use_cache": True}
    with torch.no_grad():
        expected = llama(**ask, **{name: DynamicCache(config=llama.config)}).logits
        out = llama(**ask, **{name: cache}).logits
    assert torch.equal(out, expected)
    assert cache.report.reason == "bypass: custom position_ids"
