"""One process of the demo: loads the model, asks the questions, prints its runs as one line of JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ghostcacher.cli.demo_model import Loaded, load, real_text

DOCUMENT_TOKENS = 3000
ANSWER_TOKENS = 24
QUESTIONS = (
    "In one sentence: what does the assert statement do?",
    "In one sentence: what is an assignment expression?",
)


class FirstToken:
    """A streamer that notes when the first new token came."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds = 0.0
        self._puts = 0

    def put(self, _: Any) -> None:
        """See transformers' BaseStreamer: the first call brings the prompt, the second the first token."""
        self._puts += 1
        if self._puts == 2:  # noqa: PLR2004 (see above)
            self.seconds = time.perf_counter() - self.started

    def end(self) -> None:
        """Nothing to do."""


def prompts(loaded: Loaded) -> list[Any]:
    """The document and each question, in the model's chat format: token ids ``[1, tokens]``."""
    tokenizer = loaded.tokenizer
    document = tokenizer.decode(tokenizer(real_text()).input_ids[:DOCUMENT_TOKENS])
    return [_prompt(loaded, f"Answer from this document.\n\n{document}", question) for question in QUESTIONS]


def _prompt(loaded: Loaded, system: str, question: str) -> Any:
    if getattr(loaded.tokenizer, "chat_template", None) is None:
        ids = loaded.tokenizer(f"{system}\n\nQuestion: {question}\nAnswer:", return_tensors="pt").input_ids
    else:
        chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        ids = loaded.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    return ids.to(loaded.model.device)


def answer(loaded: Loaded, ids: Any, cache: Any, name: str) -> dict[str, Any]:
    """Generate once and report, in the form that ``ghostcacher demo --format json`` prints."""
    import torch

    given = {} if cache is None else {loaded_name(loaded): cache}
    first = FirstToken()
    out = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False, streamer=first, **given
    )
    report = cache.report if cache is not None else None
    return {
        "name": name, "ttft_seconds": first.seconds, "prompt_tokens": ids.shape[1],
        "cached_tokens": report.cached_tokens if report else 0, "tier": report.tier if report else "",
        "bytes": report.bytes if report else 0, "answer_tokens": out[0, ids.shape[1] :].tolist(),
    }  # fmt: skip


def loaded_name(loaded: Loaded) -> str:
    """The keyword under which this transformers takes a cache."""
    from ghostcacher.adapters.calls import CallReader

    return CallReader(loaded.model).cache_name


def main(name: str, directory: str, model: str, fresh: str) -> None:
    """The cold process stores the first prompt and answers the others without a cache; the warm one reads."""
    from ghostcacher import GhostCache, open_store

    if fresh:
        shutil.rmtree(Path(directory), ignore_errors=True)
    loaded = load(model or None)
    runs = []
    with open_store(directory, memory=None) as store:
        for number, ids in enumerate(prompts(loaded)):
            is_stored = name == "warm" or number == 0
            cache = GhostCache(loaded.model, store) if is_stored else None
            runs.append(answer(loaded, ids, cache, name))
    sys.stdout.write(json.dumps(runs) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
