# /// script
# requires-python = ">=3.11"
# dependencies = ["ghostcacher[zstd]", "torch", "gguf"]
# ///
"""What a few codecs cost on a model and a text of yours: a table, a CSV and a plot.

python examples/quantized_research.py [--model NAME] [--text FILE …] [--codecs int8 int4 "ec(0.5)"] [--folder .]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ghostcacher.cli.demo_model import load, real_text
from ghostcacher.research import sweep


def main(model_name: str | None, files: list[Path], codecs: list[str], folder: Path, prefix_tokens: int) -> None:
    """Code the first tokens of each text, score the 128 after them."""
    loaded = load(model_name)
    texts = [file.read_text() for file in files] or [real_text()[:20_000]]
    ids = [loaded.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    measures = sweep(
        loaded.model, ids, codecs, table=folder / "codecs.csv", plot=folder / "codecs.svg",
        prefix_tokens=prefix_tokens, scored_tokens=128,
    )  # fmt: skip
    for measure in measures:
        print(measure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--codecs", nargs="+", default=["raw", "int8", "int4", "ec(0.25)", "ec(0.5)"])
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--prefix-tokens", type=int, default=512)
    chosen = parser.parse_args()
    main(chosen.model, chosen.text, chosen.codecs, chosen.folder, chosen.prefix_tokens)
