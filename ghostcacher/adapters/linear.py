"""Linear attention: convolutional and recurrent states, without a token axis.

Decode steps change both in place, so what is read is cloned and what is put back belongs to the layer alone. Their
dtypes differ from the model's (recurrent states are mostly fp32).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from ghostcacher.adapters.parts import dtype_name
from ghostcacher.blocks import TensorSpec

CONV_STATES, RECURRENT_STATES = "conv_states", "recurrent_states"


@dataclass(frozen=True, slots=True)
class SeenInputs:
    """Inputs ``[rows, channels, tokens]`` up to now; from the first token on if ``is_first``, else after a state."""

    inputs: torch.Tensor
    is_first: bool

    def state(self, width: int, ago: int) -> torch.Tensor | None:
        """The last ``width`` inputs as they were ``ago`` tokens ago, or None if they are not all here."""
        seen = self.inputs[..., : max(0, self.inputs.shape[-1] - ago)][..., -width:]
        missing = width - seen.shape[-1]
        if missing and not self.is_first:
            return None
        return torch.nn.functional.pad(seen, (missing, 0))


class ConvLayer(LinearAttentionLayer):
    """A `LinearAttentionLayer` that remembers the inputs of its latest forward, so that earlier states can be told.

    Only for layers without a recurrent state; decode steps that bypass ``update_conv_state`` are not seen.
    """

    conv_kernel_size: dict[int, int]

    def __init__(self, number_of_states: int = 1, **kwargs: Any) -> None:
        super().__init__(number_of_states=number_of_states, **kwargs)
        self.seen_inputs: dict[int, SeenInputs] = {}

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """Stock behaviour; ``conv_states`` are inputs ``[rows, channels, tokens]``."""
        is_first = not self.has_previous_state[state_idx]
        full: torch.Tensor = super().update_conv_state(conv_states, state_idx, **kwargs)
        self.seen_inputs[state_idx] = SeenInputs(full, is_first)
        return full


@dataclass(frozen=True, slots=True)
class LinearStates:
    """See `States`. With ``needs_pieces`` False, of a `ConvLayer`, whose earlier states follow from its inputs."""

    needs_pieces: bool = True

    def specs(self, layer: Any) -> tuple[TensorSpec, ...]:
        """See `States.specs`."""
        return tuple(
            TensorSpec(f"{name}.{index}", dtype_name(state), tuple(state.shape[1:]))
            for name, index, state in _states(layer)
        )

    def holds(self, layer: Any) -> bool:
        """See `States.holds`."""
        return any(layer.has_previous_state.values())

    def ago(self, layer: Any, columns: int) -> Mapping[str, torch.Tensor] | None:
        """See `States.ago`."""
        if columns == 0:
            return {f"{name}.{index}": _last(layer, name, index, state) for name, index, state in _states(layer)}
        if self.needs_pieces:
            return None
        found = {}
        for _, index, _ in _states(layer):
            seen = layer.seen_inputs.get(index)
            state = seen.state(layer.conv_kernel_size[index], columns) if seen else None
            if state is None:
                return None
            found[f"{CONV_STATES}.{index}"] = state
        return found

    def restore(self, layer: Any, tensors: Mapping[str, torch.Tensor], columns: int) -> None:  # noqa: ARG002 (it has no length)
        """See `States.restore`. Copies, so that buffers known to compiled code stay where they are."""
        for index in range(layer.number_of_states):
            conv, recurrent = tensors.get(f"{CONV_STATES}.{index}"), tensors.get(f"{RECURRENT_STATES}.{index}")
            given = {"conv_states": conv, "recurrent_states": recurrent}
            given = {name: state for name, state in given.items() if state is not None}
            layer.lazy_initialization(state_idx=index, **given)
            if conv is not None:
                layer.conv_states[index].copy_(conv)
            if recurrent is not None:
                layer.recurrent_states[index].copy_(recurrent)
            layer.has_previous_state[index] = True
        self.let_go(layer)

    def let_go(self, layer: Any) -> None:
        """See `States.let_go`."""
        if not self.needs_pieces:
            layer.seen_inputs = {}


def _last(layer: Any, name: str, index: int, state: torch.Tensor) -> torch.Tensor:
    """The state itself; of conv inputs that ``record_past`` keeps for assisted decoding, the last that count."""
    if name == RECURRENT_STATES:
        return state
    last: torch.Tensor = state[..., -layer.conv_kernel_size[index] :]
    return torch.nn.functional.pad(last, (layer.conv_kernel_size[index] - last.shape[-1], 0))


def _states(layer: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    for name in (CONV_STATES, RECURRENT_STATES):
        for index in range(layer.number_of_states):
            state = getattr(layer, name)[index]
            if state is not None:
                yield name, index, state
