"""Assets of tables: named by content, read back as they were, refused if they are anything else."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ghostcacher.blocks import Rotation
from ghostcacher.codecs import products
from ghostcacher.codecs.base import Piece
from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.outliers import Outliers
from ghostcacher.codecs.tables import Table, Tables
from ghostcacher.errors import BlockError, StoreError
from ghostcacher.keys import TABLES
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.testing.codec import group
from ghostcacher.testing.faulty import FaultyStore
from ghostcacher.tiers.shelf import Shelf

CURVE = ((0.1, 1e-4), (0.5, 3e-3), (1.0, 1e-2))
COSTS = {"int8": 2e-5, "ec(1)": 4e-2, "ec(0.25)": 2e-3, "own(3)": 0.1}


def tables(seed=0, curve=CURVE, costs=COSTS):
    generator = torch.Generator().manual_seed(seed)

    def table():
        basis = torch.linalg.qr(torch.randn(2, 1, 8, 8, generator=generator))[0]
        return Table.of(torch.randn(2, 8, generator=generator), basis, torch.rand(2, 8, generator=generator))

    return Tables({"keys": table(), "values.3": table()}, Rotation((1.0, 0.1)), curve, "llama", costs)


def test_an_asset_is_read_back_as_it_was():
    made = tables()
    read = Tables.parse(made.blob, made.digest)
    assert read == made
    assert (read.rotation, read.curve, read.model) == (made.rotation, made.curve, made.model)
    assert read.costs == COSTS
    assert all(torch.equal(read.groups[name].basis, table.basis) for name, table in made.groups.items())
    assert tables(1) != made


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_other_bytes_are_taken_for_it(data):
    made = tables()
    blob = bytearray(made.blob)
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BlockError, match="tables"):
        Tables.parse(bytes(blob), made.digest)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_forged_assets_under_their_own_name_are_refused_or_sound(data):
    """Whoever can write the store can name what they wrote."""
    blob = bytearray(tables().blob)
    for _ in range(data.draw(st.integers(1, 6))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    name = hashlib.sha256(blob).hexdigest()
    reason = read = None
    try:
        read = Tables.parse(bytes(blob), name)
    except BlockError as error:
        reason = error.reason
    assert reason == "tables" or all(bool(torch.isfinite(table.basis).all()) for table in read.groups.values())


@pytest.mark.parametrize(
    "change",
    [
        {"keys.mean": torch.zeros(2, 7)},
        {"keys.basis": torch.zeros(2, 1, 8, 8)},
        {"keys.basis": torch.zeros(2, 2, 8, 8, dtype=torch.int8)},
        {"keys.basis": torch.zeros(2, 1, 8, 8).bfloat16()},
        {"keys.spread": torch.full((2, 8), torch.nan)},
        {"keys.scale": torch.full((2, 8), torch.inf)},
        {"curve": [[0.1, 1e-3], [0.5, 1e-4]]},
        {"curve": [[0.1, 1e-3]]},
        {"format": 1},
        {"rotation": [["x"], False]},
        {"costs": {"int8": 0.0}},
        {"costs": {"int8": math.nan}},
        {"costs": {"int8": "x"}},
        {"costs": ["int8"]},
    ],
)
def test_assets_that_fit_nothing(change):
    good = {"keys.mean": torch.zeros(2, 8), "keys.basis": torch.zeros(2, 1, 8, 8, dtype=torch.int8),
            "keys.scale": torch.ones(2, 8), "keys.spread": torch.zeros(2, 8)}  # fmt: skip
    document = {"costs": COSTS, "curve": CURVE, "format": 2, "model": "", "rotation": None}
    tensors = {name: change.get(name, part) for name, part in good.items()}
    text = json.dumps({name: change.get(name, part) for name, part in document.items()}, separators=(",", ":"))
    blob = save(tensors, {"ghostcacher": text})
    with pytest.raises(BlockError, match="tables"):
        Tables.parse(blob, hashlib.sha256(blob).hexdigest())


def test_the_curve_is_read_both_ways():
    made = tables()
    for step, kl in CURVE:
        assert made.kl(step) == pytest.approx(kl)
        assert made.step(kl) == pytest.approx(step)
    for step in (0.02, 0.3, 0.8, 3.0):
        assert made.step(made.kl(step)) == pytest.approx(step)
    assert made.kl(0.02) < 1e-4 < made.kl(0.3) < 3e-3 < made.kl(0.8) < 1e-2 < made.kl(3.0)


def test_costs_are_those_measured_or_lie_between_two_of_the_same_name():
    made = tables()
    assert [made.cost(codec) for codec in COSTS] == list(COSTS.values())
    assert made.cost("kvt(0.5)") == pytest.approx(3e-3)
    assert made.cost("kvt(0.3)") == pytest.approx(made.kl(0.3))
    assert made.cost("ec(0.5)") == pytest.approx(math.sqrt(2e-3 * 4e-2))
    assert 2e-3 > made.cost("ec(0.12)") > 0
    assert [made.cost(codec) for codec in ("int4", "own(4)", "own", "ec", "raw", "", "no codec")] == [None] * 7
    assert tables(curve=()).cost("kvt(0.5)") is None


@pytest.mark.parametrize(
    "costs",
    [
        {},
        {"ec(1)": 1.0, "ec(1.0)": 2.0},
        {"ec(0)": 1.0, "ec(1)": 2.0},
        {"ec(-1)": 1.0, "ec(1)": 2.0},
        {"ec(.)": 1.0, "ec(1)": 2.0, "ec(2)": 3.0},
        {"ec(1)": 5e-324, "ec(1.0000001)": 1e308},
    ],
)
@pytest.mark.parametrize("codec", ["ec(0.5)", "ec(1e300)", "ec(5e-324)", "ec(1e999)", "ec(0)", "ec(e)"])
def test_costs_that_mean_nothing_are_none_of_a_codecs(costs, codec):
    """Whoever can write the store names steps and measures as they like."""
    found = tables(costs=costs).cost(codec)
    assert found is None or 0 <= found < math.inf


def test_an_asset_of_before_there_were_costs_is_read():
    made = tables(costs={})
    blob = made.blob.replace(b'\\"costs\\":{},', b"")
    blob = (int.from_bytes(blob[:8], "little") - len(made.blob) + len(blob)).to_bytes(8, "little") + blob[8:]
    assert len(blob) < len(made.blob)
    read = Tables.parse(blob, hashlib.sha256(blob).hexdigest())
    assert (read.costs, read.curve) == ({}, CURVE)


def test_a_shelf_keeps_tables_in_every_store_and_finds_them_in_any():
    near, far, made = MemoryStore(), MemoryStore(), tables()
    Shelf([near, far], 1.0).put(made, "weights")
    for stores in ([near], [far], [MemoryStore(), far]):
        shelf = Shelf(stores, 1.0)
        assert shelf.of_model("weights") == made
        assert shelf.named(made.digest) == made
        assert shelf.of_model("others") is None
    Shelf([near], 1.0).put(tables(1), "weights")
    assert Shelf([near, far], 1.0).of_model("weights") == tables(1)
    assert Shelf([near, far], 1.0).named(made.digest) == made


def test_a_shelf_that_cannot_be_read_is_empty_and_asked_again_later(monkeypatch):
    backing, made = MemoryStore(), tables()
    Shelf([backing], 1.0).put(made, "weights")
    broken = FaultyStore(backing)
    broken.failing = frozenset({"get_many"})
    shelf = Shelf([broken], 1.0)
    assert shelf.of_model("weights") is None
    broken.failing = frozenset()
    assert shelf.of_model("weights") is None
    monkeypatch.setattr("ghostcacher.tiers.shelf.LOOK_AGAIN_SECONDS", 0.0)
    assert Shelf([broken], 1.0).of_model("weights") == made
    broken.failing = frozenset({"put_many"})
    with pytest.raises(StoreError):
        shelf.put(made, "weights")


def test_a_damaged_near_copy_does_not_hide_a_good_far_one():
    near, far, made = MemoryStore(), MemoryStore(), tables()
    for store in (near, far):
        Shelf([store], 1.0).put(made, "weights")
    near.put_many({f"{TABLES.hex}/{made.digest}": [b"damaged"]}, timeout_seconds=1.0)
    assert Shelf([near, far], 1.0).of_model("weights") == made


def test_a_damaged_asset_is_not_read_again_for_every_block():
    backing, made = FaultyStore(MemoryStore()), tables()
    Shelf([backing], 1.0).put(made, "weights")
    backing.put_many({f"{TABLES.hex}/{made.digest}": [b"damaged"]}, timeout_seconds=1.0)
    backing.calls.clear()
    shelf = Shelf([backing], 1.0)
    assert [shelf.named(made.digest) for _ in range(5)] == [None] * 5
    assert backing.calls == ["get_many"]


def test_tables_that_could_not_be_spread_are_spread_later():
    far, near, made = MemoryStore(), FaultyStore(MemoryStore()), tables()
    Shelf([far], 1.0).put(made, "weights")
    shelf = Shelf([near, far], 1.0)
    near.failing = frozenset({"put_many"})
    shelf.spread(made.digest)
    near.failing = frozenset()
    shelf.spread(made.digest)
    assert Shelf([near], 1.0).named(made.digest) == made


def test_a_flat_curve_is_not_followed_beyond_reason():
    flat = tables(curve=((0.12, 1e-12), (0.25, 1.001e-12), (0.5, 1.002e-12)))
    assert 0 < flat.step(1e-3) < float("inf")
    assert 0 < flat.kl(8.0) < float("inf")


@pytest.mark.parametrize("is_exact", [True, False])
def test_sums_are_whole_numbers_with_int8_products_or_without(is_exact, sums_with_outliers, monkeypatch):
    monkeypatch.setattr(products, "_is_exact", lambda: is_exact)
    found, wanted = sums_with_outliers(torch.device("cpu"))
    assert torch.equal(found, wanted)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_forged_parts_are_refused_or_have_the_right_shape(data):
    """Codes far out, of all sizes, among them: the rest of a code is added to a product."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 2, 16, 16, generator=generator))[0]
    table = Table.of(torch.zeros(2, 32), basis, torch.rand(2, 32, generator=generator))
    codec = KvtCodec(0.05, Tables({"keys": table}, Rotation((1.0, 0.1)), ()))
    given_group, piece = group("keys", layers=2), Piece(0, 130)
    tensor = torch.randn(given_group.shape(130), generator=generator) * 3
    tensor[..., 1] *= 200
    parts = {name: part.clone() for name, part in codec.encode(given_group, tensor, piece).items()}
    assert int(parts["keys.outlier_counts"].sum()) > 10
    named = [name for name in sorted(parts) if name.partition(".")[2] not in ("sinks", "rest")]
    for _ in range(data.draw(st.integers(1, 4))):
        raw = parts[data.draw(st.sampled_from(named))].view(torch.uint8).view(-1)
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    reason = None
    try:
        found = codec.decode(given_group, piece, parts)
    except BlockError as error:
        reason = error.reason
    assert reason == "frame" or found.shape == tensor.shape


@pytest.mark.parametrize("count", [1, 1000, 5000])
def test_as_many_outliers_as_there_are_are_added(count, monkeypatch):
    """More than go at once, several to a token, and all codes of a block."""
    generator = torch.Generator().manual_seed(count)
    basis = torch.randint(-127, 128, (2, 25, 25), generator=generator).to(torch.int8)
    places = torch.randperm(2 * 25 * 100, generator=generator)[:count].sort().values
    codes = torch.zeros(2 * 25 * 100).index_fill_(0, places, 1.0) * torch.randint(-9, 10, (5000,), generator=generator)
    sums = torch.randint(-999, 999, (2, 100, 25), generator=generator).float()
    wanted = sums.double() + 256 * torch.einsum("nwt,nwc->ntc", codes.view(2, 25, 100).double(), basis.double())
    products.add_outliers(sums, basis, Outliers(places.numpy(), codes[places].numpy()))
    assert torch.equal(sums.double(), wanted)


def test_classes_at_exact_borders_follow_the_format():
    """From the text of docs/format.md, in whole numbers of Python."""
    spread = torch.tensor([[2.0**n * m for n in range(-6, 6) for m in (1.0, 0.5**0.5, 2**0.5, 1.4142135, 1.4142137)]])
    table = Table.of(torch.zeros_like(spread), torch.eye(spread.shape[1])[None, None], spread)
    found = table.classes(0.5).numbers[0].tolist()
    expected = []
    for value in spread[0].tolist():
        mantissa, exponent = math.frexp(value / 0.5)
        expected.append(min(max(exponent + 3 + (mantissa >= 0.5**0.5), 0), 7))
    assert found == expected
