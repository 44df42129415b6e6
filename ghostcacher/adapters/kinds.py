"""Which kind a cache layer is: by its class, never by the model's name. An unknown class is never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ghostcacher.adapters.compressed import CompressedStates, select_rows
from ghostcacher.adapters.full import FullSlices
from ghostcacher.adapters.hybrid import ConvWindowLayer
from ghostcacher.adapters.layers import GrowingLayer
from ghostcacher.adapters.linear import RECURRENT_STATES, ConvLayer, LinearStates
from ghostcacher.adapters.parts import Kind
from ghostcacher.adapters.plain import INDEXED, KEYS_VALUES, SPARSE, PlainSlices
from ghostcacher.adapters.window import WindowLayer, WindowSlices
from ghostcacher.errors import UnsupportedModelError

STOCK = "transformers.cache_utils."
"""Where transformers defines most classes of cache layers."""
_DEEPSEEK_V4 = "transformers.models.deepseek_v4.modeling_deepseek_v4."
_MINIMAX_M3 = "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl."


def _as_it_is(layer: Any) -> Any:
    return layer


def _window(layer: Any) -> WindowLayer:
    return WindowLayer(layer.sliding_window)


def _conv(layer: Any) -> ConvLayer:
    return ConvLayer(layer.number_of_states)


def _conv_window(layer: Any) -> ConvWindowLayer:
    return ConvWindowLayer(layer.sliding_window, layer.number_of_states)


FULL = Kind("full", lambda _: GrowingLayer(), FullSlices())
LATENT = replace(FULL, name="latent")
WINDOW = Kind("window", _window, WindowSlices())
CONV = Kind("conv", _conv, None, LinearStates(needs_pieces=False))
RECURRENT = Kind("recurrent", _as_it_is, None, LinearStates())
CONV_WINDOW = Kind("hybrid window", _conv_window, WindowSlices(), LinearStates(needs_pieces=False))
RECURRENT_WINDOW = replace(CONV_WINDOW, states=LinearStates())
COMPRESSED = Kind("compressed", _as_it_is, None, CompressedStates(), select_rows)
DUMMY = Kind("dummy", _as_it_is)

KINDS: Mapping[str, Kind] = {
    STOCK + "DynamicLayer": FULL,
    STOCK + "DynamicSlidingWindowLayer": WINDOW,
    STOCK + "DynamicIndexedLayer": Kind("indexed", _as_it_is, PlainSlices(INDEXED)),
    STOCK + "LinearAttentionLayer": CONV,
    STOCK + "LinearAttentionAndFullAttentionLayer": Kind("hybrid", _as_it_is, PlainSlices(KEYS_VALUES), LinearStates()),
    STOCK + "LinearAttentionAndSlidingWindowAttentionLayer": CONV_WINDOW,
    STOCK + "DummyLayer": DUMMY,
    _MINIMAX_M3 + "MiniMaxM3VLSparseCacheLayer": Kind("sparse", _as_it_is, PlainSlices(SPARSE)),
    _DEEPSEEK_V4 + "DeepseekV4HCACache": COMPRESSED,
    _DEEPSEEK_V4 + "DeepseekV4CSACache": COMPRESSED,
}
_OURS: Mapping[type, Kind] = {GrowingLayer: FULL, WindowLayer: WINDOW, ConvLayer: CONV, ConvWindowLayer: CONV_WINDOW}


def kind_of(layer: Any) -> Kind:
    """The kind of a layer of transformers' or of ours, as far as its class says; see `settled`.

    Raises:
        UnsupportedModelError: the class is not in the table.
    """
    kind = _OURS.get(type(layer)) or KINDS.get(class_name(layer))
    if kind is None:
        raise UnsupportedModelError(f"layers of class {type(layer).__name__} are not known to this version")
    return kind


def class_name(layer: Any) -> str:
    """``module.Class`` of a layer."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def settled(layer: Any) -> Kind:
    """The kind of a layer after a forward, when it shows what its class leaves open.

    A layer that a forward leaves empty is a dummy; one shared head with keys and values of unequal width is a latent.
    """
    kind = kind_of(layer)
    if kind.is_empty(layer):
        return DUMMY
    has_recurrent = any(state is not None for state in getattr(layer, RECURRENT_STATES, {}).values())
    if kind is CONV and has_recurrent:
        return RECURRENT
    if kind is CONV_WINDOW and has_recurrent:
        return RECURRENT_WINDOW
    if kind is FULL and layer.keys.shape[1] == 1 and layer.keys.shape[3] != layer.values.shape[3]:
        return LATENT
    return kind
