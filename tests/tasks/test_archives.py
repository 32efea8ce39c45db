"""Archives: members are read where they lie, and no claim about a size is believed."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from diffopt.tasks import DataError
from diffopt.tasks.archives import npz_arrays, tar_members

WANTED = {"set/train": 100, "set/meta": 100}


def member(name, content=b"", **fields):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry, content


def write_tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for entry, content in members:
            archive.addfile(entry, io.BytesIO(content))
    return path


def contents(path, wanted=WANTED, limit=10_000_000):
    return {one.name: one.stream.read() for one in tar_members(path, wanted, limit)}


USUAL = [
    member("set", type=tarfile.DIRTYPE),
    member("set/readme", b"x" * 3000),
    member("./set/train", b"a" * 100),
    member("set/meta", b"b"),
]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_wanted_members_are_read_in_order(mode, tmp_path):
    path = write_tar(tmp_path / "a.tar", [*USUAL, member("set/later", b"c" * 5_000_000)], mode)
    assert contents(path) == {"set/train": b"a" * 100, "set/meta": b"b"}
    assert contents(path, limit=20_000) == contents(path), "what lies behind the last wanted file is not unpacked"


def test_nothing_is_written_wherever_members_claim_to_lie(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    elsewhere = tmp_path / "elsewhere"
    members = [
        member("../elsewhere", b"evil"),
        member(str(elsewhere), b"evil"),
        member("set/link", type=tarfile.SYMTYPE, linkname=str(tmp_path)),
        member("set/link/elsewhere", b"evil"),
        *USUAL,
    ]
    path = write_tar(inside / "a.tar", members)
    assert contents(path) == {"set/train": b"a" * 100, "set/meta": b"b"}
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
    path = write_tar(tmp_path / "a.tar", [*USUAL[:2], member("set/meta", b"b"), member("set/train", **fields)])
    with pytest.raises(DataError, match="has no file set/train"):
        contents(path)


def test_sizes_above_their_limits_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [member("set/train", b"a" * 101)])
    with pytest.raises(DataError, match="holds set/train with 101 bytes, expected 100 at most"):
        contents(path)
    one_large = [member("set/zeros", bytes(50_000_000))]
    many = [member(f"set/{number}", bytes(900_000)) for number in range(50)]
    for members, message in (
        (one_large, "claims a file of 50,000,000 bytes"),
        (many, "unpacks to more bytes than .*, expected 1,000,000 at most"),
    ):
        bomb = write_tar(tmp_path / "bomb.tar", [*members, *USUAL])
        assert bomb.stat().st_size < 100_000
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=message):
                contents(bomb, limit=1_000_000)
            assert tracemalloc.get_traced_memory()[1] < 3_000_000
        finally:
            tracemalloc.stop()


def header_with_size(size):
    """A tar header of the GNU form, which can say negative sizes; tarfile itself refuses to write them."""
    entry, _ = member("set/readme", b"")
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size & (2**88 - 1)).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize("size", [-1, -512, -1024])
def test_a_negative_size_does_not_go_round_for_ever(size, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header_with_size(0) + header_with_size(size) + bytes(10240))
    with pytest.raises(
        DataError, match=r"claims a file of -[\d,]+ bytes, expected 0 to 10,000,000; the archive is damaged"
    ):
        contents(path)


def test_a_huge_size_takes_neither_memory_nor_time(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header_with_size(2**60) + bytes(10240))
    with pytest.raises(
        DataError,
        match=r"claims a file of 1,152,921,504,606,846,976 bytes, expected 0 to 10,000,000; the archive is damaged",
    ):
        contents(path)


def test_members_lacking_twice_or_missing(tmp_path):
    with pytest.raises(DataError, match=r"has no file set/meta or set/train, expected .*; this is another archive"):
        contents(write_tar(tmp_path / "a.tar", [member("other", b"")]))
    with pytest.raises(DataError, match="holds set/train twice"):
        contents(write_tar(tmp_path / "b.tar", [USUAL[2], USUAL[2], USUAL[3]]))
    with pytest.raises(DataError, match=r"absent\.tar cannot be read: No such file"):
        contents(tmp_path / "absent.tar")
    with pytest.raises(DataError, match="cannot be read"):
        contents(tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_wherever_an_archive_is_cut_it_is_refused(mode, tmp_path):
    noise = np.random.default_rng(0).bytes(3000)
    whole = write_tar(tmp_path / "whole.tar", [member("set/readme", noise), *USUAL], mode).read_bytes()
    needed = len(whole) if mode == "w:gz" else whole.index(b"b" + bytes(511)) + 40
    path = tmp_path / "cut.tar"
    for end in range(0, needed - 40, 97):
        path.write_bytes(whole[:end])
        with pytest.raises((DataError, EOFError, zlib.error, tarfile.TarError)) as error:
            contents(path)
        # A cut within a wanted member shows while its reader reads it, and is that reader's to name.
        assert isinstance(error.value, DataError) or end > 1500
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 0xFF
    path.write_bytes(gzip.compress(b"not a tar" * 100))
    with pytest.raises(DataError, match="cannot be read as a tar"):
        contents(path)


def write_npz(path: Path, **arrays) -> bytes:
    np.savez_compressed(path, **arrays)
    return path.read_bytes()


EXPECTED = {"images": ("u1", 2), "names": ("U", 1)}


def test_arrays_of_a_numpy_archive(tmp_path):
    images, names = np.arange(6, dtype=np.uint8).reshape(2, 3), np.array(["a", "bc"])
    content = write_npz(tmp_path / "a.npz", images=images, names=names, other=np.zeros(3))
    found = npz_arrays(content, "a.npz", EXPECTED, 10_000)
    assert sorted(found) == ["images", "names"]
    np.testing.assert_array_equal(found["images"], images)
    np.testing.assert_array_equal(found["names"], names)


def test_numpy_archives_that_are_not_as_expected(tmp_path):
    path = tmp_path / "a.npz"
    images, names = np.zeros((2, 3), np.uint8), np.array(["a"])
    with pytest.raises(DataError, match=r"a\.npz holds 'images', expected names too"):
        npz_arrays(write_npz(path, images=images), "a.npz", EXPECTED, 10_000)
    with pytest.raises(DataError, match=r"holds images as int64 of shape \(2, 3\), expected 2 axes of u1"):
        npz_arrays(write_npz(path, images=images.astype(int), names=names), "a.npz", EXPECTED, 10_000)
    with pytest.raises(DataError, match=r"holds images as uint8 of shape \(6,\)"):
        npz_arrays(write_npz(path, images=images.ravel(), names=names), "a.npz", EXPECTED, 10_000)
    with pytest.raises(DataError, match=r"unpacks to 20,\d+ bytes, expected 10,000 at most"):
        npz_arrays(write_npz(path, images=np.zeros((2, 10_000), np.uint8), names=names), "a.npz", EXPECTED, 10_000)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        npz_arrays(write_npz(path, images=images, names=names)[:-30], "a.npz", EXPECTED, 10_000)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        npz_arrays(b"", "a.npz", EXPECTED, 10_000)


class Marks:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_objects_in_a_numpy_archive_are_not_unpickled(tmp_path):
    mark = tmp_path / "mark"
    objects = np.array([Marks(mark), None], dtype=object)
    content = write_npz(tmp_path / "a.npz", images=objects, names=np.array(["a"]))
    with pytest.raises(DataError, match=r"cannot be read as \.npz .*allow_pickle=False"):
        npz_arrays(content, "a.npz", EXPECTED, 10_000)
    assert not mark.exists()
    np.load(io.BytesIO(content), allow_pickle=True)["images"]
    assert mark.exists(), "which would have run it"


def test_a_header_that_claims_more_than_there_is(tmp_path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976, 2)}"
    padded = header + b" " * (117 - len(header)) + b"\n"
    lying = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + b"x"
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", lying)
        archive.writestr("names.npy", lying)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        npz_arrays(path.read_bytes(), "a.npz", EXPECTED, 10_000)
