"""What each codec takes on a GPU: from a block's bytes in RAM, verified, to its place among the model's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from workbench import Bench, median, seconds_of

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.blocks import KVBlock
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.registry import codec_named
from ghostcacher.codecs.safetensors_format import CodecChain, decode_blob
from ghostcacher.codecs.scratch import Scratch
from ghostcacher.codecs.tables import Table, Tables

CODECS = ("raw", "raw.z", "int8", "int4", "ec(0.25)", "ec(0.5)")
TURNED = "kvt, as fine as ec(0.25)"
BLOCK_TOKENS = 128
STEP = 0.25
"""Of `kvt`, in units of the state's spread: its tables are turned at random here, and show times alone."""


@dataclass(frozen=True)
class Decoded:
    """A block in one codec: its bytes, those of its state, and how long they take."""

    name: str
    size_bytes: int
    state_bytes: int
    seconds: float

    def in_markdown(self, raw: Decoded) -> str:
        """With the state's bytes per second, and the time against that of ``raw``."""
        rate = self.state_bytes / self.seconds / 1e9
        columns = [self.name, f"{self.size_bytes / 1e6:.2f}", f"{1e3 * self.seconds:.2f}", f"{rate:.1f}"]
        return f"| {' | '.join([*columns, f'{self.seconds / raw.seconds:.2f}'])} |"


def decoded(bench: Bench, rounds: int) -> list[str]:
    """A table of all codecs on one block of what ``bench`` computes."""
    block = block_of(bench)
    named = {name: codec_named(name) for name in CODECS} | {TURNED: turned_at_random(block)}
    found = [restored(name, codec, block, rounds) for name, codec in named.items()]
    head = ["| codec | MB | ms | GB/s of state | over raw |", "|---|--:|--:|--:|--:|"]
    return [*head, *(each.in_markdown(found[0]) for each in found)]


def block_of(bench: Bench) -> KVBlock:
    """One whole block."""
    with ghostcacher.open_store(memory="2GiB", disk=None, block_tokens=BLOCK_TOKENS) as store:
        bench.generate(bench.text[:, : 2 * BLOCK_TOKENS + 20], GhostCache(bench.model, store))
        store.flush()
        tier: Any = store.tiers[0]
        return next(tier.get(key) for key in tier.entries() if key.length == BLOCK_TOKENS)


def turned_at_random(block: KVBlock) -> KvtCodec:
    """`kvt` with a basis a head, as wide models have it."""
    tables = {}
    for group, tensor in zip(block.layout.groups, block.tensors, strict=True):
        layers, heads, _, channels = tensor.shape
        basis = torch.linalg.qr(torch.randn(layers, heads, channels, channels))[0]
        spread = tensor.float().std(dim=2).view(layers, -1)
        tables[group.name] = Table.of(torch.zeros(layers, heads * channels), basis, spread)
    spreads = torch.cat([table.spread.flatten() for table in tables.values()])
    return KvtCodec(STEP * float(spreads.mean()), Tables(tables, block.layout.rotation, ()))


def restored(name: str, codec: Any, block: KVBlock, rounds: int) -> Decoded:
    """Verified, decoded on the GPU and copied to where state lies, again and again."""
    blob = bytearray(b"".join(CodecChain(codec).encode(block)))
    places = [torch.empty_like(tensor, device="cuda") for tensor in block.tensors]
    scratch = Scratch("cuda")

    def restore() -> None:
        scratch.reuse()
        found = decode_blob(blob, block.key, block.layout, find=lambda _: lambda **_: codec, room=scratch)
        for place, tensor in zip(places, found.tensors, strict=True):
            place.copy_(tensor)

    times = [seconds_of(restore) for _ in range(4 * rounds)]
    return Decoded(name, len(blob), block.size_bytes, median(times))
