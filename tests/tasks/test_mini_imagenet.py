"""miniImageNet from small files of each form that people have, made here."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from data_files import CALL, PICKLES, SHORT, assert_holds, brought, cut_short, encoded, known, refuses, write_tar

from diffopt.tasks import MiniImageNet, mini_imagenet
from diffopt.tasks.class_lists import class_list

COUNT = 3  # of each class; officially 600
SIZES = {"train": 64, "validation": 16, "test": 20}
VALIDATION = class_list("mini-imagenet", "validation")
FIRST = "n01855672"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(mini_imagenet, "IMAGES_PER_CLASS", COUNT)


def load(folder, **options):
    return MiniImageNet.load(folder, split="validation", **options)


def made(split="validation"):
    """A pickle's table, images in no order of class, and what belongs to each class."""
    generator = np.random.default_rng(0)
    names = list(class_list("mini-imagenet", split))
    images = generator.integers(0, 256, (COUNT * len(names), 84, 84, 3), dtype=np.uint8)
    places = generator.permutation(len(images)).reshape(-1, COUNT).tolist()
    return {"image_data": images, "class_dict": {names[i]: places[i] for i in generator.permutation(len(names))}}


def of_class(table, name):
    return np.moveaxis(table["image_data"][table["class_dict"][name]], -1, 1)


@pytest.mark.parametrize("dump", PICKLES)
@pytest.mark.parametrize("split", SIZES)
def test_pickles_give_every_image_to_its_class(split, dump, tmp_path):
    table = made(split)
    folder = tmp_path / "mini-imagenet" if split == "test" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / f"mini-imagenet-cache-{SHORT[split]}.pkl").write_bytes(PICKLES[dump](table))
    loaded = MiniImageNet.load(tmp_path, split=split)
    assert loaded.images.shape == (SIZES[split], COUNT, 3, 84, 84)
    expected = {name: of_class(table, name) for name in class_list("mini-imagenet", split)}
    assert_holds(loaded, expected, f"mini-imagenet-cache-{SHORT[split]}.pkl")


def test_the_other_name_of_the_validation_pickle_and_places_as_arrays(tmp_path):
    table = made()
    table["class_dict"] = {name: np.array(places, np.int32) for name, places in table["class_dict"].items()}
    (tmp_path / "mini-imagenet-cache-validation.pkl").write_bytes(pickle.dumps(table))
    assert np.array_equal(load(tmp_path).images[0].numpy(), of_class(table, FIRST))


def test_the_archive_is_read_once_its_checksum_is_right(tmp_path, monkeypatch):
    tables = {f"mini-imagenet-cache-{SHORT[split]}.pkl": made(split) for split in ("test", "validation")}
    contents = {name: PICKLES["python 2"](table) for name, table in tables.items()}
    path = write_tar(tmp_path / "mini-imagenet.tar.gz", contents)
    monkeypatch.setattr(mini_imagenet, "ARCHIVE", known(path))
    loaded = load(tmp_path, size=21)
    assert loaded.sources == ("mini-imagenet.tar.gz",)
    table = tables["mini-imagenet-cache-val.pkl"]
    expected = brought(table["image_data"][table["class_dict"][FIRST][1]], 21)
    assert np.array_equal(loaded.images[0, 1].permute(1, 2, 0).numpy(), expected)
    refuses(r"has no file mini-imagenet-cache-train\.pkl", MiniImageNet.load, tmp_path, split="train")


GENERATOR = np.random.default_rng(0)
PICTURES = {
    (label, f"{label}{number:08}.jpg"): GENERATOR.integers(0, 256, (*size, 3), dtype=np.uint8)
    for label in reversed(VALIDATION)
    for number, size in enumerate([(100, 90), (84, 84), (84, 84)], start=1)
}
"""Pictures of the validation split, lossless, of several sizes; by class and name."""
HEADER, *LINES = "filename,label", *(f"{name},{label}" for label, name in PICTURES)


def write_pictures(folder, lines=(HEADER, *LINES), form="images", ending="\n"):
    (folder / "val.csv").write_bytes(ending.join([*lines, ""]).encode())
    for (label, name), image in PICTURES.items():
        path = folder / form.format(label=label) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))


@pytest.mark.parametrize("form", ["images", "{label}", "images/{label}", "val/{label}", "val"])
def test_pictures_are_found_by_the_list(form, tmp_path):
    folder = tmp_path / "with {braces} and %s"
    folder.mkdir()
    write_pictures(folder, form=form, ending="\r\n" if form == "images" else "\n")
    pictures = {label: [] for label in VALIDATION}
    for (label, _), image in PICTURES.items():
        pictures[label].append(np.moveaxis(brought(image, 84), 2, 0))
    assert_holds(load(folder), {label: np.stack(images) for label, images in pictures.items()}, "val.csv")


def test_pictures_of_other_kinds_become_rgb(tmp_path):
    write_pictures(tmp_path)
    grey = np.arange(84 * 84, dtype=np.uint8).reshape(84, 84)
    (tmp_path / "images" / f"{VALIDATION[0]}00000002.jpg").write_bytes(encoded(grey))
    smooth = np.broadcast_to(np.linspace(0, 255, 84).astype(np.uint8)[:, None, None], (84, 84, 3))
    (tmp_path / "images" / f"{VALIDATION[0]}00000003.jpg").write_bytes(encoded(smooth, "JPEG"))
    images = load(tmp_path).images
    assert np.array_equal(images[0, 1].numpy(), np.broadcast_to(grey, (3, 84, 84)))
    assert np.abs(images[0, 2].permute(1, 2, 0).numpy().astype(int) - smooth).max() < 12, "JPEG loses a little"


TABLE = made()
IMAGES, PLACES = TABLE["image_data"], TABLE["class_dict"]
OTHERS = {name: places for name, places in PLACES.items() if name != FIRST}
BROKEN = [
    (made("test"), "holds the classes of split 'test', expected those of 'validation'; the file has"),
    (TABLE | {"class_dict": OTHERS}, "15 classes, expected the 16"),
    (TABLE | {"class_dict": OTHERS | {"x01855672": PLACES[FIRST]}}, "1 of them foreign, such as 'x01855672'"),
    (TABLE | {"class_dict": PLACES | {FIRST: [0, 1]}}, f"has 2 images of class {FIRST}, expected 3; it was cut short"),
    (TABLE | {"class_dict": PLACES | {FIRST: [0, 1, 2]}}, "one image twice"),
    (TABLE | {"image_data": IMAGES[:-1]}, "images of class n0.* beyond the last, expected .* the 47 images there are"),
    (TABLE | {"class_dict": PLACES | {FIRST: [0, -1, 2]}}, "expected places among the 48"),
    (TABLE | {"class_dict": PLACES | {FIRST: "a"}}, "class_dict is a str"),
    (TABLE | {"image_data": IMAGES[:, :80]}, r"of shape \(48, 80, 84, 3\), expected uint8"),
    (TABLE | {"image_data": IMAGES / 255}, "image_data float64 of shape"),
    ({"data": IMAGES}, "the keys 'data', expected 'image_data' among them"),
    ({"image_data": IMAGES}, "expected 'class_dict' among them"),
    (TABLE | {"class_dict": [1]}, "class_dict as list, expected a dictionary"),
    ([1], "holds a list, expected a dictionary"),
]


@pytest.mark.parametrize(("table", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_pickles_of_another_content_are_refused(table, message, tmp_path):
    (tmp_path / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(table))
    refuses(message, load, tmp_path)


def test_pickles_cut_short_too_large_or_with_a_call_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "mini-imagenet-cache-val.pkl"
    path.write_bytes(PICKLES["python 2"](TABLE))
    for _ in cut_short(path):
        refuses(r"cannot be read .*, expected a whole pickle; .* cut short or damaged", load, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(mini_imagenet, "LARGEST_PICKLE", 1000)
        refuses("bytes, expected 1,000 at most", load, tmp_path)
    path.write_bytes(CALL)
    refuses(r"names 'posix\.system'", load, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"../../etc/passwd,{FIRST}", r"line 2, names '\.\./\.\./etc/passwd', expected a file name"),
        (f"/etc/passwd,{FIRST}", "names '/etc/passwd'"),
        (f"..\\x.jpg,{FIRST}", "expected a file name"),
        (f"..,{FIRST}", "expected a file name"),
        (f",{FIRST}", "names ''"),
        ("a.jpg", "line 2, has 1 fields, expected filename and label"),
        (f"a.jpg,{FIRST},x", "line 2, has 3 fields"),
        ("a.jpg,n99999999", "17 classes, 1 of them foreign, such as 'n99999999'"),
        (f"a.jpg,{FIRST}", f"has 4 images of class {FIRST}, expected 3"),
        ('"' + "x" * 200_000 + f'",{FIRST}', "line 2, cannot be read .field larger"),
    ],
)
def test_lists_of_another_content_are_refused(line, message, tmp_path):
    write_pictures(tmp_path, [HEADER, line, *LINES])
    refuses(message, load, tmp_path)


def test_lists_without_a_header_or_too_large_are_refused(tmp_path, monkeypatch):
    write_pictures(tmp_path, LINES)
    refuses("begins with another line, expected 'filename,label'", load, tmp_path)
    monkeypatch.setattr(mini_imagenet, "LARGEST_LIST", 100)
    refuses("expected 100 at most; this is no list", load, tmp_path)


def test_pictures_missing_damaged_or_too_large_are_refused(tmp_path, monkeypatch):
    (tmp_path / "val.csv").write_text("\n".join([HEADER, *LINES]))
    refuses(rf"not beside the list in .*, expected one of images/{FIRST}\d+\.jpg, {FIRST}/n01", load, tmp_path)
    write_pictures(tmp_path)
    path = tmp_path / "images" / f"{VALIDATION[-1]}00000002.jpg"
    whole = path.read_bytes()
    for content in (b"", b"GIF89a", whole[: len(whole) // 2], whole[:40], encoded(np.zeros((9, 9), np.uint8), "GIF")):
        path.write_bytes(content)
        refuses(r"00000002\.jpg cannot be read .*, expected a whole JPEG or PNG", load, tmp_path)
    path.unlink()
    refuses(r"00000002\.jpg cannot be read: No such file", load, tmp_path)
    monkeypatch.setattr(mini_imagenet, "LARGEST_PICTURE", 10)
    refuses("expected 10 at most", load, tmp_path)
