"""tieredImageNet from small files in the form of Ren et al., made here."""

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

from diffopt.tasks import DataError, ProblemError, TieredImageNet, sample_episodes, tiered_imagenet
from diffopt.tasks.data import KnownFile

SHORT = {"train": "train", "validation": "val", "test": "test"}
CLASSES = {"train": 351, "validation": 97, "test": 160}


def png(image):
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    return np.frombuffer(content.getvalue(), dtype=np.uint8)


class Made:
    """A small split: 2 or 3 images a class, in no order of class; some pictures as [n], some as [n, 1]."""

    def __init__(self, split, monkeypatch, size=8):
        generator = np.random.default_rng(5)
        classes = CLASSES[split]
        labels = generator.permutation(np.concatenate([np.repeat(np.arange(classes), 2), np.arange(classes // 2)]))
        monkeypatch.setitem(tiered_imagenet.SIZES, split, (classes, len(labels)))
        self.short = SHORT[split]
        self.images = generator.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
        pictures = [png(image) for image in self.images]
        self.encoded = [one if place % 2 else one[:, None] for place, one in enumerate(pictures)]
        self.labels = {
            "label_specific": labels.astype(np.int32),
            "label_general": (labels // 10).astype(np.int32),
            "label_specific_str": [f"kind {number}, sort" for number in range(classes)],
            "label_general_str": [f"category {number}" for number in range(classes // 10 + 1)],
        }

    def write(self, folder, dump=python2_pickle, prefix=""):
        folder.mkdir(exist_ok=True)
        (folder / f"{prefix}{self.short}_images_png.pkl").write_bytes(dump(self.encoded))
        (folder / f"{prefix}{self.short}_labels.pkl").write_bytes(dump(self.labels))

    def of_class(self, label):
        return np.moveaxis(self.images[self.labels["label_specific"] == label], 3, 1)


DUMPS = {
    "python 2": python2_pickle,
    "protocol 2": lambda t: pickle.dumps(t, 2),
    "protocol 5": lambda t: pickle.dumps(t, 5),
}


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("split", CLASSES)
def test_every_image_goes_to_its_class(split, dump, tmp_path, monkeypatch):
    made = Made(split, monkeypatch)
    folder = tmp_path / "tiered-imagenet" if split == "test" else tmp_path
    prefix = "tiered-imagenet-" if split == "validation" else ""
    made.write(folder, DUMPS[dump], prefix)
    loaded = TieredImageNet.load(tmp_path, split=split, size=8)
    assert loaded.images.flat.dtype == torch.uint8
    assert len(loaded.images) == CLASSES[split]
    assert loaded.class_names == tuple(made.labels["label_specific_str"])
    assert loaded.sources == (f"{prefix}{SHORT[split]}_images_png.pkl", f"{prefix}{SHORT[split]}_labels.pkl")
    assert set(loaded.images.counts.tolist()) == {2, 3}
    for label in range(CLASSES[split]):
        assert np.array_equal(loaded.images[label].numpy(), made.of_class(label))


def test_a_size_and_episodes(tmp_path, monkeypatch, generator):
    made = Made("validation", monkeypatch)
    made.encoded = [one.tobytes() for one in made.encoded]  # as some wrote them again
    made.write(tmp_path)
    loaded = TieredImageNet.load(tmp_path, split="validation", size=5)
    picture = Image.fromarray(made.of_class(7)[0].transpose(1, 2, 0)).resize((5, 5), Image.Resampling.BILINEAR)
    assert np.array_equal(loaded.images[7][0].permute(1, 2, 0).numpy(), np.asarray(picture))
    episodes = sample_episodes(loaded.images, way=5, shot=1, query=1, tasks=2, generator=generator)
    assert episodes.support_inputs.shape == (2, 5, 3, 5, 5)
    with pytest.raises(DataError, match=r"shot \+ query is 1 \+ 2, expected at most 2; a class has only 2 images"):
        sample_episodes(loaded.images, way=5, shot=1, query=2, tasks=2, generator=generator)
    with pytest.raises(DataError, match="way is 98, expected at most 97; there are only 97 classes"):
        sample_episodes(loaded.images, way=98, shot=1, query=1, tasks=2, generator=generator)
    assert TieredImageNet.load(tmp_path, split="validation").images.flat.shape[1:] == (3, 84, 84)


def test_the_archive_is_read_once_its_checksum_is_right(tmp_path, monkeypatch):
    made = Made("validation", monkeypatch)
    path = tmp_path / "tiered-imagenet.tar"
    with tarfile.open(path, "w") as archive:
        for name, table in ((f"{made.short}_images_png.pkl", made.encoded), (f"{made.short}_labels.pkl", made.labels)):
            content = python2_pickle(table)
            entry = tarfile.TarInfo(f"tiered-imagenet/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(DataError, match=r"tar has MD5 \w+, expected e07e811b9f29362d159a9edd0d838c62"):
        TieredImageNet.load(tmp_path, split="validation")
    known = KnownFile(path.name, None, md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(tiered_imagenet, "ARCHIVE", known)
    loaded = TieredImageNet.load(tmp_path, split="validation", size=8)
    assert loaded.sources == ("tiered-imagenet.tar",)
    assert np.array_equal(loaded.images[50].numpy(), made.of_class(50))
    with pytest.raises(DataError, match=r"has no file test_images_png\.pkl or test_labels\.pkl"):
        TieredImageNet.load(tmp_path, split="test")


def changed(key, change):
    def apply(made):
        made.labels = made.labels | {key: change(made.labels[key])}

    return apply


def swapped(picture):
    def apply(made):
        made.encoded[3] = picture

    return apply


BROKEN = {
    "too few labels": (
        changed("label_specific", lambda a: a[1:]),
        r"labels int32 of shape \(241,\), expected 242 integers",
    ),
    "labels of another kind": (changed("label_specific", lambda a: a / 2), r"labels float64"),
    "a label beyond": (changed("label_specific", lambda a: a + 1), "from 1 to 97, expected all of 0 to 96"),
    "a class without images": (changed("label_specific", lambda a: a.clip(1)), "from 1 to 96, expected all of"),
    "a name less": (
        changed("label_specific_str", lambda a: a[1:]),
        "of 96, expected the names of 97 classes of 'valida",
    ),
    "names of another kind": (changed("label_specific_str", lambda a: 5), "label_specific_str of int"),
    "no labels": (lambda made: made.labels.pop("label_specific"), "expected 'label_specific' among them"),
    "too few pictures": (lambda made: made.encoded.pop(), "holds a list of 241, expected a list of 242 encoded"),
    "a dictionary of pictures": (lambda made: setattr(made, "encoded", {"a": 1}), "holds a dict, expected a list"),
    "a damaged picture": (swapped(np.arange(9, dtype=np.uint8)), "picture 3 cannot be read .*, expected a whole PNG"),
    "a number for a picture": (swapped(5), "picture 3 is of int, expected an encoded picture"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_of_another_content_are_refused(name, tmp_path, monkeypatch):
    change, message = BROKEN[name]
    made = Made("validation", monkeypatch)
    change(made)
    made.write(tmp_path)
    with pytest.raises(DataError, match=message):
        TieredImageNet.load(tmp_path, split="validation", size=8)


def test_the_official_numbers_are_expected(tmp_path, monkeypatch):
    sizes = dict(tiered_imagenet.SIZES)
    assert sum(images for _, images in sizes.values()) == 779_165  # as the paper says of all three
    assert sum(classes for classes, _ in sizes.values()) == 608
    made = Made("validation", monkeypatch)
    made.write(tmp_path)
    monkeypatch.setitem(tiered_imagenet.SIZES, "validation", sizes["validation"])
    with pytest.raises(DataError, match=r"of shape \(242,\), expected 124,261 integers"):
        TieredImageNet.load(tmp_path, split="validation")
    # A file under the name of another split is told by its number of classes.
    for kind in ("images_png", "labels"):
        (tmp_path / f"val_{kind}.pkl").rename(tmp_path / f"test_{kind}.pkl")
    with pytest.raises(DataError, match="of 97, expected the names of 160 classes of 'test'"):
        TieredImageNet.load(tmp_path, split="test")


def test_files_cut_short_too_large_or_with_a_call_are_refused(tmp_path, monkeypatch):
    made = Made("validation", monkeypatch)
    made.write(tmp_path)
    for name in ("val_labels.pkl", "val_images_png.pkl"):
        path = tmp_path / name
        whole = path.read_bytes()
        for end in (0, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:end])
            with pytest.raises(DataError, match=rf"{name} cannot be read .*, expected a whole pickle"):
                TieredImageNet.load(tmp_path, split="validation")
        path.write_bytes(b"\x80\x02cposix\nsystem\nU\x04true\x85R.")
        with pytest.raises(DataError, match=rf"{name} names 'posix\.system'"):
            TieredImageNet.load(tmp_path, split="validation")
        path.write_bytes(whole)
    monkeypatch.setattr(tiered_imagenet, "LARGEST_IMAGES", 1000)
    with pytest.raises(DataError, match="expected 1,000 at most"):
        TieredImageNet.load(tmp_path, split="validation")


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    Made("validation", monkeypatch).write(tmp_path)
    (tmp_path / "val_labels.pkl").unlink()
    with pytest.raises(DataError, match=r"no tieredImageNet data for split 'validation' in .* it has none") as error:
        TieredImageNet.load(tmp_path, split="validation")
    parts = ("val_images_png.pkl and val_labels.pkl, or tiered-imagenet.tar", "image-net.org", "12.9 GB", "--data-dir")
    for part in (str(tmp_path), *parts):
        assert part in str(error.value)
    with pytest.raises(DataError, match="split is 'val'"):
        TieredImageNet.load(tmp_path, split="val")
    with pytest.raises(ProblemError, match="size is 0"):
        TieredImageNet.load(tmp_path, split="test", size=0)
