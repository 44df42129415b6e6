"""Identity of media: what changes it, where prompts may be cut, which positions follow from the tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ghostcacher.adapters.media import FIRST_MEDIA_ID, media_of
from ghostcacher.adapters.positions import Span, are_plain
from ghostcacher.adapters.unserved import UnservedError

IMAGE, VIDEO = 100, 101
IDS = torch.tensor([[1, 2, 3, *[IMAGE] * 4, 5, 6, *[IMAGE] * 4, 7, 8]])
PIXELS = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn((8, 6), generator=torch.Generator().manual_seed(1))


def config(**fields):
    return SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO, to_dict=lambda: {"patch_size": 2, **fields})


class Features(dict):
    """As `ModelOutput`: a dict built from keywords."""


def encoded(rows=ROWS, **more):
    return {"mm_encoder_outputs": {"image": Features(pooler_output=list(rows.split(4)), **more)}}


def keys(arguments, ids=IDS, **fields):
    return media_of(arguments, ids, config(**fields)).keyed(ids.tolist())[0]


def test_ids_of_media_are_a_pure_function_of_their_content():
    arguments = encoded(torch.arange(48.0).reshape(8, 6))
    assert keys(arguments) == keys(arguments)
    assert keys(arguments) == [
        1, 2, 3, 1218226262, 1259085337, 1957397103, 1898432402, 5, 6, 2086489064, 1869189096, 1610423780, 1232884027,
        7, 8,
    ]  # fmt: skip


def test_only_placeholders_are_replaced():
    replaced = [number >= FIRST_MEDIA_ID for number in keys({"pixel_values": PIXELS})]
    assert replaced == (IDS == IMAGE)[0].tolist()


CHANGES = {
    "a pixel": lambda: keys({"pixel_values": changed(PIXELS)}),
    "dtype": lambda: keys({"pixel_values": PIXELS.double()}),
    "the encoder's config": lambda: keys({"pixel_values": PIXELS}, patch_size=1),
    "token types": lambda: keys({"pixel_values": PIXELS, "token_type_ids": (IDS == IMAGE).long()}),
    "positions": lambda: keys({"pixel_values": PIXELS, "position_ids": torch.arange(15).expand(3, 1, 15)}),
    "order": lambda: keys({"pixel_values": PIXELS.flip(0)}),
    "another argument": lambda: keys({"pixel_values": PIXELS, "image_sizes": torch.tensor([[4, 4], [4, 4]])}),
}


def changed(tensor):
    other = tensor.clone()
    other.view(-1)[0] += 1e-6
    return other


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_the_first_image_changes_its_ids(what):
    assert not set(CHANGES[what]()[3:7]) & set(keys({"pixel_values": PIXELS})[3:7])


@pytest.mark.parametrize("depth", ["embedding", "deeper layers"])
def test_every_layer_of_features_counts(depth):
    deep = {"deepstack_features": [list(ROWS.split(4))]}
    other = {"deepstack_features": [list(changed(ROWS).split(4))]}
    base = keys(encoded(**deep))
    with_other = keys(encoded(changed(ROWS), **deep) if depth == "embedding" else encoded(**other))
    assert base[3:7] != with_other[3:7]
    assert base[9:13] == with_other[9:13]


def test_an_image_in_other_company_is_the_same_image():
    alone = torch.cat([IDS[:, :7], torch.tensor([[9, 9]])], dim=1)
    assert keys({"pixel_values": PIXELS[:1]}, alone)[3:7] == keys({"pixel_values": PIXELS})[3:7]
    assert keys(encoded(ROWS[:4]), alone)[3:7] == keys(encoded())[3:7]


def test_cuts_are_never_inside_a_run_of_any_row():
    ids = torch.cat([IDS, IDS.roll(1)])
    media = media_of({"pixel_values": PIXELS.repeat(2, 1, 1, 1)}, ids, config())
    assert [media.floor(column) for column in range(2, 10)] == [2, 3, 3, 3, 3, 3, 8, 9]
    assert media.floor(9) == 9
    assert media.floor(10) == 9
    assert media.floor(14) == 14


def test_what_is_left_of_features_after_a_cut():
    media = media_of(encoded(deepstack_features=[list(ROWS.split(4))]), IDS, config())
    left = media.between(8, 15)["mm_encoder_outputs"]["image"]
    assert torch.equal(torch.cat(left["pooler_output"]), ROWS[4:])
    assert torch.equal(torch.cat(left["deepstack_features"][0]), ROWS[4:])
    assert media.between(13, 15) == {"mm_encoder_outputs": None}


def test_what_is_left_of_pixels_after_a_cut():
    grid = torch.tensor([[1, 2, 4], [1, 4, 2]])
    patches = torch.randn((16, 5), generator=torch.Generator().manual_seed(2))
    media = media_of({"pixel_values": patches, "image_grid_thw": grid}, IDS, config())
    left = media.between(8, 15)
    assert torch.equal(left["pixel_values"], patches[8:])
    assert torch.equal(left["image_grid_thw"], grid[1:])
    assert media.between(13, 15) == {"pixel_values": None, "image_grid_thw": None}


def test_pixels_by_row():
    media = media_of({"pixel_values": PIXELS[None]}, IDS, config())
    assert torch.equal(media.between(8, 15)["pixel_values"], PIXELS[None, 1:])


@pytest.mark.parametrize(
    "pixels", [torch.cat([PIXELS, PIXELS[:1]]), torch.cat([PIXELS[:1], PIXELS[:1] * 0])], ids=["more", "blank"]
)
def test_images_that_cannot_be_told_apart_are_one_unit(pixels):
    media = media_of({"pixel_values": pixels}, IDS, config())
    assert [media.floor(column) for column in (3, 7, 8, 12, 13)] == [3, 3, 3, 3, 13]
    assert torch.equal(media.between(0, 15)["pixel_values"], pixels)
    assert media.between(13, 15)["pixel_values"] is None


def test_images_whose_sizes_do_not_fit_the_runs_are_one_unit():
    """The features of one would fill part of the other's run."""
    arguments = {"pixel_values": torch.randn(12, 5), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 4, 2]])}
    media = media_of(arguments, IDS, config())
    assert [media.floor(column) for column in (3, 7, 8, 13)] == [3, 3, 3, 13]


REFUSED = {
    "features do not fit": encoded(ROWS[:7]),
    "fewer than 4 tokens": {"pixel_values": PIXELS, "ids": IDS[:, [0, 3, 4, 5, 7]]},
    "token types other than 0": {"token_type_ids": torch.ones_like(IDS)},
    "media of an unknown form": {"mm_encoder_outputs": {"image": Features(pooler_output=[ROWS]), "audio": ROWS}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_understood_is_not_served(message):
    arguments = dict(REFUSED[message])
    with pytest.raises(UnservedError, match=message):
        media_of(arguments, arguments.pop("ids", IDS), config())


def test_a_call_without_media():
    assert media_of({"token_type_ids": torch.zeros_like(IDS)}, IDS, config()) is None


ROPE = torch.tensor([0, 1, 2, 3, 3, 3, 3, 4, 5])
WIDTH = torch.tensor([0, 1, 2, 3, 4, 3, 4, 5, 6])


def planes(*rope):
    return torch.stack([torch.arange(9), *rope])[:, None]


def test_positions_after_media_go_on_from_the_highest():
    spans = (Span(0, 3, 7),)
    rope = torch.stack([ROPE, WIDTH, WIDTH])
    rope[:, 7:] = torch.tensor([5, 6])
    assert are_plain(planes(*rope), (0,), 0, 9, spans)
    assert are_plain(rope[:, None], (0,), 0, 9, spans)
    assert not are_plain(planes(*rope), (0,), 0, 9)
    rope[0, 8] = 7
    assert not are_plain(planes(*rope), (0,), 0, 9, spans)


def test_positions_of_text():
    count = torch.arange(9)
    assert are_plain(None, (0,), 0, 9)
    assert are_plain(count[None], (0,), 0, 9)
    assert are_plain(torch.where(count < 2, 1, count - 2)[None], (2,), 0, 9)
    assert are_plain(count[None] + 4, (0,), 4, 9)
    assert are_plain(planes(count, count, count), (0,), 0, 9)
    assert not are_plain(planes(count, count, count + 1), (0,), 0, 9)
    assert not are_plain(count[None] + 1, (0,), 0, 9)
    assert not are_plain(count[None, :8], (0,), 0, 9)
    assert not are_plain("auto", (0,), 0, 9)
