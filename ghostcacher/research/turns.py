"""A conversation whose every turn goes on from what was stored: whether the cost of a codec grows with the turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ghostcacher.adapters.base import base_module
from ghostcacher.adapters.guard import ReplayCache, logits_after
from ghostcacher.adapters.probe import Shape, input_device, shape_of
from ghostcacher.adapters.rerun import taken
from ghostcacher.blocks import KVBlock
from ghostcacher.codecs.base import TensorCodec
from ghostcacher.codecs.quality import divergence
from ghostcacher.codecs.registry import codec_named
from ghostcacher.errors import ConfigurationError
from ghostcacher.keys import Namespace, PrefixChain
from ghostcacher.research.evaluate import coded
from ghostcacher.research.replay import filled


@dataclass(frozen=True, slots=True)
class Turns:
    """KL of each turn's tokens, in nats a token.

    ``append``: the turn ran on the restored prefix, and its own state, computed on that, was coded and kept.
    ``exact``: the codec applied to state that was computed exactly.
    """

    append: tuple[float, ...]
    exact: tuple[float, ...]


def turns(
    model: Any, codec: str | TensorCodec, text: torch.Tensor, *, begin_tokens: int = 512, turn_tokens: int = 128
) -> Turns:
    """Cut ``text`` ``[1, tokens]`` into a beginning and turns, each one block; what is left over is not used.

    Raises:
        ConfigurationError: the text has not one turn, or the beginning is not made of whole turns.
        BlockError: the codec refuses the state.
    """
    count = (text.shape[1] - begin_tokens) // turn_tokens
    if count < 1 or begin_tokens % turn_tokens:
        raise ConfigurationError(f"{text.shape[1]} tokens do not make {begin_tokens} and turns of {turn_tokens}")
    chosen, module = codec_named(codec) if isinstance(codec, str) else codec, base_module(model)
    shape, ids = shape_of(module), text[:, : begin_tokens + count * turn_tokens].to(input_device(module))
    chain = PrefixChain.of(ids[0].tolist(), Namespace(bytes(32)), turn_tokens)
    cache = ReplayCache(module, shape)
    expected = logits_after(module, ids, cache)
    from_exact = [coded(block, chosen)[1] for block in taken(shape, cache, chain)]
    held, append, exact = from_exact[: begin_tokens // turn_tokens], [], []
    for begin in range(begin_tokens, ids.shape[1], turn_tokens):
        end = begin + turn_tokens
        wanted, number = expected[begin:end], begin // turn_tokens
        logits, _ = _turn(module, shape, from_exact[:number], ids[:, begin:end])
        exact.append(divergence(wanted, logits))
        logits, cache = _turn(module, shape, held, ids[:, begin:end])
        append.append(divergence(wanted, logits))
        held += [coded(block, chosen)[1] for block in taken(shape, cache, chain.cut(end), begin)]
    return Turns(tuple(append), tuple(exact))


def _turn(module: Any, shape: Shape, blocks: Sequence[KVBlock], ids: torch.Tensor) -> tuple[torch.Tensor, ReplayCache]:
    cache = filled(module, shape, blocks, ids.shape[1])
    return logits_after(module, ids, cache), cache
