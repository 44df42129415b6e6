"""`make bench`: everything that docs/benchmarks.md quotes, in one run, as ratios.

python benchmarks/prefix.py [--write docs/benchmarks.md] [--tokens 512 1024 2048 4096] [--repeats 7]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from workbench import THREADS, Bench, Limit, TokenTimes, deepcopied, loaded_by_hand, median, save_by_hand, seconds_of

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.testing.tier import LAYOUT, blocks_of, chain_of

BUCKET = "ghostcacher-bench"


def first_tokens(bench: Bench, tokens: int, repeats: int, folder: Path, s3: str | None) -> dict[str, Any]:
    """Seconds to the first token of ``tokens`` known tokens and 32 new ones, by every way."""
    prefix = bench.text[:, :tokens]
    options = {"memory": None, "disk": None, "remote": s3}
    with (
        ghostcacher.open_store(folder / "raw", memory="3GiB") as near,
        ghostcacher.open_store(folder / "raw", memory=None) as disk,
        ghostcacher.open_store(folder / "int8", memory=None, codec="int8") as int8,
        ghostcacher.open_store(folder / "none", **options) as remote,
        ghostcacher.open_store(folder / "none", **{**options, "remote": s3 and f"{s3}-int8"}, codec="int8") as remote8,
    ):
        stores = {"memory": near, "disk": disk, "disk int8": int8, **({"S3": remote, "S3 int8": remote8} if s3 else {})}
        for store in (near, int8, remote, remote8):
            cache = GhostCache(bench.model, store)
            bench.generate(prefix, cache)
            store.flush()
            del cache
        filled = bench.prefilled(prefix)
        save_by_hand(filled, folder / "by-hand.safetensors")
        limit, runs = Limit(bench, filled, tokens), {}
        number = 0
        for _ in range(repeats):
            number += 1
            measured = {
                "limit": limit.first_token(bench.prompt(tokens, number)),
                "deepcopy": deepcopied(bench, filled, bench.prompt(tokens, number)),
                "by hand": loaded_by_hand(bench, folder / "by-hand.safetensors", bench.prompt(tokens, number)),
            }
            for name, store in stores.items():
                number += 1
                cache = GhostCache(bench.model, store)
                measured[name] = bench.first_token(bench.prompt(tokens, number), cache)
                expect(cache.report.cached_tokens >= tokens, f"{name}: {cache.report}")
                del cache
                store.flush()
            for name, value in measured.items():
                runs.setdefault(name, []).append(value)
        per_token = {"raw": bytes_per_token(near.tiers[1]), "int8": bytes_per_token(int8.tiers[0])}
    leaving = leaves_anywhere(bench, limit_at(bench, filled, tokens), tokens, folder, repeats)
    # Ratios are taken round by round, against the limit of the same round: the machine's speed drifts.
    ratios = {name: median([v / least for v, least in zip(runs[name], runs["limit"], strict=True)]) for name in runs}
    seconds = {name: median(values) for name, values in runs.items()}
    return {"seconds": seconds, "over limit": ratios, "bytes per token": per_token, "leaving": leaving}


def bytes_per_token(tier: Any) -> float:
    """Bytes of all blobs, headers too, over the tokens in them."""
    entries = tier.index.entries()
    return sum(entry.size_bytes for entry in entries) / sum(entry.key.length for entry in entries)


def limit_at(bench: Bench, filled: Any, tokens: int) -> tuple[int, Limit]:
    """A cut inside a block, and the limit for it."""
    cut = tokens - 57
    return cut, Limit(bench, filled, cut)


def leaves_anywhere(bench: Bench, at: tuple[int, Limit], tokens: int, folder: Path, repeats: int) -> float:
    """Limit over ours, for prompts that leave the stored one inside a block."""
    cut, limit = at
    ours, least = [], []
    with ghostcacher.open_store(folder / "raw", memory="3GiB") as store:
        for number in range(300, 300 + repeats + 1):
            ids = bench.prompt(cut, number)
            least.append(limit.first_token(ids))
            cache = GhostCache(bench.model, store)
            ours.append(bench.first_token(ids, cache))
            expect(cut <= cache.report.cached_tokens <= cut + 2, str(cache.report))
            del cache
            store.flush()
    expect(tokens > cut, "the cut lies inside")
    return median([a / b for a, b in zip(least[1:], ours[1:], strict=True)])


def never_seen(bench: Bench, tokens: int, repeats: int, folder: Path) -> dict[str, float]:
    """What the cache costs prompts that nobody saw before: ratios to plain generate, in turn."""
    first, total, plain = [], [], []
    with ghostcacher.open_store(folder / "unseen", memory="3GiB") as store:
        for number in range(repeats):
            ids = bench.text[:, 1000 + 700 * number : 1000 + 700 * number + tokens]
            pairs = {}
            for is_ours in sorted((False, True), reverse=number % 2 == 1):  # who goes first changes from round to round
                cache = GhostCache(bench.model, store) if is_ours else None
                times = TokenTimes()
                started = time.perf_counter()
                bench.generate(ids, cache, new=16, streamer=times)
                pairs[is_ours] = (times.times[1] - started, times.times[-1] - started)
                del cache
            plain.append(pairs[False][0])
            first.append(pairs[True][0] / pairs[False][0])
            total.append(pairs[True][1] / pairs[False][1])
            store.flush()
    return {"seconds": median(plain), "first token": median(first), "total": median(total)}


def decoding(bench: Bench, tokens: int, repeats: int, new: int = 24) -> float:
    """Time per decoded token against DynamicCache, in turn."""
    ids = bench.text[:, :tokens]
    ratios = []
    with ghostcacher.open_store(memory="3GiB", disk=None) as store:
        bench.generate(ids, GhostCache(bench.model, store))
        filled = bench.prefilled(ids[:, :-1])
        store.flush()
        for _ in range(repeats):
            steps = []
            for made in (lambda: GhostCache(bench.model, store), lambda: copied(filled)):
                times = TokenTimes()
                bench.generate(ids, made(), new=new, streamer=times)
                steps.append(times.median_step())
            ratios.append(steps[0] / steps[1])
    return median(ratios)


def copied(filled: Any) -> Any:
    """A stock cache of its own."""
    import copy

    return copy.deepcopy(filled)


def chat(bench: Bench, folder: Path, turns: int = 8, asked: int = 184, answered: int = 16) -> dict[str, float]:
    """A chat: a new GhostCache each turn against one live DynamicCache, and the bytes kept on disk."""
    live = transformers.DynamicCache(config=bench.model.config)
    sums = {"ours": 0.0, "live": 0.0}
    texts = {"ours": bench.text[:, :asked], "live": bench.text[:, :asked]}
    with ghostcacher.open_store(folder / "chat") as store:
        for turn in range(turns):
            for name in sums:
                started = time.perf_counter()
                cache = GhostCache(bench.model, store) if name == "ours" else live
                out = bench.generate(texts[name], cache, new=answered)
                sums[name] += time.perf_counter() - started
                del cache
                gc.collect()
                more = bench.text[:, 5000 + turn * asked : 5000 + (turn + 1) * asked]
                texts[name] = torch.cat([out, more], dim=1)
        expect(torch.equal(texts["ours"], texts["live"]), "both chats said the same")
        store.flush()
        kept = store.stats().tiers[1].size_bytes
    state = sum(layer.keys.nbytes + layer.values.nbytes for layer in live.layers)
    return {"time": sums["ours"] / sums["live"], "disk": kept / state}


def peak_memory(model: Path, tokens: int, folder: Path) -> dict[str, float]:
    """Peak memory of whole processes, above a plain one, in units of the prompt's state."""
    found = {name: child("memory", model, folder / "peak", tokens, name)["bytes"] for name in ("plain", "cold", "warm")}
    state = tokens * 46_080
    return {name: (found[name] - found["plain"]) / state for name in ("cold", "warm")}


def fresh_process(model: Path, tokens: int, folder: Path, processes: int = 3) -> dict[str, float]:
    """Warm from disk in processes that have just begun, against the limit in the same process."""
    found = [child("fresh", model, folder / "raw", tokens, str(number)) for number in range(processes)]
    return {
        "ratio": median([f["ours"] / f["limit"] for f in found]),
        "seconds": median([f["ours"] for f in found]),
        "making the cache": median([f["making"] for f in found]),
    }


def child(what: str, *arguments: object) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", what, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child_fresh(model: str, store: str, tokens: str, number: str) -> dict[str, float]:
    bench = Bench.at(Path(model))
    with ghostcacher.open_store(store, memory=None) as opened:
        bench.generate(bench.text[:, 20_000:20_032])  # the library's own first call is slow, whatever the cache
        made: list[Any] = []
        making = seconds_of(lambda: made.append(GhostCache(bench.model, opened)))
        ours = bench.first_token(bench.prompt(int(tokens), 400 + int(number)), made[0])
        expect(made[0].report.cached_tokens >= int(tokens), str(made[0].report))
        limit = Limit(bench, made[0], int(tokens))
        least = median([limit.first_token(bench.prompt(int(tokens), 420 + n)) for n in range(5)])
    return {"ours": ours, "limit": least, "making": making}


def child_memory(model: str, store: str, tokens: str, name: str) -> dict[str, float]:
    bench = Bench.at(Path(model))
    with ghostcacher.open_store(store, memory="3GiB") as opened:
        cache = None if name == "plain" else GhostCache(bench.model, opened)
        bench.generate(bench.text[:, : int(tokens)], cache, new=4)
        opened.flush()
        expect(name != "warm" or cache.report.cached_tokens > 0, "it was warm")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"bytes": int(status["VmHWM"].split()[0]) * 1024}


def commands(folder: Path) -> dict[str, float]:
    """Seconds of `import ghostcacher` beyond a bare Python, and of `ghostcacher ls` on 10,000 blocks."""
    bare = median([seconds_of(lambda: subprocess.run([sys.executable, "-c", ""], check=True)) for _ in range(5)])
    code = "import ghostcacher"
    ours = median([seconds_of(lambda: subprocess.run([sys.executable, "-c", code], check=True)) for _ in range(5)])
    with ghostcacher.open_store(folder / "many", memory=None, block_tokens=16) as store:
        tier = store.tiers[0]
        tier.budget_bytes = None
        for first in range(0, 10_000 * 16, 16 * 100):
            for block in blocks_of(chain_of(16 * 100, first=first)):
                store.offer(block)
    expect(LAYOUT.token_bytes() > 0, "blocks hold something")
    listing = [sys.executable, "-c", "from ghostcacher.cli import main; main()", "ls", "-d", str(folder / "many")]
    ls = median([seconds_of(lambda: subprocess.run(listing, check=True, stdout=subprocess.DEVNULL)) for _ in range(3)])
    return {"import": ours - bare, "ls": ls}


def expect(holds: object, what: str) -> None:
    """A benchmark of something else is worth nothing."""
    if not holds:
        raise SystemExit(f"not measured what was meant: {what}")


def s3_server() -> tuple[subprocess.Popen[bytes], str]:
    """A server that speaks S3, on loopback, and the environment that leads s3fs to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": endpoint}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    os.environ["GHOSTCACHER_REMOTE_TIMEOUT_SECONDS"] = "30"
    import s3fs

    for _ in range(100):
        try:
            s3fs.S3FileSystem().mkdir(BUCKET)
            break
        except Exception:  # noqa: BLE001 (not up yet)
            time.sleep(0.3)
    return server, f"s3://{BUCKET}/blocks"


def run_all(sizes: list[int], repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        bench = Bench.at(folder / "model")
        found: dict[str, Any] = {"machine": machine(), "repeats": repeats, "first": {}, "fresh": {}, "unseen": {}}
        server, url = s3_server()
        try:
            for tokens in sizes:
                place = folder / str(tokens)
                place.mkdir()
                say(f"{tokens} tokens: never seen")
                found["unseen"][tokens] = never_seen(bench, tokens, 5 if tokens <= 1024 else 3, place)
                say(f"{tokens} tokens: known")
                found["first"][tokens] = first_tokens(bench, tokens, repeats, place, f"{url}/{tokens}")
                say(f"{tokens} tokens: fresh processes")
                found["fresh"][tokens] = fresh_process(folder / "model", tokens, place)
        finally:
            server.kill()
        say("decoding")
        found["decode"] = {tokens: decoding(bench, tokens, 5) for tokens in (sizes[0], sizes[-1])}
        say("chat")
        found["chat"] = chat(bench, folder)
        say("memory")
        found["memory"] = peak_memory(folder / "model", min(2048, sizes[-1]), folder)
        say("commands")
        found["commands"] = commands(folder)
    return found


def run_one(what: str, sizes: list[int], repeats: int) -> dict[int, Any]:
    """One part alone, on an otherwise idle machine, with as many rounds as one likes."""
    with tempfile.TemporaryDirectory() as root:
        bench = Bench.at(Path(root) / "model")
        if what == "decode":
            return {tokens: decoding(bench, tokens, repeats) for tokens in sizes}
        return {tokens: never_seen(bench, tokens, repeats, Path(root) / str(tokens)) for tokens in sizes}


def machine() -> str:
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} torch thread, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def say(what: str) -> None:
    sys.stderr.write(f"{what}\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    if sys.argv[1:2] == ["--child"]:
        children = {"fresh": child_fresh, "memory": child_memory}
        print(json.dumps(children[sys.argv[2]](*sys.argv[3:])))
    else:
        from report import write

        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--write", type=Path)
        parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
        parser.add_argument("--repeats", type=int, default=7)
        parser.add_argument("--only", choices=("unseen", "decode"), help="one part alone; writes nothing")
        arguments = parser.parse_args()
        if arguments.only:
            print(json.dumps(run_one(arguments.only, arguments.tokens, arguments.repeats), indent=1))
            raise SystemExit
        results = run_all(arguments.tokens, arguments.repeats)
        print(json.dumps(results, indent=1))
        if arguments.write:
            write(results, arguments.write)
