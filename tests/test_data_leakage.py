"""The perceptual code against scipy's DCT and real turns of pictures; the guard against planted duplicates."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter
from skimage.data import astronaut, brick

from lit_defect.data import leakage
from lit_defect.data.leakage import ORIENTATIONS, find_leaks, leak_picture, perceptual_code, propose_groups
from lit_defect.errors import DataError

TILES = Path(__file__).parents[2] / "shared/data/magnetic_tile"
TURNS = {
    "same": lambda x: x,
    "mirrored": np.fliplr,
    "upside down": np.flipud,
    "rotated 180": lambda x: np.rot90(x, 2),
    "transposed": lambda x: np.swapaxes(x, 0, 1),
    "rotated right": lambda x: np.rot90(x, -1),
    "rotated left": np.rot90,
    "anti-transposed": lambda x: np.rot90(np.swapaxes(x, 0, 1), 2),
}


def textures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Random smooth pictures of 64 x 80 that share a bright frame, as parts on a fixture do."""
    rng = np.random.default_rng(seed)
    frame = np.zeros((64, 80))
    frame[:6], frame[-6:], frame[:, :6], frame[:, -6:] = 90, 90, 90, 40
    noise = (gaussian_filter(rng.normal(size=(64, 80)), 3) for _ in range(count))
    return [np.clip(128 + 25 * x / x.std() + frame, 0, 255).astype(np.uint8) for x in noise]


def coded(pictures: list[np.ndarray]) -> np.ndarray:
    return np.stack([perceptual_code(picture) for picture in pictures])


def numbered(count: int) -> list[str]:
    return [f"{i:04d}.png" for i in range(count)]


def test_code_is_the_low_block_of_scipys_dct_of_the_area_average():
    image = brick()[:320, :480]
    average = image.reshape(32, 10, 32, 15).mean(axis=(1, 3))
    expected = dctn(average, norm="ortho")[:12, :12]
    np.testing.assert_allclose(perceptual_code(image).reshape(12, 12), expected, rtol=1e-4, atol=1e-2)


def test_colour_is_read_as_luma():
    image = astronaut()
    grey = image @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(perceptual_code(image), perceptual_code(grey.round().astype(np.uint8)), atol=1.0)


@pytest.mark.parametrize("shape", [(1, 1), (7, 301), (33, 31)])
def test_any_size_keeps_the_mean(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert perceptual_code(image)[0] == pytest.approx(32 * image.mean(), rel=1e-4)


@pytest.mark.parametrize("image", [np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8), np.uint8)])
def test_other_arrays_are_refused(image):
    with pytest.raises(DataError, match="uint8"):
        perceptual_code(image)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_turned_code_is_the_code_of_the_turned_picture(name):
    image = brick()[:200, :333]
    index, sign = ORIENTATIONS[name]
    turned = perceptual_code(np.ascontiguousarray(TURNS[name](image)))
    np.testing.assert_allclose(perceptual_code(image)[index] * sign, turned, atol=1e-2)


def test_every_turned_copy_in_the_test_split_is_found_with_its_orientation():
    train = textures(40)
    turns = [list(TURNS)[i % 8] for i in range(40)]
    test = [np.ascontiguousarray(TURNS[turn](picture)) for turn, picture in zip(turns, train, strict=True)]
    leaks = find_leaks(coded(train + test), numbered(80), ["train"] * 40 + ["test"] * 40, [""] * 80)
    found = {(leak.name_a, leak.name_b): leak.orientation for leak in leaks}
    names = numbered(80)
    assert found == {(names[i], names[40 + i]): turns[i] for i in range(40)}
    assert all(leak.distance < 0.01 and (leak.split_a, leak.split_b) == ("train", "test") for leak in leaks)


def test_other_exposure_size_and_compression_do_not_hide_a_duplicate(tmp_path):
    train, test = textures(30), []
    for picture in train:
        copy = ImageEnhance.Brightness(Image.fromarray(picture).resize((57, 49))).enhance(0.6)
        copy.save(tmp_path / "copy.jpg", quality=40)
        test.append(np.asarray(Image.open(tmp_path / "copy.jpg")))
    leaks = find_leaks(coded(train + test), numbered(60), ["train"] * 30 + ["val"] * 30, [""] * 60)
    pairs = {(leak.name_a, leak.name_b) for leak in leaks}
    assert pairs == set(zip(numbered(60)[:30], numbered(60)[30:], strict=True))


def test_pictures_that_share_only_their_frame_are_no_leak():
    assert find_leaks(coded(textures(60)), numbered(60), ["train", "test"] * 30, [""] * 60) == []


def test_duplicates_within_a_split_are_no_leak_but_one_group():
    pictures = textures(6)
    codes = coded([*pictures, pictures[2], np.fliplr(pictures[2])])
    names = ["h", "g", "f", "e", "d", "c", "b", "a"]
    assert find_leaks(codes, names, ["train"] * 8, [""] * 8) == []
    assert propose_groups(codes, names, [""] * 8) == ["h", "g", "a", "e", "d", "c", "a", "a"]


def test_flat_pictures_do_not_match_each_other():
    rng = np.random.default_rng(0)
    flat = [np.full((40, 40), grey, np.uint8) for grey in (0, 0, 7, 200, 255)]
    flat.append(rng.integers(127, 130, (40, 40)).astype(np.uint8))
    assert find_leaks(coded(flat), numbered(6), ["train", "test"] * 3, [""] * 6) == []


def test_two_pictures_are_enough_to_find_a_copy():
    picture = textures(1)[0]
    (leak,) = find_leaks(coded([picture, picture]), ["a", "b"], ["test", "train"], ["7", "9"])
    assert (leak.name_a, leak.group_a, leak.name_b, leak.group_b) == ("b", "9", "a", "7")
    assert leak.orientation == "same"
    assert leak.distance == pytest.approx(0, abs=1e-3)


def test_leaks_are_sorted_and_the_closest_are_kept(monkeypatch):
    monkeypatch.setattr(leakage, "MAX_PAIRS", 5)
    monkeypatch.setattr(leakage, "BLOCK", 4)
    rng = np.random.default_rng(1)
    train = textures(20)
    test = [np.clip(p + rng.normal(0, i, p.shape), 0, 255).astype(np.uint8) for i, p in enumerate(train)]
    leaks = find_leaks(coded(train + test), numbered(40), ["train"] * 20 + ["test"] * 20, [""] * 40)
    assert [leak.distance for leak in leaks] == sorted(leak.distance for leak in leaks)
    assert len(leaks) == 5
    assert {leak.name_a for leak in leaks} <= set(numbered(9))


def test_distance_and_pairs_do_not_depend_on_the_block_size(monkeypatch):
    pictures = textures(50)
    codes = coded([*pictures, *(np.ascontiguousarray(p[2:, 1:]) for p in pictures)])
    splits = (["train"] * 3 + ["val"]) * 25
    expected = find_leaks(codes, numbered(100), splits, [""] * 100)
    monkeypatch.setattr(leakage, "BLOCK", 7)
    leaks = find_leaks(codes, numbered(100), splits, [""] * 100)
    assert {(leak.name_a, leak.name_b) for leak in leaks} == {(leak.name_a, leak.name_b) for leak in expected}
    assert len(expected) > 10


def test_known_groups_are_joined_never_divided():
    pictures = textures(5)
    codes = coded([*pictures, pictures[0]])
    groups = propose_groups(codes, numbered(6), ["x", "x", "", "y", "y", "y"])
    assert groups == ["0000.png", "0000.png", "0002.png", "0000.png", "0000.png", "0000.png"]


def test_splits_by_proposed_groups_have_no_leaks():
    pictures = textures(30)
    codes = coded([q for p in pictures for q in (p, np.ascontiguousarray(np.flipud(p)))])
    groups = propose_groups(codes, numbered(60), [""] * 60)
    assert len(set(groups)) == 30
    position = {group: i for i, group in enumerate(sorted(set(groups)))}
    splits = ["test" if position[group] % 3 else "train" for group in groups]
    assert find_leaks(codes, numbered(60), splits, groups) == []


@pytest.mark.parametrize("call", [find_leaks, lambda c, n, s, g: propose_groups(c, n, g)])
def test_lengths_that_disagree_are_refused(call):
    with pytest.raises(DataError, match="3"):
        call(np.zeros((3, 144), np.float32), ["a", "b"], ["train"] * 3, [""] * 3)


def test_the_picture_shows_both_pictures_of_each_pair_once():
    pictures = {f"{'very_long_folder/' * 4}{i}.png": p for i, p in enumerate(textures(4))}
    names = list(pictures) * 2
    leaks = find_leaks(coded([pictures[n] for n in names]), names, ["train"] * 4 + ["test"] * 4, [""] * 8)
    read: list[str] = []
    sheet = leak_picture(leaks, lambda name: read.append(name) or pictures[name], most=3)
    assert len(set(read)) == 3
    assert np.asarray(sheet).std() > 10
    assert max(sheet.size) < 1200


@pytest.mark.skipif(not TILES.exists(), reason="the magnetic tile photographs are not on this machine")
def test_the_same_tile_under_other_exposures_is_found():
    with open(TILES / "groups.csv", newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if row["path"].startswith(("test/break", "test/crack", "test/fray"))
        ]
    codes = coded([np.asarray(Image.open(TILES / row["path"])) for row in rows])
    true = np.array([row["group"] for row in rows])
    splits = np.random.default_rng(0).choice(["train", "test"], len(rows))
    leaks = find_leaks(codes, [row["path"] for row in rows], splits.tolist(), true.tolist())
    same = true[:, None] == true
    leaking = {rows[i]["path"] for i in range(len(rows)) if (same[i] & (splits != splits[i])).any()}
    named = {name for leak in leaks for name in (leak.name_a, leak.name_b)}
    assert len(named & leaking) / len(leaking) > 0.8  # the rest shows other sides of a part
    # the file parts one tile into several groups here, as the eye sees: its fault, not the guard's
    one_tile = ({"057", "058", "059"}, {"114", "115"}, {"118", "119"}, {"204", "205"})
    wrong = [{a.group_a, a.group_b} for a in leaks if a.group_a != a.group_b]
    assert all(any(pair <= tile for tile in one_tile) for pair in wrong)
