"""A Redis cluster whose master is killed while prompts come: how long until whole hits are back, how many were wrong.

python benchmarks/failover.py [--trials 20]

Three masters with a replica each on loopback, which notice within a second that one is gone; ten prompts a second of a
tiny model, each compared with the cold answer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

import ghostcacher
from ghostcacher import GhostCache, gate
from ghostcacher.testing import servers
from ghostcacher.testing.models import random_prompt, tiny_model

PAUSE_SECONDS = 0.1
LONGEST_SECONDS = 60.0
REPLICATION_SECONDS = 1.5


class Trial:
    """One cluster, one prompt, asked again and again."""

    def __init__(self) -> None:
        self.model, self.prompt = tiny_model("llama"), random_prompt(200, seed=4)
        self.expected = self._generate(None)
        self.asked = self.wrong = 0

    def run(self, folder: Path) -> float:
        """Seconds from the kill to the first prompt that is served whole."""
        with servers.redis_cluster(folder) as nodes:
            url = nodes[0].url.replace("redis://", "redis+cluster://")
            with ghostcacher.open_store(memory=None, disk=None, block_tokens=64, remote=url) as store:
                self.ask(store)
                store.flush()
                time.sleep(REPLICATION_SECONDS)
                whole = self.ask(store)
                self._kill_a_holder(store, nodes)
                began = time.monotonic()
                while self.ask(store) < whole and time.monotonic() - began < LONGEST_SECONDS:
                    time.sleep(PAUSE_SECONDS)
                return time.monotonic() - began

    def ask(self, store: ghostcacher.TierStack) -> int:
        """Cached tokens of one prompt, whose answer is compared."""
        cache = GhostCache(self.model, store)
        self.wrong += not torch.equal(self._generate(cache), self.expected)
        self.asked += 1
        return cache.report.cached_tokens

    def _generate(self, cache: GhostCache | None) -> torch.Tensor:
        given = {} if cache is None else {"past_key_values": cache}
        mask = torch.ones_like(self.prompt)
        return self.model.generate(self.prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, **given)

    @staticmethod
    def _kill_a_holder(store: ghostcacher.TierStack, nodes: list[servers.RedisServer]) -> None:
        """The master that holds the first block."""
        key = next(iter(store.tiers[0].entries())).store_key
        client = store.tiers[0].store._store._store._client()
        port = client.get_node_from_key(f"ghostcacher/v1/{key}").port
        next(node for node in nodes if node.port == port).stop()


def main() -> None:
    """Print what the trials found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gate.GRACE_SECONDS = LONGEST_SECONDS  # a tiny model computes faster than any store: not what is measured here
    trial, seconds = Trial(), []
    for number in range(chosen.trials):
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(trial.run(Path(folder)))
        print(f"{number + 1}: {seconds[-1]:.1f} s", flush=True)
    spread = f"{min(seconds):.1f} to {max(seconds):.1f} s, median {statistics.median(seconds):.1f}"
    print(f"{chosen.trials} failovers: whole hits back after {spread}; {trial.wrong} of {trial.asked} answers wrong")


if __name__ == "__main__":
    main()
