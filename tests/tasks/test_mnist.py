"""MNIST from small files of both forms made here, and from the real file where it is."""

from __future__ import annotations

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from diffopt.tasks import MNIST, DataError, ProblemError, mnist, sample_episodes
from diffopt.tasks.data import KnownFile


def known(path):
    content = path.read_bytes()
    return KnownFile(path.name, len(content), md5=hashlib.md5(content).hexdigest())


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def made(monkeypatch):
    """70 training and 20 test digits, of which the first 50 are for training."""
    monkeypatch.setattr(mnist, "TRAINING", 50)
    generator = np.random.default_rng(1)
    return {
        "x_train": generator.integers(0, 256, (70, 28, 28), dtype=np.uint8),
        "y_train": generator.permutation(np.arange(70) % 10).astype(np.uint8),
        "x_test": generator.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "y_test": (np.arange(20) % 10).astype(np.uint8),
    }


def write_npz(folder, arrays, monkeypatch):
    np.savez_compressed(folder / "mnist.npz", **arrays)
    monkeypatch.setattr(mnist, "SINGLE_FILES", (known(folder / "mnist.npz"),))


def write_idx(folder, arrays, monkeypatch):
    for name, official, half in (("OFFICIAL_TRAIN", "train", "train"), ("OFFICIAL_TEST", "t10k", "test")):
        images, labels = folder / f"{official}-images-idx3-ubyte.gz", folder / f"{official}-labels-idx1-ubyte.gz"
        images.write_bytes(idx(arrays[f"x_{half}"]))
        labels.write_bytes(idx(arrays[f"y_{half}"]))
        monkeypatch.setattr(mnist, name, (known(images), known(labels)))


@pytest.mark.parametrize("write", [write_npz, write_idx])
def test_both_forms_give_the_same_splits(write, made, tmp_path, monkeypatch):
    write(tmp_path, made, monkeypatch)
    expected = {
        "train": (made["x_train"][:50], made["y_train"][:50]),
        "validation": (made["x_train"][50:], made["y_train"][50:]),
        "test": (made["x_test"], made["y_test"]),
    }
    for split, (images, labels) in expected.items():
        loaded = MNIST.load(tmp_path, split=split)
        assert loaded.images.dtype == torch.uint8
        assert loaded.labels.dtype == torch.int64
        assert np.array_equal(loaded.images.numpy(), images)
        assert loaded.labels.tolist() == labels.tolist()
        assert len(loaded.sources) == (1 if write is write_npz else 2)
    loaded.images[0] = 0  # belongs to the caller, and is writable


def test_a_size_and_episodes(made, tmp_path, monkeypatch, generator):
    write_npz(tmp_path, made, monkeypatch)
    small = MNIST.load(tmp_path, split="test", size=14)
    expected = np.asarray(Image.fromarray(made["x_test"][7]).resize((14, 14), Image.Resampling.BILINEAR))
    assert np.array_equal(small.images[7].numpy(), expected)
    images = small.by_class()
    assert images.counts.tolist() == [2] * 10
    for digit in range(10):
        assert np.array_equal(images[digit].numpy(), small.images[small.labels == digit].numpy())
    episodes = sample_episodes(images, way=10, shot=1, query=1, tasks=1, generator=generator)
    assert episodes.support_inputs.shape == (1, 10, 1, 14, 14)


BROKEN = {
    "wrong shape": ({"x_test": np.zeros((20, 28, 27), np.uint8)}, r"images \(20, 28, 27\) .*, expected \[images, 28"),
    "too few labels": ({"y_test": np.zeros(19, np.uint8)}, r"with labels \(19,\)"),
    "labels beyond nine": ({"y_test": np.full(20, 10, np.uint8)}, "as many labels, 0 to 9"),
}


@pytest.mark.parametrize("write", [write_npz, write_idx])
@pytest.mark.parametrize("name", BROKEN)
def test_files_of_another_content_are_refused(name, write, made, tmp_path, monkeypatch):
    change, message = BROKEN[name]
    write(tmp_path, made | change, monkeypatch)
    with pytest.raises(DataError, match=message):
        MNIST.load(tmp_path, split="test")


def test_numpy_archives_without_an_array_or_of_another_dtype_are_refused(made, tmp_path, monkeypatch):
    write_npz(tmp_path, {"x_train": made["x_train"]}, monkeypatch)
    with pytest.raises(DataError, match=r"mnist\.npz holds 'x_train', expected x_test, y_test too"):
        MNIST.load(tmp_path, split="test")
    write_npz(tmp_path, made | {"x_test": made["x_test"] / 255}, monkeypatch)
    with pytest.raises(DataError, match="holds x_test as float64"):
        MNIST.load(tmp_path, split="test")


def test_official_files_that_are_not_of_the_form_are_refused(monkeypatch):
    whole = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert mnist.idx_array(whole, "a", 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(DataError, match="a begins with 00000802, expected 00000803"):
        mnist.idx_array(whole, "a", 3)
    with pytest.raises(DataError, match="a begins with , expected"):
        mnist.idx_array(gzip.compress(b""), "a", 2)
    with pytest.raises(DataError, match=r"a has 5 values, expected as many as its shape \(2, 3\) has"):
        mnist.idx_array(gzip.compress(gzip.decompress(whole)[:-1]), "a", 2)
    for end in (0, 5, len(whole) - 3):
        with pytest.raises(DataError, match=r"cannot be unpacked .* damaged|a begins with ,"):
            mnist.idx_array(whole[:end], "a", 2)
    monkeypatch.setattr(mnist, "LARGEST", 1000)
    with pytest.raises(DataError, match=r"a has 993 values, expected as many as its shape \(5000000,\) has"):
        mnist.idx_array(idx(np.zeros(5_000_000, np.uint8)), "a", 1)


def test_missing_data_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"no MNIST data for split 'validation' in .*: it has none of the") as error:
        MNIST.load(tmp_path, split="validation")
    for part in (
        str(tmp_path),
        "mnist.npz",
        "train-images-idx3-ubyte.gz",
        "https://storage",
        "https://oss",
        "--data-dir",
    ):
        assert part in str(error.value)
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz"):
        MNIST.load(tmp_path, split="test")
    (tmp_path / "mnist.npz").write_bytes(b"short")
    with pytest.raises(DataError, match="has 5 bytes, expected 11,490,434 or 11,490,519"):
        MNIST.load(tmp_path, split="test")
    with pytest.raises(DataError, match="split is 'background'"):
        MNIST.load(tmp_path, split="background")
    with pytest.raises(ProblemError, match="size is -1"):
        MNIST.load(tmp_path, split="test", size=-1)


@pytest.mark.data
def test_the_real_file(data_folder, generator):
    loaded = {split: MNIST.load(data_folder, split=split) for split in ("train", "validation", "test")}
    assert {split: len(one.images) for split, one in loaded.items()} == {
        "train": 50_000,
        "validation": 10_000,
        "test": 10_000,
    }
    # The counts of digits in the official halves, as published with the data.
    official = torch.bincount(loaded["train"].labels) + torch.bincount(loaded["validation"].labels)
    assert official.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(loaded["test"].labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert loaded["train"].labels[:5].tolist() == [5, 0, 4, 1, 9]
    # The usual constants for normalising, over all training images.
    pixels = torch.cat([loaded["train"].images, loaded["validation"].images]).double() / 255
    assert float(pixels.mean()) == pytest.approx(0.1307, abs=5e-5)
    assert float(pixels.std()) == pytest.approx(0.3081, abs=5e-5)
    episodes = sample_episodes(loaded["test"].by_class(), way=5, shot=5, query=5, tasks=3, generator=generator)
    assert episodes.query_inputs.shape == (3, 25, 1, 28, 28)
