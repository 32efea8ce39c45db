"""Files known by size and checksum."""

from __future__ import annotations

import hashlib

import pytest

from diffopt.tasks import DataError
from diffopt.tasks.data import CHUNK, KnownFile, read_one_of

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
        with pytest.raises(DataError, match=message):
            getattr(known, way)(tmp_path)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="c cannot be read: Is a directory"):
        getattr(KnownFile("c", None, SHA256), way)(tmp_path)


def test_one_of_several_forms_is_chosen_by_its_size(tmp_path):
    other = KnownFile("a", 5, hashlib.sha256(b"hello").hexdigest())
    known = KnownFile("a", len(CONTENT), SHA256)
    path = tmp_path / "a"
    for content in (CONTENT, b"hello"):
        path.write_bytes(content)
        assert read_one_of((known, other), tmp_path) == content
    path.write_bytes(b"hellp")
    with pytest.raises(DataError, match="has SHA-256"):
        read_one_of((known, other), tmp_path)
    path.write_bytes(b"hell")
    with pytest.raises(DataError, match=f"has 4 bytes, expected {len(CONTENT):,} or 5"):
        read_one_of((known, other), tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_one_of((known, other), tmp_path / "absent")
