"""Data folders that hold what no data set is: pipes, devices, members of any size, names that cannot be."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffopt.tasks import (
    CIFARFS,
    FC100,
    MNIST,
    Caltech101,
    DataError,
    MiniImageNet,
    Omniglot,
    TieredImageNet,
    omniglot_archive,
)
from diffopt.tasks.data import KnownFile, open_file

DRAWING = "images_background/Greek/character01/0001_01.png"
Load = Callable[[Path], object]
LOADS: dict[str, Load] = {
    "omniglot_28.npz": lambda folder: Omniglot.load(folder, split="background"),
    "images_background.zip": lambda folder: Omniglot.load(folder, split="background"),
    "mnist.npz": lambda folder: MNIST.load(folder, split="train"),
    "caltech101_32.npz": lambda folder: Caltech101.load(folder, split="train"),
    "cifar-100-python.tar.gz": lambda folder: CIFARFS.load(folder, split="train"),
    "cifar-100-python/meta": lambda folder: FC100.load(folder, split="train"),
    "mini-imagenet-cache-train.pkl": lambda folder: MiniImageNet.load(folder, split="train"),
    "train.csv": lambda folder: MiniImageNet.load(folder, split="train"),
    "mini-imagenet.tar.gz": lambda folder: MiniImageNet.load(folder, split="train"),
    "train_labels.pkl": lambda folder: TieredImageNet.load(folder, split="train"),
    "tiered-imagenet.tar": lambda folder: TieredImageNet.load(folder, split="train"),
}
"""The file that each set looks at first, and the call that does."""
BESIDE = {
    "cifar-100-python/meta": ("cifar-100-python/train", "cifar-100-python/test"),
    "train_labels.pkl": ("train_images_png.pkl",),
}


def drawing(size: tuple[int, int] = (105, 105), kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.zeros(size, dtype=np.uint8)).save(content, format=kind)
    return content.getvalue()


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", LOADS)
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
    with pytest.raises(
        DataError, match=r"Is a directory|has .* bytes; expected" if kind == "folder" else "it is a pipe or"
    ):
        LOADS[name](tmp_path)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("folder", ["a" * 300, "~no such user/data", "a\0b"], ids=["long", "user", "zero"])
def test_a_folder_that_cannot_be_is_a_typed_error(load, folder):
    with pytest.raises(DataError, match=r"expected a|there is no such folder"):
        load(folder)


def test_an_archive_of_drawings_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    with pytest.raises(DataError, match=r"a\.zip cannot be read: it is a pipe or a device, expected a file"):
        Omniglot.from_archives([tmp_path / "a.zip"])
    with pytest.raises(DataError, match="it is a pipe"):
        open_file(tmp_path / "a.zip")


def test_a_drawing_that_unpacks_to_gigabytes_is_refused_by_its_size(tmp_path):
    path = zipped(tmp_path / "a.zip", {DRAWING: b""})
    limit = omniglot_archive.LARGEST_DRAWING
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(DRAWING, "w") as file:
        for _ in range(2 + limit // 10_000):
            file.write(bytes(10_000))
    with pytest.raises(DataError, match=rf"holds {DRAWING} with .* bytes, expected a drawing of {limit:,} at most"):
        Omniglot.from_archives([path])


def test_a_drawing_that_is_larger_than_it_claims_gives_no_more_than_that(tmp_path):
    path = zipped(tmp_path / "a.zip", {DRAWING: drawing() + bytes(200_000)})
    content, size = path.read_bytes(), struct.pack("<I", len(drawing()) + 200_000)
    assert content.count(size) == 2  # before the member and in the list at the end
    path.write_bytes(content.replace(size, struct.pack("<I", 300)))
    with pytest.raises(DataError, match=r"cannot be read .*expected a zip; download it again"):
        Omniglot.from_archives([path])


def test_a_zip_beyond_all_drawings_is_not_even_opened(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", {DRAWING: drawing()})
    monkeypatch.setattr(omniglot_archive, "LARGEST_ZIP", path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"expected .* at most; this is another file"):
        Omniglot.from_archives([path])


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_only_the_decoder_of_png_is_tried(tmp_path, kind):
    path = zipped(tmp_path / "a.zip", {DRAWING: drawing(kind=kind)})
    with pytest.raises(DataError, match="is not a readable image"):
        Omniglot.from_archives([path])


def test_texts_in_a_png_that_unpack_to_much_are_refused(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    content = drawing()
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000), 9))
    path = zipped(tmp_path / "a.zip", {DRAWING: content[:33] + text + content[33:]})
    with pytest.raises(DataError, match="is not a readable image"):
        Omniglot.from_archives([path])


@pytest.mark.parametrize("flag", [1, 64])
def test_an_encrypted_drawing_is_a_typed_error(tmp_path, flag):
    path = zipped(tmp_path / "a.zip", {DRAWING: drawing()})
    content = bytearray(path.read_bytes())
    for start, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(start) + place] |= flag
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"cannot be read .*expected a zip; download it again"):
        Omniglot.from_archives([path])


def test_a_method_of_packing_that_is_not_known_is_a_typed_error(tmp_path):
    path = zipped(tmp_path / "a.zip", {DRAWING: drawing()})
    content = bytearray(path.read_bytes())
    for start, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        content[content.index(start) + place] = 99
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"cannot be read .*expected a zip; download it again"):
        Omniglot.from_archives([path])


def test_a_file_of_unknown_size_is_read_up_to_a_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    known = KnownFile("a", None, md5="827ccb0eea8a706c4c34a16891f84e7b")
    assert known.read(tmp_path, limit=5) == b"12345"
    with pytest.raises(DataError, match="has 5 bytes, expected 4 at most"):
        known.read(tmp_path, limit=4)
