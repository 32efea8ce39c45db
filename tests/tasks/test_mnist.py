"""MNIST from small files of both forms made here, and from the real file where it is."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from data_files import brought, known, refuses

from diffopt.tasks import MNIST, mnist

GENERATOR = np.random.default_rng(1)
MADE = {
    "x_train": GENERATOR.integers(0, 256, (70, 28, 28), dtype=np.uint8),
    "y_train": GENERATOR.permutation(np.arange(70) % 10).astype(np.uint8),
    "x_test": GENERATOR.integers(0, 256, (20, 28, 28), dtype=np.uint8),
    "y_test": (np.arange(20) % 10).astype(np.uint8),
}
"""70 training and 20 test digits; in these tests the first 50 are for training."""


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture(params=["npz", "idx"])
def write(request, tmp_path, monkeypatch):
    """Writes arrays in one of the two forms."""
    monkeypatch.setattr(mnist, "TRAINING", 50)

    def npz(arrays=MADE):
        np.savez_compressed(tmp_path / "mnist.npz", **arrays)
        monkeypatch.setattr(mnist, "SINGLE_FILES", (known(tmp_path / "mnist.npz"),))

    def official(arrays=MADE):
        for name, start, half in (("OFFICIAL_TRAIN", "train", "train"), ("OFFICIAL_TEST", "t10k", "test")):
            paths = [tmp_path / f"{start}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
            for path, key in zip(paths, ("x", "y"), strict=True):
                path.write_bytes(idx(arrays[f"{key}_{half}"]))
            monkeypatch.setattr(mnist, name, tuple(map(known, paths)))

    return npz if request.param == "npz" else official


def test_both_forms_give_the_same_splits(write, tmp_path):
    write()
    expected = {
        "train": (MADE["x_train"][:50], MADE["y_train"][:50]),
        "validation": (MADE["x_train"][50:], MADE["y_train"][50:]),
        "test": (MADE["x_test"], MADE["y_test"]),
    }
    for split, (images, labels) in expected.items():
        loaded = MNIST.load(tmp_path, split=split)
        assert loaded.images.dtype == torch.uint8
        assert loaded.labels.dtype == torch.int64
        assert np.array_equal(loaded.images.numpy(), images)
        assert loaded.labels.tolist() == labels.tolist()
        assert len(loaded.sources) == (1 if write.__name__ == "npz" else 2)
    loaded.images[0] = 0  # belongs to the caller, and is writable


def test_a_size_and_images_by_class(write, tmp_path):
    write()
    small = MNIST.load(tmp_path, split="test", size=14)
    assert np.array_equal(small.images[7].numpy(), brought(MADE["x_test"][7], 14))
    images = small.by_class()
    assert images.counts.tolist() == [2] * 10
    for digit in range(10):
        assert np.array_equal(images[digit].numpy(), small.images[small.labels == digit].numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_test": np.zeros((20, 28, 27), np.uint8)}, r"images \(20, 28, 27\) .*, expected \[images, 28"),
        ({"y_test": np.zeros(19, np.uint8)}, r"with labels \(19,\)"),
        ({"y_test": np.full(20, 10, np.uint8)}, "as many labels, 0 to 9"),
    ],
)
def test_files_of_another_content_are_refused(change, message, write, tmp_path):
    write(MADE | change)
    refuses(message, MNIST.load, tmp_path, split="test")


@pytest.mark.parametrize("write", ["npz"], indirect=True)
def test_numpy_archives_without_an_array_or_of_another_dtype_are_refused(write, tmp_path):
    write({"x_train": MADE["x_train"]})
    refuses(r"mnist\.npz holds 'x_train', expected x_test, y_test too", MNIST.load, tmp_path, split="test")
    write(MADE | {"x_test": MADE["x_test"] / 255})
    refuses("holds x_test as float64", MNIST.load, tmp_path, split="test")


def test_official_files_that_are_not_of_the_form_are_refused(monkeypatch):
    whole = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert mnist.idx_array(whole, "a", 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    refuses("a begins with 00000802, expected 00000803", mnist.idx_array, whole, "a", 3)
    refuses("a begins with , expected", mnist.idx_array, gzip.compress(b""), "a", 2)
    short = gzip.compress(gzip.decompress(whole)[:-1])
    refuses(r"a has 5 values, expected as many as its shape \(2, 3\) has", mnist.idx_array, short, "a", 2)
    for end in (0, 5, len(whole) - 3):
        refuses(r"cannot be unpacked .* damaged|a begins with ,", mnist.idx_array, whole[:end], "a", 2)
    monkeypatch.setattr(mnist, "LARGEST", 1000)
    large = idx(np.zeros(5_000_000, np.uint8))
    refuses(r"a has 993 values, expected as many as its shape \(5000000,\) has", mnist.idx_array, large, "a", 1)


@pytest.mark.data
def test_the_real_file(data_folder):
    loaded = {split: MNIST.load(data_folder, split=split) for split in ("train", "validation", "test")}
    train, validation, test = loaded.values()
    assert [len(one.images) for one in loaded.values()] == [50_000, 10_000, 10_000]
    # The counts of digits in the official halves, as published with the data.
    official = torch.bincount(train.labels) + torch.bincount(validation.labels)
    assert official.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    # The usual constants for normalising, over all training images.
    pixels = torch.cat([train.images, validation.images]).double() / 255
    assert float(pixels.mean()) == pytest.approx(0.1307, abs=5e-5)
    assert float(pixels.std()) == pytest.approx(0.3081, abs=5e-5)
