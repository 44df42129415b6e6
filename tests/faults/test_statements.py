"""An exception at any line of ours that a call runs through: the answer is the cold one, and the next prompt hits."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.adapters.calls import Call
from ghostcacher.testing.models import random_prompt

ROOT = f"{Path(ghostcacher.__file__).parent}/"
LAYERS = ("layers.py", "window.py", "linear.py", "hybrid.py", "compressed.py", "plain.py")
"""The cache's own layers: what fails there fails in the model's forward, and passes through."""
FIRST = {"__call__", "before", "after", "walk", "walk_together"}
DECIDING = {"_path", "_goes_on", "_votes", "past", "past_of", "read"}
"""Before it is known what the cache holds, an error is the call's if it holds anything: never a wrong token.

``FIRST`` are errors at a line that only begins: `try`, a call.
"""
PROMPT = random_prompt(100, seed=3)


class InjectedError(Exception):
    pass


class Injector:
    """Raises at the ``at``-th line that this thread runs in the package. Leaves ``with`` alone.

    A ``with`` line is told of once more on leaving, before the lock is given back: an error there is one that no code
    of ours can have.
    """

    def __init__(self, at):
        self.at, self.lines, self.stack = at, 0, []

    def __enter__(self):
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _enter(self, frame, event, argument):
        path = frame.f_code.co_filename
        is_ours = path.startswith(ROOT) and not path.endswith(LAYERS) and "/testing/" not in path
        return self._line if is_ours and path != f"{ROOT}cache.py" else None

    def _line(self, frame, event, argument):
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not source.startswith("with "):
            self.lines += 1
            if self.lines == self.at:
                while frame is not None:
                    self.stack.append(frame.f_code.co_name)
                    frame = frame.f_back
                raise InjectedError("injected")
        return self._line


def run(generate, model, store, at, prompt=PROMPT):
    """Answer, report and injector of one prompt; the answer is None if the error came through."""
    cache = GhostCache(model, store)
    injector = Injector(at)
    try:
        with injector:
            out = generate(model, prompt, cache, new=3)
    except InjectedError:
        out = None
    return out, cache, injector


def every(step, generate, model, folder, prompt=PROMPT):
    """Inject at every ``step``-th line of a warm prompt; how often the error came through, and where."""
    expected, came_through = generate(model, prompt, new=3), []
    with ghostcacher.open_store(folder, memory=None, block_tokens=16) as store:
        run(generate, model, store, 0, prompt)
        store.flush()
        _, hit, whole = run(generate, model, store, 0, prompt)
        for at in range(1, whole.lines + 1, step):
            out, cache, injector = run(generate, model, store, at, prompt)
            if out is None:
                came_through.append(injector.stack)
            else:
                assert torch.equal(out, expected), injector.stack
            if at % (step * 20) == 1:  # the same object again, and another one
                assert torch.equal(generate(model, prompt, cache, new=3), expected)
                again = run(generate, model, store, 0, prompt)[1].report
                assert again.cached_tokens == hit.report.cached_tokens > 90
    return whole.lines, came_through


def check(lines, came_through):
    assert lines > 1000
    unexpected = [stack[:8] for stack in came_through if stack[0] not in FIRST and not DECIDING & set(stack)]
    assert not unexpected


@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_f52_an_error_at_a_line_of_ours_is_a_cold_run(model_type, models, generate, tmp_path, record_property):
    lines, came_through = every(149, generate, models(model_type), tmp_path / "d")
    check(lines, came_through)
    record_property("trials", lines // 149)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "lfm2"])
def test_f52_an_error_at_every_line_of_ours_is_a_cold_run(model_type, models, generate, tmp_path, record_property):
    lines, came_through = every(1, generate, models(model_type), tmp_path / "d")
    check(lines, came_through)
    record_property("trials", lines)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "lfm2"])
@pytest.mark.parametrize("door", ["own", "attach"])
def test_what_was_restored_is_taken_back_if_the_call_cannot_be_cut(
    door, model_type, models, generate, tmp_path, monkeypatch
):
    model, cut = models(model_type), Call.without_first
    expected, failed = generate(model, PROMPT, new=3), []

    def failing(self, columns):
        failed.append(columns)
        raise InjectedError("after the cache was filled")

    with ghostcacher.open_store(tmp_path / "d", memory=None, block_tokens=16) as store:
        run(generate, model, store, 0)
        store.flush()
        monkeypatch.setattr(Call, "without_first", failing)
        if door == "own":
            cache = GhostCache(model, store)
            assert torch.equal(generate(model, PROMPT, cache, new=3), expected)
        else:
            with ghostcacher.attach(model, store):
                assert torch.equal(generate(model, PROMPT, new=3), expected)
        assert failed[0] > 90
        monkeypatch.setattr(Call, "without_first", cut)
        assert run(generate, model, store, 0)[1].report.cached_tokens > 90


def test_a_strict_store_raises_what_goes_wrong(models, generate, tmp_path):
    model = models("llama")
    with ghostcacher.open_store(tmp_path / "d", memory=None, block_tokens=16, strict=True) as store:
        raised = [run(generate, model, store, at)[0] is None for at in range(500, 1500, 100)]
    assert any(raised)


def test_f52_an_observer_that_fails_has_no_say_in_the_answer(models, generate, tmp_path):
    model = models("llama")
    with ghostcacher.open_store(tmp_path / "d", memory=None, block_tokens=16) as store:
        store.observers.append(lambda event: 1 / 0)
        for _ in range(2):
            assert torch.equal(generate(model, PROMPT, GhostCache(model, store)), generate(model, PROMPT))
