"""What holds for every data set: which files are known, what is said where they are not there, the lists of classes."""

from __future__ import annotations

import hashlib
import itertools
import json
from importlib.resources import files

import pytest
from data_files import refused, refuses

from diffopt.tasks import CIFARFS, FC100, MNIST, Caltech101, MiniImageNet, Omniglot, ProblemError, TieredImageNet
from diffopt.tasks.class_lists import class_list, superclasses
from diffopt.tasks.data import CHUNK, KnownFile, read_one_of

CIFAR = ("expected cifar-100-python.tar.gz or the folder cifar-100-python extracted", "www.cs.toronto.edu")
MINI = ("cache-val.pkl", "-validation.pkl", "val.csv beside the pictures or mini-imagenet.tar.gz", "image-net.org")
VINYALS = ("expected omniglot_28.npz (the official zips do not know the Vinyals splits);",)
TIERED = ("val_images_png.pkl and val_labels.pkl or tiered-imagenet.tar", "image-net.org", "12.9 GB")
MISSING = [
    (Omniglot, "Omniglot", "background", ("omniglot_28.npz", "images_background_small1.zip", "github.com/brendenlake")),
    (Omniglot, "Omniglot", "evaluation", ("expected omniglot_28.npz or images_evaluation.zip;",)),
    (Omniglot, "Omniglot", "vinyals-train", VINYALS),
    (Caltech101, "Caltech-101", "test", ("expected caltech101_32.npz", "https://data.caltech.edu", "`class_split`")),
    (CIFARFS, "CIFAR-FS", "test", CIFAR),
    (FC100, "FC100", "test", CIFAR),
    (MiniImageNet, "miniImageNet", "validation", MINI),
    (TieredImageNet, "tieredImageNet", "validation", TIERED),
    (MNIST, "MNIST", "validation", ("mnist.npz", "train-images-idx3-ubyte.gz", "https://storage", "https://oss")),
    (MNIST, "MNIST", "test", ("t10k-labels-idx1-ubyte.gz",)),
]
"""The set, its name, a split, and what the message must hold."""


@pytest.mark.parametrize(("data_set", "name", "split", "parts"), MISSING)
def test_missing_data_says_what_to_do(data_set, name, split, parts, tmp_path):
    for one in ("val_labels.pkl", "train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / one).touch()  # one of two is none
    with refused(f"no {name} data for split '{split}' in .*: it has none of the accepted files, expected") as error:
        data_set.load(tmp_path, split=split)
    for part in (str(tmp_path), *parts, "--data-dir", "DIFFOPT_DATA"):
        assert part in str(error.value)
    with refused("there is no such folder") as error:
        data_set.load(tmp_path / "absent", split=split)
    assert str(tmp_path / "absent") in str(error.value)


SETS = [CIFARFS, FC100, MiniImageNet, TieredImageNet, Caltech101, MNIST]


@pytest.mark.parametrize("data_set", SETS)
def test_splits_and_sizes_that_no_set_has_are_refused_first(data_set, tmp_path):
    loads = [data_set.load, data_set.from_archive] if data_set in (CIFARFS, FC100) else [data_set.load]
    for load in loads:
        refuses("split is 'val', expected one of train, validation, test", load, tmp_path, split="val")
        for size in (0, -1):
            message = f"size is {size}, expected the height and width of the images, 1 or more"
            refuses(message, load, tmp_path, split="test", size=size, kind=ProblemError)
    refuses("expected one of background, evaluation, vinyals-train, vinyals-v", Omniglot.load, tmp_path, split="train")


OTHERS = [
    (Omniglot, "vinyals-test", "omniglot_28.npz", "5 bytes, expected 5,524,973"),
    (Omniglot, "background", "images_background.zip", "5 bytes, expected 9,464,212"),
    (Caltech101, "test", "caltech101_32.npz", "5 bytes, expected 16,497,180"),
    (MNIST, "test", "mnist.npz", "5 bytes, expected 11,490,434 or 11,490,519"),
    (CIFARFS, "train", "cifar-100-python.tar.gz", "5 bytes, expected 169,001,437; the download was cut short"),
    (MiniImageNet, "train", "mini-imagenet.tar.gz", r"MD5 \w+, expected b38f1eb4251fb9459ecc8e7febf9b2eb"),
    (TieredImageNet, "train", "tiered-imagenet.tar", r"MD5 \w+, expected e07e811b9f29362d159a9edd0d838c62"),
]


@pytest.mark.parametrize(("data_set", "split", "name", "message"), OTHERS)
def test_official_files_are_known_by_size_and_checksum(data_set, split, name, message, tmp_path):
    (tmp_path / name).write_bytes(b"short")
    refuses(f"{name} has {message}", data_set.load, tmp_path, split=split)


def test_a_file_of_the_right_size_is_not_yet_the_right_one(tmp_path):
    with (tmp_path / "cifar-100-python.tar.gz").open("wb") as file:
        file.truncate(169_001_437)  # a hole: takes no room
    refuses(r"has SHA-256 \w+, expected 85cd44d02ba6", FC100.load, tmp_path, split="train")


CONTENT = b"some bytes" * (CHUNK // 4)  # more than two chunks
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


@pytest.mark.parametrize("known", [KnownFile("a", len(CONTENT), SHA256), KnownFile("a", None, md5=MD5)])
def test_the_file_that_is_known_is_taken(known, tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    assert known.read(tmp_path) == CONTENT
    assert known.check(tmp_path) == tmp_path / "a"


@pytest.mark.parametrize("way", ["read", "check"])
def test_every_other_file_is_refused(way, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(CONTENT[:-1] + b"?")
    for known, message in [
        (KnownFile("a", len(CONTENT), SHA256), f"has SHA-256 .*, expected {SHA256}"),
        (KnownFile("a", None, md5=MD5), f"has MD5 .*, expected {MD5}"),
        (KnownFile("a", len(CONTENT), SHA256, MD5), "has SHA-256"),
        (KnownFile("a", 3, SHA256), f"has {len(CONTENT):,} bytes, expected 3"),
        (KnownFile("b", 3, SHA256), "b cannot be read: No such file"),
    ]:
        refuses(message, getattr(known, way), tmp_path)
    (tmp_path / "c").mkdir()
    refuses("c cannot be read: Is a directory", getattr(KnownFile("c", None, SHA256), way), tmp_path)


def test_one_of_several_forms_is_chosen_by_its_size(tmp_path):
    other = KnownFile("a", 5, hashlib.sha256(b"hello").hexdigest())
    known = KnownFile("a", len(CONTENT), SHA256)
    path = tmp_path / "a"
    for content in (CONTENT, b"hello"):
        path.write_bytes(content)
        assert read_one_of((known, other), tmp_path) == content
    path.write_bytes(b"hellp")
    refuses("has SHA-256", read_one_of, (known, other), tmp_path)
    path.write_bytes(b"hell")
    refuses(f"has 4 bytes, expected {len(CONTENT):,} or 5", read_one_of, (known, other), tmp_path)
    refuses("cannot be read", read_one_of, (known, other), tmp_path / "absent")


LISTS = {"cifar-fs": (64, 16, 20), "fc100": (60, 20, 20), "mini-imagenet": (64, 16, 20)}
SPLITS = ("train", "validation", "test")


def test_the_file_is_sorted_throughout_and_has_twenty_superclasses_of_five():
    content = json.loads((files("diffopt.tasks") / "classes.json").read_text(encoding="utf-8"))
    assert list(content) == sorted(content) == ["cifar-100", *LISTS]
    for lists in content.values():
        assert list(lists) == sorted(lists)
        assert all(names == sorted(set(names)) for names in lists.values())
    assert [len(names) for names in superclasses().values()] == [5] * 20


@pytest.mark.parametrize("data_set", LISTS)
def test_splits_have_the_published_sizes_and_no_class_in_common(data_set):
    lists = [class_list(data_set, split) for split in SPLITS]
    assert tuple(map(len, lists)) == LISTS[data_set]
    assert all(list(names) == sorted(names) for names in lists)
    assert len(set(itertools.chain(*lists))) == 100
    if data_set == "mini-imagenet":
        assert all(name[0] == "n" and name[1:].isdigit() and len(name) == 9 for names in lists for name in names)
    else:
        above = {name: superclass for superclass, names in superclasses().items() for name in names}
        assert set(itertools.chain(*lists)) == set(above)
        if data_set == "fc100":
            counts = [len({above[name] for name in names}) for names in lists]
            assert counts == [12, 4, 4], "no superclass is in two splits"


@pytest.mark.data
def test_lists_are_the_collected_facts(data_folder):
    path = data_folder / "splits.json"
    if not path.is_file():
        pytest.skip("the collected class lists are not here")
    facts = json.loads(path.read_text(encoding="utf-8"))
    old = dict(zip(SPLITS, ("train", "val", "test"), strict=True))
    for split in SPLITS:
        fc100 = facts["fc100"][old[split]]["classes"]
        published = (facts["cifar_fs"][old[split]], fc100, facts["mini_imagenet_ravi"][old[split]])
        assert [list(class_list(name, split)) for name in LISTS] == list(map(sorted, published))
    cifar = facts["cifar100"]
    coarse = cifar["coarse_label_names_in_official_order"]
    for name, place in zip(cifar["fine_label_names_in_official_order"], cifar["fine_to_coarse"], strict=True):
        assert name in superclasses()[coarse[place]]
