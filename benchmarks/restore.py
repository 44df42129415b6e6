"""What restoring a prefix takes with each codec, from a directory and from Redis, and below which bandwidth it pays.

python benchmarks/restore.py [--write docs/quantisation.md] [--model NAME] [--tokens 2048]

The demo's model in bf16. Fetch, verification, decoding and placing into private buffers, as a hit does it; the median
of some rounds. A codec pays over a link if its bytes take less time, by more than decoding takes: below the bandwidth
where raw bytes saved over the link equal processor time spent, both measured here.

Then one long block alone, torch on one thread: decoded by the caller's thread, and its layers by two.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sections import replace_section

import ghostcacher
from ghostcacher.adapters.guard import ReplayCache, logits_after
from ghostcacher.adapters.landing import Landing
from ghostcacher.adapters.probe import Shape
from ghostcacher.blocks import KVBlock
from ghostcacher.cli.calibrate import built_in
from ghostcacher.cli.demo_model import Loaded, load, real_text
from ghostcacher.codecs.base import Codec, Spread, one_by_one
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.registry import codec_named, record_of
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.codecs.scratch import Scratch
from ghostcacher.codecs.spoken import spoken
from ghostcacher.codecs.tables import Tables
from ghostcacher.hooks import hooks_of
from ghostcacher.index import Candidate
from ghostcacher.keys import Namespace, PrefixChain
from ghostcacher.research import PREFIX_TOKENS, SCORED_TOKENS, calibrate
from ghostcacher.research.replay import taken
from ghostcacher.testing.servers import redis_server
from ghostcacher.tiers.readers import Readers
from ghostcacher.tiers.stack import TierStack

CODECS = ("raw", "raw.z", "int8", "int4", "ec(0.25)", "ec(0.5)", "kvt(0.25)", "kvt(0.5)")
BLOCK_TOKENS = 128
LONG_BLOCK_TOKENS = 1024
ROUNDS = 7


def restore_seconds(store: TierStack, module: torch.nn.Module, shape: Shape, chain: PrefixChain) -> float:
    """The median time of a fetch of the whole chain into private buffers."""
    keys, times = list(chain.covering(0, len(chain))), []
    for _ in range(ROUNDS):
        cache = ReplayCache(module, shape)
        landing = Landing(shape.state_of(cache.layers), shape, 1, 0, len(chain))
        landing.expect([Candidate(key, key.length) for key in keys], (0,), 0)
        began = time.perf_counter()
        fetched = store.fetch(keys, shape.layout, landing.place)
        times.append(time.perf_counter() - began)
        if len(fetched.sources) != len(keys):
            raise SystemExit(f"only {len(fetched.sources)} of {len(keys)} blocks came back")
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Row:
    """One codec: megabytes, and seconds to restore from RAM as coded, from a directory, from Redis."""

    codec: str
    megabytes: float
    memory: float
    disk: float
    redis: float

    def in_markdown(self, raw: Row) -> str:
        """With the bandwidth below which it beats ``raw``."""
        saved, spent = raw.megabytes - self.megabytes, self.memory - raw.memory
        pays = "-" if self.codec == raw.codec else "always" if spent <= 0 else f"{saved / spent / 125:.1f} Gbit/s"
        times = " | ".join(f"{1e3 * seconds:.0f}" for seconds in (self.memory, self.disk, self.redis))
        return f"| `{self.codec}` | {self.megabytes:.1f} | {times} | {pays} |"


def measure(loaded: Loaded, tokens: int, folder: Path, url: str) -> str:
    """The section: all codecs on one prefix of real text."""
    module, length = loaded.model, PREFIX_TOKENS + SCORED_TOKENS
    windows = [loaded.tokenizer(text, return_tensors="pt").input_ids[:, :length] for text in built_in()]
    tables = calibrate(module, windows[:2], codecs=())
    shape = hooks_of(module).adapter.shape
    assert shape is not None
    ids = loaded.tokenizer(real_text()[: 12 * tokens], return_tensors="pt").input_ids[:, :tokens]
    chain = PrefixChain.of(ids[0].tolist(), Namespace(bytes(32)), BLOCK_TOKENS)
    cache = ReplayCache(module, shape)
    logits_after(module, ids, cache)
    blocks, rows = taken(shape, cache, chain), []
    for codec in CODECS:
        seconds, megabytes = [], 0.0
        for number, given in enumerate(({"memory": f"4GiB:{codec}"}, {"disk": f"4GiB:{codec}"},
                                        {"remote": url, "remote_codec": codec})):  # fmt: skip
            plain = {"memory": None, "disk": None, **given}
            with ghostcacher.open_store(folder / f"{codec}{number}", block_tokens=BLOCK_TOKENS, **plain) as store:
                store.shelf.put(*tables)
                for block in blocks:
                    store.offer(block)
                seconds.append(restore_seconds(store, module, shape, chain))
                megabytes = store.stats().tiers[0].size_bytes / 1e6
                store.tiers[0].remove(chain.covering(0, len(chain)))
        rows.append(Row(codec, megabytes, *seconds))
    [long] = taken(
        shape, cache, PrefixChain.of(ids[0, :LONG_BLOCK_TOKENS].tolist(), chain.namespace, LONG_BLOCK_TOKENS)
    )
    return f"{page(rows, tokens)}\n{long_block(long, tables.tables)}"


def at_once(block: KVBlock, codec: Codec) -> str:
    """A row: ``block`` verified and decoded by this thread and by two, in turn, into memory used before."""
    blob, scratch = bytearray(b"".join(CodecChain(codec).encode(block))), Scratch()

    def seconds(spread: Spread) -> float:
        scratch.reuse()
        began = time.perf_counter()
        decode_blob(blob, block.key, block.layout, find=lambda _: lambda **_: codec, room=scratch, spread=spread)
        return time.perf_counter() - began

    two = Readers(2)
    times = [(seconds(one_by_one), seconds(two)) for _ in range(3 * ROUNDS)]
    two.close()
    alone, shared = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
    return f"| `{spoken(record_of(codec))}` | {alone:.1f} | {shared:.1f} | {alone / shared:.1f} |"


def long_block(block: KVBlock, tables: Tables) -> str:
    """What two threads gain on it, in Markdown."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    codecs = [KvtCodec(float(name[4:-1]), tables) if name.startswith("kvt(") else codec_named(name) for name in CODECS]
    # Raw is not computed at all.
    rows = [at_once(block, codec.for_layout(block.layout)) for codec in codecs if codec.name != "raw"]
    torch.set_num_threads(threads)
    head = [
        f"One block of {LONG_BLOCK_TOKENS:,} tokens, verified and decoded into RAM, torch on one thread; milliseconds.",
        "",
        "| codec | one thread | two threads | times as fast |",
        "|---|--:|--:|--:|",
    ]
    return "\n".join([*head, *rows, ""])


def page(rows: Sequence[Row], tokens: int) -> str:
    """The section in Markdown."""
    threads = torch.get_num_threads()
    head = [
        f"{tokens:,} tokens in bf16, blocks of {BLOCK_TOKENS}, {threads} threads, Redis on loopback; in milliseconds.",
        "",
        "| codec | MB | from RAM, coded | directory | Redis | pays below |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *(row.in_markdown(rows[0]) for row in rows), ""])


def main() -> None:
    """Print the section, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=2048)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    loaded = load(chosen.model, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as name, redis_server(Path(name) / "redis") as server:
        section = measure(loaded, chosen.tokens, Path(name), server.url)
    if not chosen.write:
        print(section)
        return
    replace_section(chosen.write, "restore", section)


if __name__ == "__main__":
    main()
