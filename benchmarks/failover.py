"""A Redis cluster whose master is killed while prompts come: how many are not served whole, how many answered wrong.

python benchmarks/failover.py [--trials 20] [--hang]

Three masters with a replica each on loopback, which notice within a second that one is gone; ten prompts a second of a
tiny model for ten seconds, each compared with the cold answer. Five minutes. With ``--hang`` the master is halted
instead, as when a network swallows everything: nobody is told.
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
PATIENCE_SECONDS = 60.0
WATCHED_SECONDS = 10.0
REPLICATION_SECONDS = 1.5


class Trial:
    """One cluster, one prompt, asked again and again."""

    def __init__(self, *, hangs: bool) -> None:
        self.hangs = hangs
        self.model, self.prompt = tiny_model("llama"), random_prompt(200, seed=4)
        self.expected = self._generate(None)
        self.asked = self.wrong = 0

    def run(self, folder: Path) -> tuple[float, float]:
        """Seconds from the fault to the last prompt that was not served whole (0: all were), and the share of such."""
        with servers.redis_cluster(folder) as nodes:
            url = nodes[0].url.replace("redis://", "redis+cluster://")
            given = {"memory": None, "disk": None, "block_tokens": 64, "remote": url}
            with ghostcacher.open_store(**given) as store:
                self.ask(store)
            time.sleep(REPLICATION_SECONDS)
            with ghostcacher.open_store(**given) as store:  # as one that came later: a new cluster names no replicas
                whole = self.ask(store)
                holder = self._a_holder(store, nodes)
                holder.pause() if self.hangs else holder.stop()
                began, found = time.monotonic(), list[tuple[float, bool]]()
                while time.monotonic() - began < WATCHED_SECONDS:
                    is_whole = self.ask(store) >= whole
                    found.append((time.monotonic() - began, is_whole))
                    time.sleep(PAUSE_SECONDS)
            if self.hangs:
                holder.resume()
        missed = [seconds for seconds, is_whole in found if not is_whole]
        return max(missed, default=0.0), len(missed) / len(found)

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
    def _a_holder(store: ghostcacher.TierStack, nodes: list[servers.RedisServer]) -> servers.RedisServer:
        """The master that holds the first block."""
        key = next(iter(store.tiers[0].entries())).store_key
        client = store.tiers[0].store._store._store._client()
        port = client.get_node_from_key(f"ghostcacher/v1/{key}").port
        return next(node for node in nodes if node.port == port)


def main() -> None:
    """Print what the trials found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--hang", action="store_true")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # A tiny model computes faster than any store: not what is measured here.
    gate.GRACE_SECONDS, gate.GRACE_SHARE = PATIENCE_SECONDS, float("inf")
    trial, lasts, shares = Trial(hangs=chosen.hang), list[float](), list[float]()
    for number in range(chosen.trials):
        with tempfile.TemporaryDirectory() as folder:
            last, share = trial.run(Path(folder))
        lasts.append(last)
        shares.append(share)
        print(f"{number + 1}: the last miss after {last:.1f} s, {share:.0%} of the prompts", flush=True)
    spread = f"{min(lasts):.1f} to {max(lasts):.1f} s, median {statistics.median(lasts):.1f}"
    what = "masters that hang" if chosen.hang else "failovers"
    print(
        f"{chosen.trials} {what}: all prompts served whole again after {spread}; of those in the "
        f"{WATCHED_SECONDS:.0f} s {statistics.fmean(shares):.0%} were not; {trial.wrong} of {trial.asked} answers wrong"
    )


if __name__ == "__main__":
    main()
