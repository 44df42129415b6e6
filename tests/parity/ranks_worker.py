"""One rank of a tensor-parallel model; see test_ranks.py, which starts two. Prints one JSON document per rank."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache

import ghostcacher
from ghostcacher import GhostCache, gate
from ghostcacher.path import Path
from ghostcacher.testing.models import random_prompt

MODEL, FOLDER = sys.argv[1:3]
PROMPT, OTHER = random_prompt(200, seed=4), random_prompt(150, seed=5)
OPTIONS = {"max_new_tokens": 4, "do_sample": False}
results = {}
gate.GRACE_SECONDS, gate.GRACE_SHARE = 30.0, float("inf")  # as tests/conftest.py sets it


def opened(name, **given):
    return ghostcacher.open_store(f"{FOLDER}/{name}", block_tokens=16, **{"memory": None, **given})


def run(model, ids, cache=None, **options):
    taken = {} if cache is None else {NAME: cache}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **taken, **OPTIONS, **options)[:, ids.shape[1] :].tolist()


def note(name, store, model, ids, **options):
    cache = GhostCache(model, store)
    tokens = run(model, ids, cache, **options)
    report = cache.report
    results[name] = {"tokens": tokens, "cached": report.cached_tokens, "reason": report.reason, "tier": report.tier}
    store.flush()
    return cache


def keys_of(cache):
    return [layer.keys.detach().clone() for layer in cache.layers]


dist.init_process_group("gloo")
rank = dist.get_rank()
model = AutoModelForCausalLM.from_pretrained(MODEL, tp_plan="auto", dtype=torch.float32)
NAME = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"
results["cold"] = {"tokens": run(model, PROMPT), "other": run(model, OTHER)}

with opened("one") as store:
    cold = note("first", store, model, PROMPT)
    held = keys_of(cold)
with opened("one") as store:
    warm = note("second", store, model, PROMPT)
    same = [torch.equal(a[:, :, :199], b[:, :, :199]) for a, b in zip(held, keys_of(warm), strict=True)]
    results["second"]["equal"] = all(same)
    results["shape"] = list(held[0].shape)
    # The same object again: what it holds is not taken from it, as other ranks may hold less.
    results["again"] = {"tokens": run(model, OTHER, warm), "cached": warm.report.cached_tokens}
dist.barrier()

with opened("one") as store:
    if rank == 1:
        ghostcacher.lookup(model, PROMPT[0].tolist(), store)
        late = [key for key in store.tiers[0].entries() if key.start >= 96]
        store.tiers[0].remove(late)
    note("a hole on one rank", store, model, PROMPT)
dist.barrier()
with opened("one" if rank == 0 else "empty") as store:
    note("nothing on one rank", store, model, PROMPT)

with opened("one") as store:
    if rank == 1:
        store.fetch = lambda *_, **__: 1 / 0
    note("a failing fetch on one rank", store, model, PROMPT)
with opened("one") as store:
    if rank == 1:
        kept, store.fetch = store.fetch, lambda keys, *rest, **given: kept(keys[:3], *rest, **given)
    note("a short fetch on one rank", store, model, PROMPT)
with opened("one") as store:
    if rank == 0:
        kept_expect, Path._expect = Path._expect, lambda *_, **__: 1 / 0
    note("a failure after agreeing", store, model, PROMPT)
    if rank == 0:
        Path._expect = kept_expect
    note("and then", store, model, PROMPT)
with opened("one") as store:
    if rank == 0:
        os.environ["GHOSTCACHER_DISABLE"] = "1"
    note("switched off on one rank", store, model, PROMPT)
    os.environ.pop("GHOSTCACHER_DISABLE", None)

with opened("chunks") as store, ghostcacher.attach(model, store) as attached:
    cold_chunks = run(model, PROMPT, DynamicCache(config=model.config), prefill_chunk_size=64)
    store.flush()
    warm_chunks = run(model, PROMPT, DynamicCache(config=model.config), prefill_chunk_size=64)
    results["chunks"] = {"tokens": [cold_chunks, warm_chunks], "cached": attached.reports[-1].cached_tokens}

with opened("batch") as store:
    rows = torch.cat([PROMPT[:, :150], OTHER])
    rows[0, :30] = 0
    mask = torch.ones_like(rows)
    mask[0, :30] = 0
    results["rows"] = {"cold": run(model, rows, attention_mask=mask)}
    note("padded", store, model, rows, attention_mask=mask)
    note("padded again", store, model, rows, attention_mask=mask)

with opened("budget", quality=0.01) as store:
    note("budget", store, model, PROMPT)
    results["budget"]["lossy"] = store.stats().tiers[0].certified

if len(sys.argv) > 3:
    with opened("whole") as store:
        note("blocks of the whole model", store, model, PROMPT)

dist.barrier()
pathlib.Path(f"{FOLDER}/rank{rank}.json").write_text(json.dumps(results))
dist.destroy_process_group()
