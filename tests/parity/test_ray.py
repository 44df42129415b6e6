"""A local Ray cluster: two replicas, or two workers of a dataset, share one store."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason='Ray: pip install "ghostcacher[ray]"')
pytest.importorskip("ray.serve", reason='Ray: pip install "ghostcacher[ray]"')
pytestmark = [pytest.mark.launched, pytest.mark.filterwarnings("ignore")]  # Ray's own, of many kinds
TEXT = "".join(chr(97 + number * number % 26) for number in range(400))


def loader(*, is_patient=True):
    """Made here so that Ray sends it by value: its workers do not import the tests, nor what tests/conftest.py sets."""

    def load():
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        from ghostcacher import gate
        from ghostcacher.testing.models import tiny_model

        if is_patient:
            gate.GRACE_SECONDS, gate.GRACE_SHARE = 30.0, float("inf")
        torch.set_num_threads(1)
        words = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token=" "))
        words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        return tiny_model("llama"), PreTrainedTokenizerFast(tokenizer_object=words)

    return load


@pytest.fixture(scope="module")
def cluster():
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    ray.init(
        num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected():
    """What a cold model answers, by prompt."""
    model, tokenizer = loader(is_patient=False)()

    def answer(prompt, new=4):
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**given, do_sample=False, max_new_tokens=new)
        return tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def test_two_replicas_share_a_store(cluster, expected, tmp_path):
    from ray import serve

    from ghostcacher.integrations.ray import deployment

    store = {"directory": str(tmp_path / "blocks"), "memory": "64MiB", "block_tokens": 16}
    handle = serve.run(deployment(loader(), store, generate={"max_new_tokens": 4}))
    try:
        first = handle.remote(TEXT + " one").result(timeout_s=120)
        assert first["cached_tokens"] == 0
        assert first["text"] == expected(TEXT + " one")
        time.sleep(5)  # replicas say every two seconds what they hold
        for letter in "abc":
            alone = handle.remote(f"{TEXT} {letter}").result(timeout_s=120)
            assert alone["tier"] == "memory"  # the replica that has it near takes it
            time.sleep(0.5)  # the router learns a moment later that it is idle again
        answers = [handle.remote(f"{TEXT} {number}") for number in range(8)]
        results = [answer.result(timeout_s=120) for answer in answers]
        assert [result["text"] for result in results] == [expected(f"{TEXT} {number}") for number in range(8)]
        assert all(result["cached_tokens"] >= 400 for result in results)
        # Eight at once: the idle replica takes some of them, and finds on disk what the other one stored.
        assert {"memory", "disk"} <= {part for result in results for part in result["tier"].split("+")}
    finally:
        serve.shutdown()


@pytest.mark.slow
def test_a_dataset_is_answered_in_its_order(cluster, expected, tmp_path):
    from ghostcacher.integrations.ray import GenerateBatch

    prompts = [f"{TEXT[:200]} {number}" for number in (3, 1, 2, 0)]
    given = {
        "load": loader(), "store": {"directory": str(tmp_path / "blocks"), "block_tokens": 16},
        "generate": {"max_new_tokens": 4},
    }  # fmt: skip
    dataset = ray.data.from_items([{"prompt": prompt} for prompt in prompts])
    stage = dataset.map_batches(GenerateBatch, fn_constructor_kwargs=given, concurrency=1, batch_size=4, num_cpus=1)
    rows = stage.take_all()
    assert [row["prompt"] for row in rows] == prompts
    assert [row["answer"] for row in rows] == [expected(prompt) for prompt in prompts]
    assert sum(row["cached_tokens"] >= 200 for row in rows) == 3
    assert rows[3]["cached_tokens"] == 0
