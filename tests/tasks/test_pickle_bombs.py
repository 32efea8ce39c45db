"""Small pickles of which much is made: copies, hashes, depth. All take memory and time in proportion to their size."""

from __future__ import annotations

import io
import pickle
import struct
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest
from data_files import refuses
from python2 import python2_pickle

from diffopt.tasks import DataError, MiniImageNet
from diffopt.tasks.class_lists import class_list
from diffopt.tasks.pickled_arrays import PickledArray, PickledNumber, text
from diffopt.tasks.pickles import array, read_pickle

LENGTH, TIMES = 100_000, 2_000
LONG_BYTES = b"T" + struct.pack("<i", LENGTH) + b"x" * LENGTH
LONG_TEXT = b"X" + struct.pack("<i", LENGTH) + b"x" * LENGTH
DTYPE, ENCODE = b"cnumpy\ndtype\n", b"c_codecs\nencode\n"
SAME_HASH = 2**61 - 1
"""Every multiple of it has the hash 0."""


def read(content):
    return read_pickle(io.BytesIO(content), len(content), "some.pkl")


def discard(content):
    """Reads a pickle and takes it apart again."""
    read(content)


def peak(act, *given):
    """What ``act`` gives, and how many bytes it took at most."""
    tracemalloc.start()
    try:
        value = act(*given)
        return value, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def listed(prepared, repeated):
    """A pickle of a list: first some values, kept under numbers, then what is made of them, again and again."""
    return b"\x80\x02](" + prepared + repeated * TIMES + b"e."


def test_a_string_is_encoded_no_more_often_than_it_is_there():
    latin = b"X\x06\x00\x00\x00latin1"
    content = listed(ENCODE + b"q\x00" + LONG_TEXT + latin + b"\x86q\x01", b"h\x00h\x01R")
    refuses("it encodes more than it holds", read, content)


def test_bytes_that_python_3_encoded_are_all_read():
    names = [bytes([65 + place % 26]) * (1 + place % 7) for place in range(500)]
    for protocol in range(3):
        assert read(pickle.dumps(names, protocol)) == names


def test_a_kind_of_number_with_a_long_name_is_not_copied():
    content = listed(DTYPE + b"q\x00" + LONG_BYTES + b"\x85q\x01", b"h\x00h\x01R")
    found, taken = peak(read, content)
    assert len(found) > TIMES
    assert taken < 10 * len(content)
    refuses("expected plain numbers", array, PickledArray((), found[-1], False, b"x"), "it")


def test_a_kind_of_number_with_a_long_order_is_not_copied():
    state = b"(K\x03" + LONG_BYTES + b"NNNK\x01K\x01K\x00tq\x01"
    content = listed(DTYPE + b"q\x00U\x02u1\x85q\x02" + state, b"h\x00h\x02Rh\x01b")
    found, taken = peak(read, content)
    assert len(found) > TIMES
    assert taken < 10 * len(content)
    assert isinstance(found[-1], PickledNumber)


def test_a_long_name_is_shown_and_compared_in_part():
    assert text(b"x" * 5000) == text("x" * 5000) == "x" * 1000
    with pytest.raises(DataError) as caught:
        read(b"F" + b"x" * LENGTH + b"\n.")
    assert len(str(caught.value)) < 300


def with_keys(*keys):
    """A pickle of a dictionary, protocol 2, with these keys as they are spelled in it."""
    return b"\x80\x02}(" + b"".join(key + b"N" for key in keys) + b"u."


LARGE_KEY = b"\x8b" + struct.pack("<i", LENGTH) + b"\x01" * LENGTH
KEYS = {
    "one hash all": with_keys(*(b"L%dL\n" % (place * SAME_HASH) for place in range(1, 2000))),
    "one hash all, set one by one": b"}"
    + b"".join(b"L%dL\nNs" % (-place * SAME_HASH) for place in range(9, 999))
    + b".",
    "one hash all, in a new dictionary": b"(" + b"".join(b"L%dL\nN" % (n * SAME_HASH) for n in range(9, 999)) + b"d.",
    "a large integer many times": with_keys(LARGE_KEY + b"q\x00", *[b"h\x00"] * TIMES),
    "tuples of shared tuples": with_keys(b")" + b"q\x00h\x00\x86" * 20),
    "a tuple": with_keys(b"K\x01\x85"),
    "a tuple, set alone": b"}K\x01\x85Ns.",
    "a tuple, in a new dictionary": b"(K\x01\x85Nd.",
    "an array": with_keys(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00K\x00tR"),
    "a name": with_keys(b"cnumpy\nndarray\n"),
    "a number with a point": with_keys(b"G?\xf0\x00\x00\x00\x00\x00\x00"),
    "nothing": with_keys(b"N"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_could_take_any_time_to_hash_are_refused(name):
    refuses("a dictionary with other keys, expected strings and integers", read, KEYS[name])


def test_keys_of_64_bits_are_read():
    limit = 2**63 - 1
    keys = (b"L%dL\n" % limit, b"L%dL\n" % -limit, b"U\x01a", b"X\x01\x00\x00\x00a", b"\x88")
    assert list(read(with_keys(*keys))) == [limit, -limit, b"a", "a", True]


@pytest.mark.parametrize("number", [2**63, -1, 2**61 * 2**61])
def test_places_in_the_memo_that_no_pickle_needs_are_refused(number):
    refuses("cannot be read", read, b"]p%d\n." % number)


def test_the_largest_place_in_the_memo_takes_no_memory():
    content = b"]p%d\nr" % (2**63 - 1) + struct.pack("<I", 2**32 - 1) + b"j" + struct.pack("<I", 2**32 - 1) + b"a."
    found, taken = peak(read, content)
    assert found[0] is found
    assert taken < 100_000


DIGITS = {
    "a long integer": b"L" + b"7" * 1_000_000 + b"L\n.",
    "an integer": b"I" + b"7" * 1_000_000 + b"\n.",
    "a place in the memo": b"]p" + b"7" * 1_000_000 + b"\n.",
    "a place to look up": b"]g" + b"7" * 1_000_000 + b"\n.",
}


@pytest.mark.parametrize("name", DIGITS)
def test_a_million_digits_are_refused_at_once(name):
    start = time.process_time()
    refuses("cannot be read", read, DIGITS[name])
    assert time.process_time() - start < 1, "the digits of one integer take time by the square of their number"


DEEP = 20_000
DEPTH = {
    "marks": b"K\x01" + b"(" * DEEP + b"t" * DEEP + b"\x86.",
    "lists": b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "dictionaries": b"}" + b"U\x01a}" * DEEP + b"s" * DEEP + b".",
    "tuples": b")" + b"\x85" * DEEP + b".",
    "arrays": b"(cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nK\x00K\x00\x87q\x01Nq\x02"
    + b"h\x00h\x01R(K\x01h\x02NNNtbq\x02" * DEEP
    + b"t.",
    "a list of itself": b"]" + b"q\x00h\x00a" * DEEP + b".",
    "the memo": b"]" + b"\x94" * DEEP + b".",
}


@pytest.mark.parametrize("name", DEPTH)
def test_depth_takes_memory_by_the_size_of_the_file_and_comes_apart(name):
    content = DEPTH[name]
    _, taken = peak(discard, content)
    assert taken < 150 * len(content), "an empty list or a number in the memo takes some 100 bytes"


def test_one_long_list_of_places_for_all_classes_is_taken_once(tmp_path):
    classes = class_list("mini-imagenet", "test")
    length = 200_000
    places = b"](" + b"K\x01" * length + b"eq\x00"
    names = [b"U" + bytes([len(one)]) + one.encode() for one in classes]
    pixels = python2_pickle(np.zeros((2, 84, 84, 3), np.uint8))[2:-1]
    content = b"\x80\x02}(U\x0aimage_data" + pixels + b"U\x0aclass_dict}("
    content += names[0] + places + b"".join(name + b"h\x00" for name in names[1:]) + b"uu."
    (tmp_path / "mini-imagenet-cache-test.pkl").write_bytes(content)

    _, taken = peak(partial(refuses, split="test"), "has 200000 images of class", MiniImageNet.load, tmp_path)
    assert taken < 6 * 8 * length, "the list, and one array of it; an array for each of 20 classes would be 20 * 8"
