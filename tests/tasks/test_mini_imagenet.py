"""miniImageNet from small files of each form that people have, made here."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from python2 import python2_pickle

from diffopt.tasks import DataError, MiniImageNet, ProblemError, mini_imagenet, sample_episodes
from diffopt.tasks.class_lists import class_list
from diffopt.tasks.data import KnownFile

COUNT = 3  # of each class; officially 600
SHORT = {"train": "train", "validation": "val", "test": "test"}
SIZES = {"train": 64, "validation": 16, "test": 20}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(mini_imagenet, "IMAGES_PER_CLASS", COUNT)


def made(split, seed=0):
    """A pickle's table, images in no order of class, and what belongs to each class."""
    generator = np.random.default_rng(seed)
    names = list(class_list("mini-imagenet", split))
    images = generator.integers(0, 256, (COUNT * len(names), 84, 84, 3), dtype=np.uint8)
    places = generator.permutation(len(images)).reshape(-1, COUNT).tolist()
    order = generator.permutation(len(names)).tolist()
    classes = {names[place]: places[place] for place in order}
    return {"image_data": images, "class_dict": classes}


def channels_first(images):
    return np.moveaxis(images, -1, 1)


DUMPS = {
    "python 2": python2_pickle,
    "protocol 2": lambda t: pickle.dumps(t, 2),
    "protocol 5": lambda t: pickle.dumps(t, 5),
}


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("split", SIZES)
def test_pickles_give_every_image_to_its_class(split, dump, tmp_path):
    table = made(split)
    folder = tmp_path / "mini-imagenet" if split == "test" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / f"mini-imagenet-cache-{SHORT[split]}.pkl").write_bytes(DUMPS[dump](table))
    loaded = MiniImageNet.load(tmp_path, split=split)
    assert loaded.images.dtype == torch.uint8
    assert loaded.images.shape == (SIZES[split], COUNT, 3, 84, 84)
    assert loaded.class_names == class_list("mini-imagenet", split)
    assert loaded.sources == (f"mini-imagenet-cache-{SHORT[split]}.pkl",)
    for name, images in zip(loaded.class_names, loaded.images, strict=True):
        assert np.array_equal(images.numpy(), channels_first(table["image_data"][table["class_dict"][name]]))


def test_the_other_name_of_the_validation_pickle_and_places_as_arrays(tmp_path):
    table = made("validation")
    expected = channels_first(table["image_data"][table["class_dict"]["n01855672"]])
    table["class_dict"] = {name: np.array(places, np.int32) for name, places in table["class_dict"].items()}
    (tmp_path / "mini-imagenet-cache-validation.pkl").write_bytes(pickle.dumps(table))
    loaded = MiniImageNet.load(tmp_path, split="validation")
    assert np.array_equal(loaded.images[0].numpy(), expected)


def test_the_archive_is_read_once_its_checksum_is_right(tmp_path, monkeypatch):
    tables = {f"mini-imagenet-cache-{SHORT[split]}.pkl": made(split) for split in ("test", "validation")}
    with tarfile.open(tmp_path / "mini-imagenet.tar.gz", "w:gz") as archive:
        for name, table in tables.items():
            content = python2_pickle(table)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(DataError, match=r"tar\.gz has MD5 \w+, expected b38f1eb4251fb9459ecc8e7febf9b2eb"):
        MiniImageNet.load(tmp_path, split="validation")
    digest = hashlib.md5((tmp_path / "mini-imagenet.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(mini_imagenet, "ARCHIVE", KnownFile("mini-imagenet.tar.gz", None, md5=digest))
    loaded = MiniImageNet.load(tmp_path, split="validation", size=21)
    assert loaded.sources == ("mini-imagenet.tar.gz",)
    table = tables["mini-imagenet-cache-val.pkl"]
    picture = Image.fromarray(table["image_data"][table["class_dict"]["n01855672"][1]])
    expected = np.asarray(picture.resize((21, 21), Image.Resampling.BILINEAR))
    assert np.array_equal(loaded.images[0, 1].permute(1, 2, 0).numpy(), expected)
    with pytest.raises(DataError, match=r"has no file mini-imagenet-cache-train\.pkl"):
        MiniImageNet.load(tmp_path, split="train")


def picture_files(split, seed=0):
    """A list of the split and its pictures, lossless, of several sizes and kinds."""
    generator = np.random.default_rng(seed)
    lines, pictures = ["filename,label"], {}
    for label in reversed(class_list("mini-imagenet", split)):
        for number in range(COUNT):
            name = f"{label}{number + 1:08}.jpg"
            size = (84, 84) if number else (100, 90)
            pictures[label, name] = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            lines.append(f"{name},{label}")
    return lines, pictures


def encoded(image, form="PNG"):
    content = io.BytesIO()
    Image.fromarray(image).save(content, format=form)
    return content.getvalue()


def write_pictures(folder, lines, pictures, form, split, ending="\n"):
    (folder / f"{SHORT[split]}.csv").write_bytes(ending.join([*lines, ""]).encode())
    for (label, name), image in pictures.items():
        path = folder / form.format(label=label, split=SHORT[split]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))


@pytest.mark.parametrize("form", ["images", "{label}", "images/{label}", "{split}/{label}", "{split}"])
def test_pictures_are_found_by_the_list(form, tmp_path):
    folder = tmp_path / "with {braces} and %s"
    folder.mkdir()
    lines, pictures = picture_files("validation")
    write_pictures(folder, lines, pictures, form, "validation", "\r\n" if form == "images" else "\n")
    loaded = MiniImageNet.load(folder, split="validation")
    assert loaded.images.shape == (16, COUNT, 3, 84, 84)
    assert loaded.sources == ("val.csv",)
    for place, label in enumerate(loaded.class_names):
        for number in range(COUNT):
            picture = Image.fromarray(pictures[label, f"{label}{number + 1:08}.jpg"])
            expected = np.asarray(picture.resize((84, 84), Image.Resampling.BILINEAR))
            assert np.array_equal(loaded.images[place, number].permute(1, 2, 0).numpy(), expected)


def test_pictures_of_other_kinds_become_rgb(tmp_path, generator):
    lines, pictures = picture_files("validation")
    write_pictures(tmp_path, lines, pictures, "images", "validation")
    label = class_list("mini-imagenet", "validation")[0]
    grey = np.arange(84 * 84, dtype=np.uint8).reshape(84, 84)
    (tmp_path / "images" / f"{label}00000002.jpg").write_bytes(encoded(grey))
    smooth = np.broadcast_to(np.linspace(0, 255, 84).astype(np.uint8)[:, None, None], (84, 84, 3))
    (tmp_path / "images" / f"{label}00000003.jpg").write_bytes(encoded(smooth, "JPEG"))
    loaded = MiniImageNet.load(tmp_path, split="validation")
    assert np.array_equal(loaded.images[0, 1].numpy(), np.broadcast_to(grey, (3, 84, 84)))
    assert np.abs(loaded.images[0, 2].permute(1, 2, 0).numpy().astype(int) - smooth).max() < 12, "JPEG loses a little"
    episodes = sample_episodes(loaded.images, way=5, shot=1, query=2, tasks=2, generator=generator)
    assert episodes.query_inputs.shape == (2, 10, 3, 84, 84)
    with pytest.raises(DataError, match="expected at most 3; a class has only 3 images"):
        sample_episodes(loaded.images, way=5, shot=1, query=15, tasks=2, generator=generator)


def renamed(classes):
    return {f"x{name[1:]}" if name == "n01855672" else name: places for name, places in classes.items()}


BROKEN = {
    "another split": (
        lambda t: made("test"),
        "holds the classes of split 'test', expected those of 'validation'; the file has",
    ),
    "a class less": (
        lambda t: t | {"class_dict": dict(list(t["class_dict"].items())[1:])},
        "15 classes, expected the 16",
    ),
    "a foreign class": (
        lambda t: t | {"class_dict": renamed(t["class_dict"])},
        "1 of them foreign, such as 'x01855672'",
    ),
    "an image less": (
        lambda t: t | {"class_dict": t["class_dict"] | {"n01855672": [0, 1]}},
        "has 2 images of class n01855672, expected 3; it was cut short",
    ),
    "an image twice": (lambda t: t | {"class_dict": t["class_dict"] | {"n01855672": [0, 1, 2]}}, "one image twice"),
    "beyond the end": (
        lambda t: t | {"image_data": t["image_data"][:-1]},
        "images of class n0.* beyond the last, expected .* the 47 images there are",
    ),
    "before the start": (
        lambda t: t | {"class_dict": t["class_dict"] | {"n01855672": [0, -1, 2]}},
        "expected places among the 48",
    ),
    "places in words": (lambda t: t | {"class_dict": t["class_dict"] | {"n01855672": "a"}}, "class_dict is a str"),
    "another shape": (
        lambda t: t | {"image_data": t["image_data"][:, :80]},
        r"of shape \(48, 80, 84, 3\), expected uint8",
    ),
    "another dtype": (lambda t: t | {"image_data": t["image_data"] / 255}, "image_data float64 of shape"),
    "no images": (lambda t: {"data": t["image_data"]}, "the keys 'data', expected 'image_data' among them"),
    "no classes": (lambda t: {"image_data": t["image_data"]}, "expected 'class_dict' among them"),
    "a list of classes": (lambda t: t | {"class_dict": [1]}, "class_dict as list, expected a dictionary"),
    "a list": (lambda t: [1], "holds a list, expected a dictionary"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_pickles_of_another_content_are_refused(name, tmp_path):
    change, message = BROKEN[name]
    path = tmp_path / "mini-imagenet-cache-val.pkl"
    path.write_bytes(pickle.dumps(change(made("validation"))))
    with pytest.raises(DataError, match=message):
        MiniImageNet.load(tmp_path, split="validation")


def test_pickles_cut_short_too_large_or_with_a_call_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "mini-imagenet-cache-val.pkl"
    content = python2_pickle(made("validation"))
    for end in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"cannot be read .*, expected a whole pickle; .* cut short or damaged"):
            MiniImageNet.load(tmp_path, split="validation")
    path.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(mini_imagenet, "LARGEST_PICKLE", 1000)
        with pytest.raises(DataError, match=r"bytes, expected 1,000 at most"):
            MiniImageNet.load(tmp_path, split="validation")
    mark = tmp_path / "mark"
    path.write_bytes(b"\x80\x02cposix\nsystem\n" + f"U{chr(len(str(mark)) + 6)}touch {mark}".encode() + b"\x85R.")
    with pytest.raises(DataError, match=r"names 'posix\.system'"):
        MiniImageNet.load(tmp_path, split="validation")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../../etc/passwd,n01855672", r"line 2, names '\.\./\.\./etc/passwd', expected a file name"),
        ("/etc/passwd,n01855672", "names '/etc/passwd'"),
        ("..\\x.jpg,n01855672", "expected a file name"),
        ("..,n01855672", "expected a file name"),
        (",n01855672", "names ''"),
        ("a.jpg", "line 2, has 1 fields, expected filename and label"),
        ("a.jpg,n01855672,x", "line 2, has 3 fields"),
        ("a.jpg,n99999999", "17 classes, 1 of them foreign, such as 'n99999999'"),
        ("a.jpg,n01855672", "has 4 images of class n01855672, expected 3"),
        ('"' + "x" * 200_000 + '",n01855672', "line 2, cannot be read .field larger"),
    ],
)
def test_lists_of_another_content_are_refused(line, message, tmp_path):
    lines, pictures = picture_files("validation")
    write_pictures(tmp_path, [lines[0], line, *lines[1:]], pictures, "images", "validation")
    with pytest.raises(DataError, match=message):
        MiniImageNet.load(tmp_path, split="validation")


def test_lists_without_a_header_or_too_large_are_refused(tmp_path, monkeypatch):
    lines, pictures = picture_files("validation")
    write_pictures(tmp_path, lines[1:], pictures, "images", "validation")
    with pytest.raises(DataError, match="begins with another line, expected 'filename,label'"):
        MiniImageNet.load(tmp_path, split="validation")
    monkeypatch.setattr(mini_imagenet, "LARGEST_LIST", 100)
    with pytest.raises(DataError, match="expected 100 at most; this is no list"):
        MiniImageNet.load(tmp_path, split="validation")


def test_pictures_missing_damaged_or_too_large_are_refused(tmp_path, monkeypatch):
    lines, pictures = picture_files("validation")
    (tmp_path / "val.csv").write_text("\n".join(lines))
    with pytest.raises(
        DataError, match=r"not beside the list in .*, expected one of images/n01855672\d+\.jpg, n01855672/n01"
    ):
        MiniImageNet.load(tmp_path, split="validation")
    write_pictures(tmp_path, lines, pictures, "images", "validation")
    label = class_list("mini-imagenet", "validation")[-1]
    path = tmp_path / "images" / f"{label}00000002.jpg"
    whole = path.read_bytes()
    for content in (b"", b"GIF89a", whole[: len(whole) // 2], whole[:40], encoded(np.zeros((9, 9), np.uint8), "GIF")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"00000002\.jpg cannot be read .*, expected a whole JPEG or PNG"):
            MiniImageNet.load(tmp_path, split="validation")
    path.unlink()
    with pytest.raises(DataError, match=r"00000002\.jpg cannot be read: No such file"):
        MiniImageNet.load(tmp_path, split="validation")
    monkeypatch.setattr(mini_imagenet, "LARGEST_PICTURE", 10)
    with pytest.raises(DataError, match="expected 10 at most"):
        MiniImageNet.load(tmp_path, split="validation")


def test_missing_data_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"no miniImageNet data for split 'validation' in .* it has none") as error:
        MiniImageNet.load(tmp_path, split="validation")
    parts = (
        "mini-imagenet-cache-val.pkl",
        "-validation.pkl",
        "val.csv",
        "mini-imagenet.tar.gz",
        "image-net.org",
        "--data-dir",
    )
    for part in (str(tmp_path), *parts):
        assert part in str(error.value)
    with pytest.raises(DataError, match="split is 'val'"):
        MiniImageNet.load(tmp_path, split="val")
    with pytest.raises(ProblemError, match="size is 0"):
        MiniImageNet.load(tmp_path, split="test", size=0)
