"""``kvt(c)``: `ec` in a basis that was calibrated for the model, from 4 bits a value down to 1.

Channels are weighted by what a change of them does to the next token's distribution (the diagonal of the Fisher
information, from gradients: `ghostcacher.research.calibrate`), and turned into the directions in which the weighted
state varies (as NVIDIA's KVTC, arXiv 2511.01815, does with plain PCA). Then one step serves all layers, keys and
values. Means, basis and classes are the model's: a block holds codes and nothing else. See `tables` and `symbols`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ghostcacher.blocks import KVLayout, TensorGroup
from ghostcacher.codecs.base import Piece, Room, Spread, fresh, one_by_one
from ghostcacher.codecs.ec import checked_step
from ghostcacher.codecs.entropy import require
from ghostcacher.codecs.grouping import (
    by_channel,
    check_finite,
    coded_tokens,
    kept,
    put_kept,
    rest_fields,
    sink_dtype,
    sink_fields,
    sink_tokens,
    turn_of,
)
from ghostcacher.codecs.header import TensorField
from ghostcacher.codecs.heads import Heads
from ghostcacher.codecs.lines import Lines
from ghostcacher.codecs.orders import TokenByToken
from ghostcacher.codecs.products import add_outliers, product
from ghostcacher.codecs.symbols import CODE_LIMIT, Codes, SymbolCoder
from ghostcacher.codecs.tables import Table, Tables, TablesSource, is_digest
from ghostcacher.errors import BlockError, ConfigurationError
from ghostcacher.transfers import on_device

_CALIBRATE = "run `ghostcacher calibrate` with this model and this store"


@dataclass(frozen=True, slots=True)
class KvtCodec:
    """``c`` is the step. Lossy: see docs/quantisation.md. Needs tables of the model, from ``source`` or given."""

    name: ClassVar[str] = "kvt"
    lossy: ClassVar[bool] = True
    c: float
    tables: Tables | None = None
    source: TablesSource | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, c: float, tables: str | None = None, source: TablesSource | None = None) -> KvtCodec:
        """The codec of step ``c``, with the tables named ``tables`` if it is to read.

        Raises:
            ConfigurationError: ``c`` is out of its range, or ``source`` does not have the tables.
        """
        require()
        found = None
        if tables is not None:
            found = source.named(tables) if source is not None and is_digest(tables) else None
            if found is None:
                raise ConfigurationError(
                    f"kvt: the tables {str(tables)[:12]} are not here; copy them or calibrate again"
                )
        return cls(checked_step("kvt", c), found, source)

    def parameters(self) -> dict[str, Any]:
        """The step, and the tables by name."""
        return {"c": self.c, **({"tables": self.tables.digest} if self.tables else {})}

    def for_layout(self, layout: KVLayout) -> KvtCodec:
        """This codec with tables of the layout's model.

        Raises:
            BlockError: ``uncalibrated``: there are none.
        """
        if self.tables is not None:
            return self
        found = self.source.of_model(layout.weights) if self.source is not None else None
        if found is None:
            raise BlockError("uncalibrated", f"kvt has no tables of this model; {_CALIBRATE}")
        return KvtCodec(self.c, found, self.source)

    def fields(self, group: TensorGroup, piece: Piece) -> tuple[TensorField, ...]:
        """What `SymbolCoder` gives, sinks, and the rest; the rest alone of tensors without a table."""
        coded = self._coded(group, piece)
        if not coded:
            return rest_fields(group, piece, 0)
        sinks = sink_fields(group, sink_tokens(piece, coded))
        return (*self._coder(group, coded).fields(), *sinks, *rest_fields(group, piece, coded))

    def encode(self, group: TensorGroup, tensor: torch.Tensor, piece: Piece) -> Mapping[str, torch.Tensor]:
        """See `fields`.

        Raises:
            BlockError: ``nonfinite``: NaN, infinity, or values so large that they have no code; ``tables``: a basis
                that cannot be inverted.
        """
        coded, name = self._coded(group, piece), group.name
        if not coded:
            return {f"{name}.rest": tensor}
        table, sinks = self._table(group), sink_tokens(piece, coded)
        values = by_channel(group, tensor, piece, coded, self._rotation) - table.mean.to(tensor.device)[:, None]
        largest = 1.5 * (values.abs().amax() + table.mean.abs().amax() + self.c * table.reach)
        first = tensor[..., :sinks, :].to(sink_dtype(group))
        check_finite(group, first, largest.to(group.spec.torch_dtype))
        codes = _times(table.analysis.to(tensor.device), values.transpose(1, 2)).div_(self.c).round_()
        codes[..., :sinks] = 0.0
        if not bool(codes.abs().amax() < CODE_LIMIT):
            raise BlockError("nonfinite", f"{name} holds values far beyond what was calibrated")
        parts = self._coder(group, coded).pack(codes)
        if sinks:
            parts[f"{name}.sinks"] = first
        return {**parts, **kept(group, tensor, piece, coded)}

    def decode(
        self, group: TensorGroup, piece: Piece, parts: Mapping[str, torch.Tensor], room: Room = fresh,
        spread: Spread = one_by_one,
    ) -> torch.Tensor:  # fmt: skip
        """Mean + c x scale x (basis x codes), turned as the model had it, then the layout's dtype.

        Raises:
            BlockError: ``frame``: a frame that is not what the header says.
        """
        coded = self._coded(group, piece)
        if not coded:
            return parts[f"{group.name}.rest"].view(group.shape(piece.tokens))
        table = self._table(group)
        decoded = room(group.shape(piece.tokens), group.spec.torch_dtype)
        heads = self._heads(group, table, piece, coded)
        mean, basis, scale = table.in_planes(heads, decoded.device)
        back = Lines(TokenByToken(heads), mean, scale * self.c, decoded)

        def restore(codes: Codes) -> None:
            small, rest = codes.in_int8()
            matrices = basis[codes.layers].flatten(0, 1)
            given = on_device(small, decoded.device).view(len(matrices), -1, coded)
            numbers = back.room(codes.layers).view(len(matrices), coded, -1)
            product(given, matrices, numbers)
            add_outliers(numbers, matrices, rest)
            back.write(codes.layers)

        self._coder(group, coded).unpack(parts, restore, spread)
        return put_kept(group, decoded, piece, coded, parts)

    @property
    def _rotation(self) -> Any:
        return self.tables.rotation if self.tables else None

    def _heads(self, group: TensorGroup, table: Table, piece: Piece, coded: int) -> Heads:
        channels = group.shape(coded)[3]
        turn = turn_of(group, self._rotation, piece.start, coded)
        return Heads(coded, table.basis.shape[2] // channels, channels, turn, groups=table.basis.shape[1])

    def _table(self, group: TensorGroup) -> Table:
        return (self.tables.groups if self.tables else {})[group.name]

    def _coded(self, group: TensorGroup, piece: Piece) -> int:
        """As `coded_tokens`; none of tensors that the tables do not know."""
        coded = coded_tokens(group, piece)
        table = self.tables.groups.get(group.name) if self.tables and coded else None
        return coded if table is not None and table.fits(group) else 0

    def _coder(self, group: TensorGroup, coded: int) -> SymbolCoder:
        layers, heads, _, channels = group.shape(coded)
        return SymbolCoder(group.name, layers, heads * channels, coded, self._table(group).classes(self.c))


def _times(matrices: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``[layers, parts, w, w]`` times ``[layers, n, tokens]``, part by part, ``[layers, n, tokens]``."""
    layers, parts, width, _ = matrices.shape
    return torch.matmul(matrices, columns.reshape(layers, parts, width, -1)).view(layers, parts * width, -1)
