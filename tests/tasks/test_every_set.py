"""What holds for every data set: what is said where its files are not there, or are other ones."""

from __future__ import annotations

import pytest
from data_files import refused

from diffopt.tasks import CIFARFS, FC100, MNIST, Caltech101, MiniImageNet, Omniglot, ProblemError, TieredImageNet

CIFAR = ("expected cifar-100-python.tar.gz, or cifar-100-python/meta", "www.cs.toronto.edu")
MINI = ("mini-imagenet-cache-val.pkl", "-validation.pkl", "val.csv", "mini-imagenet.tar.gz", "image-net.org")
TIERED = ("val_images_png.pkl and val_labels.pkl", "or tiered-imagenet.tar", "image-net.org", "12.9 GB")
MISSING = [
    (Omniglot, "Omniglot", "background", ("omniglot_28.npz", "images_background_small1.zip", "github.com/brendenlake")),
    (Omniglot, "Omniglot", "evaluation", ("expected omniglot_28.npz, or images_evaluation.zip;",)),
    (Omniglot, "Omniglot", "vinyals-train", ("expected omniglot_28.npz;", "do not know the Vinyals splits")),
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
        with refused("split is 'val', expected one of train, validation, test"):
            load(tmp_path, split="val")
        for size in (0, -1):
            with refused(f"size is {size}, expected the height and width of the images, 1 or more", ProblemError):
                load(tmp_path, split="test", size=size)
    with refused("split is 'train', expected one of background, evaluation, vinyals-train, vinyals-v"):
        Omniglot.load(tmp_path, split="train")


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
    with refused(f"{name} has {message}"):
        data_set.load(tmp_path, split=split)


def test_a_file_of_the_right_size_is_not_yet_the_right_one(tmp_path):
    with (tmp_path / "cifar-100-python.tar.gz").open("wb") as file:
        file.truncate(169_001_437)  # a hole: takes no room
    with refused(r"has SHA-256 \w+, expected 85cd44d02ba6"):
        FC100.load(tmp_path, split="train")
