"""A folder of pictures as a data set: shapes, bad files, splits, and a run that notices when the pictures change."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import rich.console
from PIL import Image

from experiments import config, execute, folder, runs
from experiments.config import Options
from experiments.folder import NoPicturesError

RNG = np.random.default_rng(0)


def picture(path: Path, shape: tuple[int, ...] = (20, 30, 3), **options: object) -> np.ndarray:
    """Writes a smooth random picture and returns its pixels."""
    coarse = RNG.integers(0, 256, (4, 4, *shape[2:]), np.uint8)
    image = Image.fromarray(coarse).resize(shape[1::-1], Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return np.asarray(image)


def test_pictures_of_all_kinds_become_squares(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.JPG", (50, 40, 3))
    picture(tmp_path / "deep" / "er" / "c.webp", (8, 8, 3))
    picture(tmp_path / "grey.png", (20, 20))
    picture(tmp_path / "clear.png", (16, 24, 4))
    Image.fromarray(np.full((9, 9), 65535 // 2, np.uint16)).save(tmp_path / "sixteen.png")
    picture(tmp_path / ".hidden.png")
    found = folder.load(tmp_path, size=16, fit="crop")
    assert sum(len(images) for images in found.splits.values()) == 6
    assert {images.shape[1:] for images in found.splits.values()} == {(16, 16, 3)}
    assert all(images.dtype == np.uint8 for images in found.splits.values())
    assert not found.unreadable
    assert (folder.read(tmp_path / "sixteen.png", size=4, fit="crop") == 127).all()


def test_grey_pictures_alone_have_one_channel(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png", (12, 12))
    found = folder.load(tmp_path, size=12, fit="crop")
    assert found.splits["train"].shape == (2, 12, 12, 1)


def test_crop_cuts_both_ends_alike_and_resize_keeps_all(tmp_path: Path) -> None:
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert (folder.read(tmp_path / "stripes.png", size=10, fit="crop") == 255).all()
    squeezed = folder.read(tmp_path / "stripes.png", size=30, fit="resize")[15, :, 0]
    assert squeezed[:9].max() < 20
    assert squeezed[12:18].min() > 235


def test_orientation_of_a_camera_is_followed_and_transparency_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, axis=0).repeat(4, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to look at it
    image.save(tmp_path / "turned.jpg", exif=exif)
    turned = folder.read(tmp_path / "turned.jpg", size=8, fit="crop")
    assert turned[:3].max() < 40
    assert turned[5:].min() > 215
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (folder.read(tmp_path / "clear.png", size=4, fit="crop") == 255).all()


def bad_files(directory: Path) -> None:
    (directory / "notes.txt").write_text("no picture")
    (directory / "empty.png").touch()
    whole = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "PNG")
    (directory / "truncated.png").write_bytes(whole.getvalue()[:3000])


def test_unreadable_files_are_named_and_skipped(tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / f"{i}.png")
    clean = folder.load(tmp_path, size=8, fit="crop")
    bad_files(tmp_path)
    found = folder.load(tmp_path, size=8, fit="crop")
    assert set(found.unreadable) == {"notes.txt", "empty.png", "truncated.png"}
    assert all(found.unreadable.values())
    assert found.digest == clean.digest


def test_splits_are_disjoint_complete_and_the_same_every_time(tmp_path: Path) -> None:
    for i in range(23):
        Image.new("L", (4, 4), 10 * i).save(tmp_path / f"{i:02}.png")
    splits = [folder.load(tmp_path, size=4, fit="crop").splits for _ in range(2)]
    values = {name: images[:, 0, 0, 0].tolist() for name, images in splits[0].items()}
    assert {name: len(chosen) for name, chosen in values.items()} == {"train": 19, "validation": 2, "test": 2}
    assert sorted(value for chosen in values.values() for value in chosen) == [10 * i for i in range(23)]
    for name, images in splits[1].items():
        np.testing.assert_array_equal(images, splits[0][name])


def test_digest_follows_pixels_order_and_size(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    found = [folder.load(tmp_path, size=size, fit=fit).digest for size in (8, 9) for fit in ("crop", "resize")]
    (tmp_path / "0.png").rename(tmp_path / "9.png")
    found.append(folder.load(tmp_path, size=8, fit="crop").digest)
    assert len(set(found)) == 5


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoPicturesError, match="needs --data-dir PATH"):
        folder.load(None, size=8, fit="crop")
    with pytest.raises(NoPicturesError, match="nowhere is not a folder"):
        folder.load(tmp_path / "nowhere", size=8, fit="crop")
    with pytest.raises(NoPicturesError, match="has 0 pictures that can be read; at least 3"):
        folder.load(tmp_path, size=8, fit="crop")
    bad_files(tmp_path)
    picture(tmp_path / "one.png")
    with pytest.raises(NoPicturesError, match=r"has 1 pictures .* and 3 other files \(empty.png, notes.txt, trunc"):
        folder.load(tmp_path, size=8, fit="crop")
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        folder.load(tmp_path, size=0, fit="crop")


@pytest.mark.slow
def test_a_run_trains_on_the_folder_and_refuses_to_go_on_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPACT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rich.console.Console, "is_terminal", False)
    pictures = tmp_path / "pictures"
    for i in range(6):
        picture(pictures / f"{i}.png")
    bad_files(pictures)
    tiny = config.preset("functa", "tiny").config
    small = dataclasses.replace(tiny, dataset="folder", image_size=8, batch_size=4, steps=10, evaluate_every=10)
    options = Options(runs_dir=tmp_path / "runs", data_dir=pictures)
    arguments = ["run", "functa", "folder", "--data-dir", str(pictures)]
    result = execute.execute("functa", "folder", small, options, arguments)
    assert result["command"] == "python -m experiments run functa folder"
    assert result["metrics"]["test_images"] == 1
    said = capsys.readouterr().out
    assert "skipped 3 that cannot be read" in said
    assert "notes.txt: cannot identify" in said
    directory = tmp_path / "runs" / "functa" / "folder-0"
    (directory / "result.json").unlink()
    execute.execute("functa", "folder", small, options, arguments)  # the same pictures: it goes on from the end
    (directory / "result.json").unlink()
    picture(pictures / "2.png")
    with pytest.raises(runs.RunError, match=r"other pictures in its folder:\n  digest: the run has"):
        execute.execute("functa", "folder", small, options, arguments)
