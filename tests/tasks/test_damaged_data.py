"""Data folders that hold what no data set is: pipes, devices, members of any size, names that cannot be."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
from data_files import encoded, refuses, write_zip

from diffopt.tasks import CIFARFS, FC100, MNIST, Caltech101, MiniImageNet, Omniglot, TieredImageNet, omniglot_archive
from diffopt.tasks.data import KnownFile, open_file

FIRST = {
    "omniglot_28.npz": Omniglot,
    "images_background.zip": Omniglot,
    "mnist.npz": MNIST,
    "caltech101_32.npz": Caltech101,
    "cifar-100-python.tar.gz": CIFARFS,
    "cifar-100-python/meta": FC100,
    "mini-imagenet-cache-train.pkl": MiniImageNet,
    "train.csv": MiniImageNet,
    "mini-imagenet.tar.gz": MiniImageNet,
    "train_labels.pkl": TieredImageNet,
    "tiered-imagenet.tar": TieredImageNet,
}
"""A file that is looked at first, and the set that does."""
BESIDE = {
    "cifar-100-python/meta": ("cifar-100-python/train", "cifar-100-python/test"),
    "train_labels.pkl": ("train_images_png.pkl",),
}
DRAWING = "images_background/Greek/character01/0001_01.png"
BLANK = np.zeros((105, 105), dtype=np.uint8)
DAMAGED = "cannot be read .*expected a zip; download it again"


def refuses_to_load(message, data_set, folder):
    refuses(message, data_set.load, folder, split="background" if data_set is Omniglot else "train")


@pytest.fixture
def path(tmp_path):
    """A zip of one drawing."""
    return write_zip(tmp_path / "a.zip", {DRAWING: encoded(BLANK)})


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", FIRST)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, name, kind):
    for one in (name, *BESIDE.get(name, ())):
        path = tmp_path / one
        path.parent.mkdir(exist_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")  # which has no end
        else:
            path.mkdir()
    refuses_to_load("Is a directory" if kind == "folder" else "it is a pipe or", FIRST[name], tmp_path)


@pytest.mark.parametrize("data_set", sorted(set(FIRST.values()), key=str))
@pytest.mark.parametrize("folder", ["a" * 300, "~no such user/data", "a\0b"], ids=["long", "user", "zero"])
def test_a_folder_that_cannot_be_is_a_typed_error(data_set, folder):
    refuses_to_load("expected a|there is no such folder", data_set, folder)


def test_an_archive_of_drawings_that_is_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "a.zip"
    os.mkfifo(path)
    refuses(r"a\.zip cannot be read: it is a pipe or a device, expected a file", Omniglot.from_archives, [path])
    refuses("it is a pipe", open_file, path)


def test_a_drawing_that_unpacks_to_gigabytes_is_refused_by_its_size(path):
    limit = omniglot_archive.LARGEST_DRAWING
    write_zip(path, {DRAWING: bytes(limit + 20_000)})
    message = rf"holds {DRAWING} with .* bytes, expected a drawing of {limit:,} at most"
    refuses(message, Omniglot.from_archives, [path])


def test_a_drawing_that_is_larger_than_it_claims_gives_no_more_than_that(path):
    padded = encoded(BLANK) + bytes(200_000)
    write_zip(path, {DRAWING: padded})
    content, size = path.read_bytes(), struct.pack("<I", len(padded))
    assert content.count(size) == 2  # before the member and in the list at the end
    path.write_bytes(content.replace(size, struct.pack("<I", 300)))
    refuses(DAMAGED, Omniglot.from_archives, [path])


def test_a_zip_beyond_all_drawings_is_not_even_opened(path, monkeypatch):
    monkeypatch.setattr(omniglot_archive, "LARGEST_ZIP", path.stat().st_size - 1)
    refuses(r"expected .* at most; this is another file", Omniglot.from_archives, [path])


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_only_the_decoder_of_png_is_tried(path, kind):
    write_zip(path, {DRAWING: encoded(BLANK, kind)})
    refuses("is not a readable image", Omniglot.from_archives, [path])


def test_texts_in_a_png_that_unpack_to_much_are_refused(path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    content = encoded(BLANK)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000), 9))
    write_zip(path, {DRAWING: content[:33] + text + content[33:]})
    refuses("is not a readable image", Omniglot.from_archives, [path])


@pytest.mark.parametrize("flag", [1, 64])
def test_an_encrypted_drawing_is_a_typed_error(path, flag):
    content = bytearray(path.read_bytes())
    for start, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(start) + place] |= flag
    path.write_bytes(bytes(content))
    refuses(DAMAGED, Omniglot.from_archives, [path])


def test_a_method_of_packing_that_is_not_known_is_a_typed_error(path):
    content = bytearray(path.read_bytes())
    for start, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        content[content.index(start) + place] = 99
    path.write_bytes(bytes(content))
    refuses(DAMAGED, Omniglot.from_archives, [path])


def test_a_file_of_unknown_size_is_read_up_to_a_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    known = KnownFile("a", None, md5="827ccb0eea8a706c4c34a16891f84e7b")
    assert known.read(tmp_path, limit=5) == b"12345"
    refuses("has 5 bytes, expected 4 at most", known.read, tmp_path, limit=4)
