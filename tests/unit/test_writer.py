from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from ghostcacher.tiers.writer import Job, Writer


@pytest.fixture
def events():
    return []


@pytest.fixture
def writer(events):
    made = Writer(1000, events.append)
    yield made
    made.close()


def test_jobs_run_in_order_on_one_other_thread(writer):
    seen = []
    for number in range(50):
        writer.submit(Job(lambda number=number: seen.append((number, threading.get_ident())), 1))
    assert writer.drain(10)
    assert [number for number, _ in seen] == list(range(50))
    assert {ident for _, ident in seen} != {threading.get_ident()}
    assert len({ident for _, ident in seen}) == 1


def test_it_outlives_a_job_that_raises(writer, events):
    seen = []
    writer.submit(Job(lambda: 1 / 0, 1))
    writer.submit(Job(lambda: seen.append("after"), 1))
    assert writer.drain(10)
    assert seen == ["after"]
    assert (writer.failed, writer.is_healthy) == (1, True)
    assert "ZeroDivisionError" in events[0].reason


def test_f34_a_full_queue_drops_with_a_count_and_returns_at_once(writer, events):
    release = threading.Event()
    writer.submit(Job(release.wait, 900))
    while writer._jobs:
        time.sleep(0.01)
    assert writer.submit(Job(lambda: None, 90))
    started = time.monotonic()
    assert not writer.submit(Job(lambda: None, 90))
    assert time.monotonic() - started < 0.5
    release.set()
    assert writer.drain(10)
    assert writer.dropped == 1
    assert events[0].reason == "backpressure"
    assert writer.submit(Job(lambda: None, 90))


def test_one_job_larger_than_the_limit_is_still_run(writer):
    done = threading.Event()
    assert writer.submit(Job(done.set, 10**9))
    assert done.wait(10)


def test_draining_is_bounded(writer):
    release = threading.Event()
    writer.submit(Job(release.wait, 1))
    assert not writer.drain(0.05)
    release.set()
    assert writer.drain(10)


def killed():
    raise SystemExit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is killed
def test_f65_a_thread_that_is_killed_is_started_again(writer):
    seen = []
    writer.submit(Job(lambda: seen.append(1), 1))
    writer.drain(10)
    thread, writer._next = writer._thread, killed
    thread.join(10)
    assert not writer.is_healthy
    del writer._next
    writer.submit(Job(lambda: seen.append(2), 1))
    assert writer.drain(10)
    assert (seen, writer.is_healthy) == ([1, 2], True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is killed
def test_f65_what_a_killed_thread_left_queued_is_run(writer):
    release, seen = threading.Event(), []
    writer.submit(Job(release.wait, 1))
    writer.submit(Job(lambda: seen.append(1), 1))
    thread, writer._next = writer._thread, killed
    release.set()
    thread.join(10)
    assert (seen, writer.queued, writer.is_healthy) == ([], 1, False)
    del writer._next
    is_drained = writer.drain(5)
    writer.submit(Job(lambda: None, 1))  # whatever came of it, the fixture's end finds a thread
    assert is_drained
    assert seen == [1]


def test_f65_a_job_that_would_end_the_thread_ends_itself(writer, events):
    seen = []
    writer.submit(Job(killed, 1))
    writer.submit(Job(lambda: seen.append(1), 1))
    assert writer.drain(10)
    assert (seen, writer.failed, writer.is_healthy) == ([1], 1, True)
    assert "SystemExit" in events[0].reason


def test_after_close_jobs_are_refused(events):
    writer = Writer(1000, events.append)
    writer.submit(Job(lambda: None, 1))
    writer.close()
    assert not writer.submit(Job(lambda: None, 1))
    assert writer._thread is not None
    assert not writer._thread.is_alive()


EXIT = """
import time
from ghostcacher.tiers.writer import Job, Writer
writer = Writer(10**9, lambda event: None)
for _ in range(1000):
    writer.submit(Job(lambda: (time.sleep({seconds}), print("x", end="", flush=True)), 1))
"""


def run_and_exit(seconds):
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", EXIT.format(seconds=seconds)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return len(done.stdout), time.monotonic() - started


def test_f33_exit_drains_what_is_quick():
    assert run_and_exit(0.0001)[0] == 1000


def test_f33_exit_never_hangs_on_what_is_slow():
    done, seconds = run_and_exit(0.05)
    assert 5 < done < 1000
    assert seconds < 20


def test_f62_a_forked_child_begins_with_an_empty_queue(writer):
    release = threading.Event()
    writer.submit(Job(release.wait, 1))
    child = os.fork()
    if child == 0:
        seen = []
        writer.submit(Job(lambda: seen.append(1), 1))
        os._exit(0 if writer.drain(10) and seen == [1] else 1)
    _, status = os.waitpid(child, 0)
    release.set()
    assert os.waitstatus_to_exitcode(status) == 0
    assert writer.drain(10)
