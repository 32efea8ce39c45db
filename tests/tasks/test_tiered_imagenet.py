"""tieredImageNet from small files in the form of Ren et al., made here."""

from __future__ import annotations

import numpy as np
import pytest
from data_files import CALL, PICKLES, SHORT, assert_holds, brought, cut_short, encoded, known, refuses, write_tar

from diffopt.tasks import TieredImageNet, tiered_imagenet

CLASSES = {"train": 351, "validation": 97, "test": 160}
OFFICIAL = dict(tiered_imagenet.SIZES)


class Made:
    """A small split: 2 or 3 images a class, in no order of class; some pictures as [n], some as [n, 1]."""

    def __init__(self, split):
        generator = np.random.default_rng(5)
        classes = CLASSES[split]
        labels = generator.permutation(np.concatenate([np.repeat(np.arange(classes), 2), np.arange(classes // 2)]))
        self.short = SHORT[split]
        self.images = generator.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
        pictures = [np.frombuffer(encoded(image), dtype=np.uint8) for image in self.images]
        self.encoded = [one if place % 2 else one[:, None] for place, one in enumerate(pictures)]
        self.labels = {
            "label_specific": labels.astype(np.int32),
            "label_general": (labels // 10).astype(np.int32),
            "label_specific_str": [f"kind {number}, sort" for number in range(classes)],
            "label_general_str": [f"category {number}" for number in range(classes // 10 + 1)],
        }

    def files(self, dump=PICKLES["python 2"]):
        return {f"{self.short}_images_png.pkl": dump(self.encoded), f"{self.short}_labels.pkl": dump(self.labels)}

    def write(self, folder, dump=PICKLES["python 2"], prefix=""):
        folder.mkdir(exist_ok=True)
        for name, content in self.files(dump).items():
            (folder / (prefix + name)).write_bytes(content)

    def of_class(self, label):
        return np.moveaxis(self.images[self.labels["label_specific"] == label], 3, 1)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    for split, classes in CLASSES.items():
        monkeypatch.setitem(tiered_imagenet.SIZES, split, (classes, 2 * classes + classes // 2))


@pytest.fixture
def made():
    return Made("validation")


def load(folder, split="validation", size=8):
    return TieredImageNet.load(folder, split=split, size=size)


@pytest.mark.parametrize("dump", PICKLES)
@pytest.mark.parametrize("split", CLASSES)
def test_every_image_goes_to_its_class(split, dump, tmp_path):
    made = Made(split)
    prefix = "tiered-imagenet-" if split == "validation" else ""
    made.write(tmp_path / "tiered-imagenet" if split == "test" else tmp_path, PICKLES[dump], prefix)
    expected = {f"kind {label}, sort": made.of_class(label) for label in range(CLASSES[split])}
    assert_holds(load(tmp_path, split), expected, *(prefix + name for name in made.files()))
    assert {len(images) for images in expected.values()} == {2, 3}


def test_a_size_of_pictures_in_bytes(made, tmp_path):
    made.encoded = [one.tobytes() for one in made.encoded]  # as some wrote them again
    made.write(tmp_path)
    images = load(tmp_path, size=5).images
    expected = brought(made.of_class(7)[0].transpose(1, 2, 0), 5)
    assert np.array_equal(images[7][0].permute(1, 2, 0).numpy(), expected)
    assert load(tmp_path, size=None).images.flat.shape[1:] == (3, 84, 84)


def test_the_archive_is_read_once_its_checksum_is_right(made, tmp_path, monkeypatch):
    members = {f"tiered-imagenet/{name}": content for name, content in made.files().items()}
    path = write_tar(tmp_path / "tiered-imagenet.tar", members, "w")
    monkeypatch.setattr(tiered_imagenet, "ARCHIVE", known(path))
    loaded = load(tmp_path)
    assert loaded.sources == ("tiered-imagenet.tar",)
    assert np.array_equal(loaded.images[50].numpy(), made.of_class(50))
    refuses(r"has no file test_images_png\.pkl or test_labels\.pkl", load, tmp_path, "test")


TABLE, PICTURES = Made("validation").labels, Made("validation").encoded
LABELS, NAMES = TABLE["label_specific"], TABLE["label_specific_str"]
DAMAGED = [*PICTURES[:3], np.arange(9, dtype=np.uint8), *PICTURES[4:]]
BROKEN = [
    ("labels", {}, "expected 'label_specific' among them"),
    ("labels", TABLE | {"label_specific": LABELS[1:]}, r"labels int32 of shape \(241,\), expected 242 integers"),
    ("labels", TABLE | {"label_specific": LABELS / 2}, "labels float64"),
    ("labels", TABLE | {"label_specific": LABELS + 1}, "from 1 to 97, expected all of 0 to 96"),
    ("labels", TABLE | {"label_specific": LABELS.clip(1)}, "from 1 to 96, expected all of"),  # a class without images
    ("labels", TABLE | {"label_specific_str": NAMES[1:]}, "of 96, expected the names of 97 classes of 'valida"),
    ("labels", TABLE | {"label_specific_str": 5}, "label_specific_str of int"),
    ("encoded", PICTURES[1:], "holds a list of 241, expected a list of 242 encoded"),
    ("encoded", {"a": 1}, "holds a dict, expected a list"),
    ("encoded", DAMAGED, "picture 3 cannot be read .*, expected a whole PNG"),
    ("encoded", [*PICTURES[:3], 5, *PICTURES[4:]], "picture 3 is of int, expected an encoded picture"),
]


@pytest.mark.parametrize(("what", "content", "message"), BROKEN, ids=[message for *_, message in BROKEN])
def test_files_of_another_content_are_refused(what, content, message, made, tmp_path):
    setattr(made, what, content)
    made.write(tmp_path)
    refuses(message, load, tmp_path)


def test_the_official_numbers_are_expected(made, tmp_path, monkeypatch):
    assert sum(images for _, images in OFFICIAL.values()) == 779_165  # as the paper says of all three
    assert sum(classes for classes, _ in OFFICIAL.values()) == 608
    assert {split: classes for split, (classes, _) in OFFICIAL.items()} == CLASSES
    made.write(tmp_path)
    monkeypatch.setitem(tiered_imagenet.SIZES, "validation", OFFICIAL["validation"])
    refuses(r"of shape \(242,\), expected 124,261 integers", load, tmp_path)
    # A file under the name of another split is told by its number of classes.
    for name in made.files():
        (tmp_path / name).rename(tmp_path / name.replace("val", "test"))
    refuses("of 97, expected the names of 160 classes of 'test'", load, tmp_path, "test")


def test_files_missing_cut_short_too_large_or_with_a_call_are_refused(made, tmp_path, monkeypatch):
    made.write(tmp_path)
    for name in reversed(made.files()):
        path = tmp_path / name
        for _ in cut_short(path):
            refuses(rf"{name} cannot be read .*, expected a whole pickle", load, tmp_path)
        whole = path.read_bytes()
        path.write_bytes(CALL)
        refuses(rf"{name} names 'posix\.system'", load, tmp_path)
        path.unlink()
        refuses("no tieredImageNet data for split 'validation' in .* it has none", load, tmp_path)
        path.write_bytes(whole)
    monkeypatch.setattr(tiered_imagenet, "LARGEST_IMAGES", 1000)
    refuses("expected 1,000 at most", load, tmp_path)
