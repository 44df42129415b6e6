# /// script
# requires-python = ">=3.11"
# dependencies = ["ghostcacher", "torch", "gguf"]
# ///
"""A codec of one's own in some thirty lines, measured by the call that measures the others: 8-bit floats, which lose.

To use it by name in ``open_store``, offer the class under the entry point group ``ghostcacher.codecs``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ghostcacher.blocks import KVLayout, TensorGroup
from ghostcacher.cli.demo_model import load, real_text
from ghostcacher.codecs.base import Piece, Room, Spread, fresh, one_by_one
from ghostcacher.codecs.header import TensorField
from ghostcacher.research import evaluate

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Fp8:
    """Keys and values as float8 e4m3, one scale for each stack of layers; fit for models of plain attention."""

    name: ClassVar[str] = "fp8"
    lossy: ClassVar[bool] = True

    def parameters(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {}

    def for_layout(self, layout: KVLayout) -> Fp8:
        """Nothing to learn from the model's cache."""
        return self

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """What `encode` gives for a block of ``piece``."""
        shape = group.shape(piece.tokens)
        return TensorField(f"{group.name}.scale", "F32", (1,)), TensorField(f"{group.name}.codes", "U8", shape)

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Parts:
        """``tensor`` is ``[layers, heads, tokens, dim]``."""
        scale = tensor.abs().amax().float().clamp(min=1e-30) / 448
        codes = (tensor.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        return {f"{group.name}.scale": scale.view(1), f"{group.name}.codes": codes}

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Parts, room: Room = fresh, spread: Spread = one_by_one
    ) -> torch.Tensor:
        """Back to the shape and dtype that the layout says."""
        values = parts[f"{group.name}.codes"].view(torch.float8_e4m3fn).float() * parts[f"{group.name}.scale"]
        return room(group.shape(piece.tokens), group.spec.torch_dtype).copy_(values)


def main(model_name: str | None, prefix_tokens: int) -> None:
    """Print what it costs, beside the codec of the same size that is built in."""
    loaded = load(model_name)
    texts = [loaded.tokenizer(real_text()[:20_000], return_tensors="pt").input_ids]
    for codec in (Fp8(), "int8"):
        print(evaluate(loaded.model, codec, texts, prefix_tokens=prefix_tokens, scored_tokens=128))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prefix-tokens", type=int, default=512)
    chosen = parser.parse_args()
    main(chosen.model, chosen.prefix_tokens)
