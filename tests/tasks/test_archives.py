"""Archives: members are read where they lie, and no claim about a size is believed."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_files import little_memory, refused, refuses, write_tar, write_zip

from diffopt.tasks import DataError
from diffopt.tasks.archives import npz_arrays, tar_members

WANTED = {"set/train": 100, "set/meta": 100}


def contents(path, limit=10_000_000):
    return {one.name: one.stream.read() for one in tar_members(path, WANTED, limit)}


START = {"set": {"type": tarfile.DIRTYPE}, "set/readme": b"x" * 3000}
USUAL = START | {"./set/train": b"a" * 100, "set/meta": b"b"}
FOUND = {"set/train": b"a" * 100, "set/meta": b"b"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_wanted_members_are_read_in_order(mode, tmp_path):
    path = write_tar(tmp_path / "a.tar", USUAL | {"set/later": b"c" * 5_000_000}, mode)
    assert contents(path) == FOUND
    assert contents(path, limit=20_000) == FOUND, "what lies behind the last wanted file is not unpacked"


def test_nothing_is_written_wherever_members_claim_to_lie(tmp_path):
    (tmp_path / "inside").mkdir()
    evil = dict.fromkeys(["../elsewhere", str(tmp_path / "elsewhere"), "set/link/elsewhere"], b"evil")
    link = {"set/link": {"type": tarfile.SYMTYPE, "linkname": str(tmp_path)}}
    assert contents(write_tar(tmp_path / "inside" / "a.tar", link | evil | USUAL)) == FOUND
    assert {one.name for one in tmp_path.rglob("*")} == {"inside", "a.tar"}


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "set/readme"},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.CHRTYPE},
        {"type": tarfile.DIRTYPE},
    ],
)
def test_what_is_no_plain_file_is_not_a_wanted_file(fields, tmp_path):
    path = write_tar(tmp_path / "a.tar", START | {"set/meta": b"b", "set/train": fields})
    refuses("has no file set/train", contents, path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"set/train": b"a" * 101}, "holds set/train with 101 bytes, expected 100 at most"),
        ({"set/zeros": bytes(50_000_000)}, "claims a file of 50,000,000 bytes"),
        ({f"set/{i}": bytes(900_000) for i in range(50)}, "unpacks to more bytes than .*, expected 1,000,000 at most"),
    ],
    ids=["wanted", "one large", "many"],
)
def test_sizes_above_their_limits_are_refused(members, message, tmp_path):
    bomb = write_tar(tmp_path / "bomb.tar", members | USUAL)
    assert bomb.stat().st_size < 100_000
    with little_memory(3_000_000), refused(message):
        contents(bomb, limit=1_000_000)


def header_with_size(size):
    """A tar header of the GNU form, which can say negative sizes; tarfile itself refuses to write them."""
    block = bytearray(tarfile.TarInfo("set/readme").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size & (2**88 - 1)).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize("size", [-1, -512, -1024, 2**60])
def test_a_size_that_is_negative_or_huge_takes_neither_memory_nor_time(size, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header_with_size(0) + header_with_size(size) + bytes(10240))
    refuses(rf"claims a file of {size:,} bytes, expected 0 to 10,000,000; the archive is damaged", contents, path)


def test_members_lacking_twice_or_missing(tmp_path):
    message = "has no file set/meta or set/train, expected .*; this is another archive"
    refuses(message, contents, write_tar(tmp_path / "a.tar", {"other": b""}))
    refuses("holds set/train twice", contents, write_tar(tmp_path / "b.tar", {"set/train": b"a"} | USUAL))
    refuses(r"absent\.tar cannot be read: No such file", contents, tmp_path / "absent.tar")
    refuses("cannot be read", contents, tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_wherever_an_archive_is_cut_it_is_refused(mode, tmp_path):
    noise = np.random.default_rng(0).bytes(3000)
    whole = write_tar(tmp_path / "whole.tar", {"set/noise": noise} | USUAL, mode).read_bytes()
    needed = len(whole) if mode == "w:gz" else whole.index(b"b" + bytes(511)) + 40
    path = tmp_path / "cut.tar"
    for end in range(0, needed - 40, 97):
        path.write_bytes(whole[:end])
        with pytest.raises((DataError, EOFError, zlib.error, tarfile.TarError)) as error:
            contents(path)
        # A cut within a wanted member shows while its reader reads it, and is that reader's to name.
        assert isinstance(error.value, DataError) or end > 1500
    path.write_bytes(gzip.compress(b"not a tar" * 100))
    refuses("cannot be read as a tar", contents, path)


IMAGES, NAMES = np.arange(6, dtype=np.uint8).reshape(2, 3), np.array(["a", "bc"])


def npz(**arrays):
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def read(content):
    return npz_arrays(content, "a.npz", {"images": ("u1", 2), "names": ("U", 1)}, 10_000)


def test_arrays_of_a_numpy_archive():
    found = read(npz(images=IMAGES, names=NAMES, other=np.zeros(3)))
    assert sorted(found) == ["images", "names"]
    np.testing.assert_array_equal(found["images"], IMAGES)
    np.testing.assert_array_equal(found["names"], NAMES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz(images=IMAGES), r"a\.npz holds 'images', expected names too"),
        (npz(images=IMAGES.astype(int), names=NAMES), r"holds images as int64 of shape \(2, 3\), expected 2 axes of u"),
        (npz(images=IMAGES.ravel(), names=NAMES), r"holds images as uint8 of shape \(6,\)"),
        (npz(images=np.zeros((2, 10_000)), names=NAMES), r"unpacks to 160,\d+ bytes, expected 10,000 at most"),
        (npz(images=IMAGES, names=NAMES)[:-30], r"cannot be read as \.npz"),
        (b"", r"cannot be read as \.npz"),
    ],
    ids=["lacking", "dtype", "axes", "size", "cut", "empty"],
)
def test_numpy_archives_that_are_not_as_expected(content, message):
    refuses(message, read, content)


class Marks:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_objects_in_a_numpy_archive_are_not_unpickled(tmp_path):
    mark = tmp_path / "mark"
    content = npz(images=np.array([Marks(mark), None], dtype=object), names=NAMES)
    refuses(r"cannot be read as \.npz .*allow_pickle=False", read, content)
    assert not mark.exists()
    np.load(io.BytesIO(content), allow_pickle=True)["images"]
    assert mark.exists(), "which would have run it"


def test_a_header_that_claims_more_than_there_is(tmp_path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976, 2)}"
    padded = header + b" " * (117 - len(header)) + b"\n"
    lying = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + b"x"
    path = write_zip(tmp_path / "a.npz", {"images.npy": lying, "names.npy": lying})
    refuses(r"cannot be read as \.npz", read, path.read_bytes())
