"""One store for many: remote tiers against cold and against the limit, processes that share, sealing, dead tiers.

python benchmarks/fleet.py [--write docs/benchmarks.md] [--tokens 1024] [--rounds 5]

The demo's model in fp32 on one thread. Every ratio is taken within a round; a round asks each way once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sections import replace_section
from workbench import SUFFIX_TOKENS, Bench, Limit, seconds_of

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.codecs.header import check_digest
from ghostcacher.stores.base import Store
from ghostcacher.stores.envelope import Sealing
from ghostcacher.testing import servers
from ghostcacher.testing.proxy import fault_proxy

KEY = b"k" * 32
MEGABYTE = 1e6
NAME = "0" * 64 + "/" + "1" * 64
ABOUT_REMOTES = (
    "Servers on loopback, on the same two cores; limit: reading the same bytes from the store by its client, "
    "copying them once, and answering the suffix."
)
ABOUT_PROCESSES = (
    "40 prompts each, of one of 12 documents (the n-th with weight 1/n) and a question of its own; the share of prompt "
    "tokens that were not computed."
)
WORKER = """
import sys, torch
torch.set_num_threads(1)
import ghostcacher
from ghostcacher import GhostCache, gate
from ghostcacher.testing.models import random_prompt, tiny_model
gate.GRACE_SHARE = float("inf")  # a tiny model computes faster than a disk reads: not what is measured
directory, seed = sys.argv[1], int(sys.argv[2])
model, rng = tiny_model("llama"), torch.Generator().manual_seed(seed)
asked = saved = 0
with ghostcacher.open_store(directory, memory="64MiB", block_tokens=64) as store:
    for turn in range(40):
        document = int(torch.multinomial(1 / torch.arange(1, 13).float(), 1, generator=rng))
        prompt = torch.cat([random_prompt(512, seed=document), random_prompt(32, seed=1000 * seed + turn)], dim=1)
        cache = GhostCache(model, store)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=1)
        store.flush()
        asked += cache.report.prompt_tokens
        saved += cache.report.cached_tokens
print(asked, saved)
"""


@contextlib.contextmanager
def s3(_: Path) -> Iterator[dict[str, Any]]:
    """A real server that speaks S3; its address and credentials are in the environment."""
    port = servers.free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    try:
        import s3fs

        time.sleep(4)
        s3fs.S3FileSystem().mkdir("bench")
        yield {"remote": "s3://bench/blocks"}
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def redis(folder: Path, **given: Any) -> Iterator[dict[str, Any]]:
    """One Redis."""
    with servers.redis_server(folder) as server:
        yield {"remote": server.url, **given}


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, Any]]:
    """Six nodes."""
    with servers.redis_cluster(folder) as nodes:
        yield {"remote": nodes[0].url.replace("redis://", "redis+cluster://")}


@contextlib.contextmanager
def mooncake(folder: Path) -> Iterator[dict[str, Any]]:
    """A master and a process that gives the memory."""
    with servers.mooncake_pool(folder, 512 * 2**20) as pool:
        yield {"remote": pool.url}


WAYS: dict[str, Callable[[Path], contextlib.AbstractContextManager[dict[str, Any]]]] = {
    "Redis": redis, "Redis, sealed": lambda folder: redis(folder, key=KEY), "Redis cluster": cluster,
    "Mooncake": mooncake, "S3 (moto)": s3,
}  # fmt: skip


def remote_row(bench: Bench, tokens: int, rounds: int, given: dict[str, Any]) -> list[str]:
    """One remote tier: cold over warm, and warm over the limit; both the median of ``rounds``."""
    plain = {"memory": None, "disk": None, **given}
    with ghostcacher.open_store(**plain) as store:
        bench.generate(bench.prompt(tokens, 0)[:, :tokens], GhostCache(bench.model, store))
        store.flush()
        names, size_bytes = [key.store_key for key in store.tiers[0].entries()], store.tiers[0].index.size_bytes
    limit = Limit(bench, bench.prefilled(bench.prompt(tokens, 0)[:, :tokens]), tokens)
    speedups, over_limit = [], []
    with ghostcacher.open_store(**plain) as store:
        bench.generate(bench.prompt(tokens, 1), GhostCache(bench.model, store))
        for turn in range(2, rounds + 2):
            prompt = bench.prompt(tokens, turn)
            cold = bench.first_token(prompt)
            cache = GhostCache(bench.model, store)
            warm = bench.first_token(prompt, cache)
            if cache.report.cached_tokens < tokens:
                raise SystemExit(f"only {cache.report.cached_tokens} of {tokens} tokens came back: {cache.report}")
            speedups.append(cold / warm)
            over_limit.append(warm / (reading_seconds(store.tiers[0].store, names) + limit.first_token(prompt)))
            store.flush()
    medians = [f"{statistics.median(speedups):.1f}", f"{statistics.median(over_limit):.2f}"]
    return [*medians, f"{size_bytes / MEGABYTE:.0f}"]


def reading_seconds(store: Store, names: list[str]) -> float:
    """What the store's own client takes for the bytes of ``names``, in one batch."""
    return seconds_of(lambda: store.get_many(names, limit_bytes=2**30, timeout_seconds=60.0))


def processes_row(count: int, folder: Path) -> list[str]:
    """Tokens that need no computing, of all: each process with a store of its own, and all with one."""
    shares = []
    for is_shared in (False, True):
        started = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(folder / f"{count}{'' if is_shared else number}"), str(number)],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
            for number in range(count)
        ]  # fmt: skip
        asked, saved = (sum(each) for each in zip(*(_numbers(one) for one in started), strict=True))
        shares.append(saved / asked)
    return [str(count), f"{shares[0]:.3f}", f"{shares[1]:.3f}", f"{(1 - shares[0]) / (1 - shares[1]):.2f}"]


def _numbers(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(word) for word in process.communicate()[0].split()]


def per_megabyte(work: Callable[[], object], size_bytes: int) -> float:
    """Milliseconds a megabyte: the median of 15."""
    work()
    return statistics.median(seconds_of(work) for _ in range(15)) * 1e3 / (size_bytes / MEGABYTE)


def sealing_rows(bench: Bench, folder: Path) -> list[list[str]]:
    """What verification, sealing and opening take, beside copying as many bytes."""
    with ghostcacher.open_store(folder, memory=None, block_tokens=128) as store:
        bench.generate(bench.prompt(512, 0), GhostCache(bench.model, store))
        store.flush()
        name = next(key.store_key for key in store.tiers[0].entries() if key.length == 128)
        blob = store.tiers[0].store.get_many([name], limit_bytes=2**30, timeout_seconds=1.0)[name]
    size, sealing, room = len(blob), Sealing.of(KEY), bytearray(len(blob))
    sealed = b"".join(sealing.seal(NAME, b"", blob))

    def copy() -> None:
        room[:] = blob

    costs = {
        "copying (memcpy)": copy, "verifying the digest (XXH3-128)": lambda: check_digest(blob),
        "sealing (AES-256-GCM)": lambda: sealing.seal(NAME, b"", blob),
        "opening, which verifies too": lambda: sealing.value(NAME, sealed),
    }  # fmt: skip
    measured = {name: per_megabyte(work, size) for name, work in costs.items()}
    return [[name, f"{ms:.3f}", f"{ms / measured['copying (memcpy)']:.1f}"] for name, ms in measured.items()]


def dead_row(folder: Path, bench: Bench) -> list[str]:
    """Milliseconds that a remote tier takes which accepts and never answers: the first calls, and later ones."""
    ids = bench.prompt(512, 0)[0].tolist()
    os.environ["GHOSTCACHER_REMOTE_TIMEOUT_SECONDS"] = "1"
    with servers.redis_server(folder) as server, fault_proxy(server.port) as proxy:
        proxy.fault = "blackhole"
        plain = {"memory": None, "disk": None, "remote": f"redis://127.0.0.1:{proxy.port}/0"}
        with ghostcacher.open_store(**plain) as store:
            times = [seconds_of(lambda: ghostcacher.lookup(bench.model, ids, store)) * 1e3 for _ in range(10)]
            base = statistics.median(times[5:])
        with ghostcacher.open_store(folder / "none", memory=None) as store:
            ghostcacher.lookup(bench.model, ids, store)
            without = statistics.median(
                seconds_of(lambda: ghostcacher.lookup(bench.model, ids, store)) * 1e3 for _ in range(9)
            )
    os.environ.pop("GHOSTCACHER_REMOTE_TIMEOUT_SECONDS")
    return [f"{max(times):.0f}", f"{base:.2f}", f"{without:.2f}"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown, figures to the right."""
    rule = "|" + "|".join(["---", *["--:"] * (len(head) - 1)]) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def measure(bench: Bench, tokens: int, rounds: int, folder: Path) -> str:
    """The section in Markdown."""
    remotes = []
    for number, (name, start) in enumerate(WAYS.items()):
        with start(folder / f"way{number}") as given:
            remotes.append([name, *remote_row(bench, tokens, rounds, given)])
            print(remotes[-1], flush=True)
    shared = [processes_row(count, folder) for count in (2, 4)]
    sealing, dead = sealing_rows(bench, folder / "sealing"), dead_row(folder / "dead", bench)
    return "\n\n".join([
        f"### First token from remote tiers, {tokens:,} + {SUFFIX_TOKENS} tokens",
        ABOUT_REMOTES + f" Medians of {rounds}.",
        table(["", "cold over warm", "warm over the limit", "MB"], remotes),
        "### Processes on one store",
        ABOUT_PROCESSES,
        table(["processes", "each its own store", "one store", "computed: own over shared"], shared),
        "### Sealing and verification",
        table(["a block of 128 tokens", "ms a MB", "over copying"], sealing),
        "### A remote tier that accepts and never answers",
        table(["longest call, ms (its limit: 1,000)", "later calls, ms", "the same without a remote tier, ms"], [dead]),
    ])  # fmt: skip


def main() -> None:
    """Print the section, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ghostcacher-bench-model")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        section = measure(Bench.at(chosen.folder), chosen.tokens, chosen.rounds, Path(name))
    if not chosen.write:
        print(section)
        return
    replace_section(chosen.write, "fleet", section)


if __name__ == "__main__":
    main()
