"""Thousands of mutated pickles: each is refused or read as plain values, soon, in little memory, calling nothing.

The seeds are tables of arrays and values as Python 2 and 3 pickle them, and programs that call a function of this file.
A mutation changes, drops, doubles or moves bytes, or puts in a piece of another pickle or an opcode.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import random
import sys
import time
import tracemalloc

import numpy as np
import pytest
from python2 import python2_pickle

from diffopt.tasks import DataError
from diffopt.tasks.pickled_arrays import PickledArray, PickledNumber
from diffopt.tasks.pickles import array, entry, read_pickle

RUNG = []


def ring(*arguments):
    """What no pickle may call."""
    RUNG.append(arguments)
    return "rung"


class Rings:
    """An object whose pickle calls :func:`ring`."""

    def __reduce__(self):
        return ring, ("once",)


TABLE = {
    "image_data": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    "class_dict": {"n01": [0, 1], "n02": (2, 3)},
    "x": ["y", 300, -1, None, True],
}
RICHER = TABLE | {
    "column": np.asfortranarray(np.ones((2, 3), ">f4")),
    "number": np.float32(2),
    "values": (b"\xff\x00", 2.5, 2**70, "\u00e9", ["deep", [{"er": ()}]]),
    7: bytearray(b"ab"),
}
PROTOCOLS = range(6)
# A bytearray has a form of its own in protocol 5 only; in the others it names a class.
WITHOUT_BYTEARRAY = {key: value for key, value in RICHER.items() if key != 7}
HARMLESS = [
    python2_pickle(TABLE),
    *(pickle.dumps(TABLE, protocol) for protocol in PROTOCOLS),
    *(pickle.dumps(WITHOUT_BYTEARRAY, protocol) for protocol in range(5)),
    pickle.dumps(RICHER, 5),
]
RINGING = [pickle.dumps({"image_data": [Rings()]}, protocol) for protocol in PROTOCOLS]
VALUES = {
    "class_dict": {"n01": [0, 1], "n02": ["a", "bc"]},
    "list": ["y", 300, -1, 2.5, None, True, "\u00e9"],
    7: (1, 2),
}
NAMELESS = [python2_pickle({"a": [1, 2, "b"]}), *(pickle.dumps(VALUES, protocol) for protocol in PROTOCOLS)]
SEEDS = HARMLESS + NAMELESS + RINGING
CODES = [one.code.encode("latin-1") for one in pickletools.opcodes]
PIECES = [
    *CODES,
    *(b"cnumpy\ndtype\n", b"c_codecs\nencode\n", f"c{__name__}\nring\n".encode(), f"(i{__name__}\nring\n".encode()),
    *(b"h\x00", b"h\x01", b"q\x01", b"r\xff\xff\xff\x7f", b"p99999999999\n", b"g0\n", b"\x82\x01", b"P1\n"),
    *(b"K\x01", b"I01\n", b"L5L\n", b"F1.5\n", b"S'a\\x41'\n", b"Va\\u0041\n", b"U\x02ab", b"X\x03\x00\x00\x00abc"),
    *(
        b"C\x02ab",
        b"\x96\x02" + bytes(7) + b"ab",
        b"\x95\x05" + bytes(7),
        b"\x8b\xff\xff\xff\x7f",
        b"tR",
        b"}b",
        b"\x86R",
    ),
]


def places(content):
    """Where the opcodes of a pickle begin, as far as it can be taken apart."""
    found = [0]
    with contextlib.suppress(Exception):
        found.extend(place for _, _, place in pickletools.genops(bytes(content)))
    return found


def mutated(generator):
    """A seed with one to five mutations, every other one at the beginning of an opcode."""
    content = bytearray(generator.choice(SEEDS))
    for _ in range(generator.choice([1, 1, 1, 2, 3, 5])):
        place, other = (
            generator.choice(places(content)) if generator.random() < 0.5 else generator.randrange(len(content) + 1)
            for _ in range(2)
        )
        length = generator.randint(1, 40)
        kind = generator.choice(["flip", "byte", "drop", "put in", "double", "splice", "cut"])
        if kind == "flip" and place < len(content):
            content[place] ^= 1 << generator.randrange(8)
        elif kind == "byte":
            content[place : place + 1] = bytes([generator.randrange(256)])
        elif kind == "drop":
            del content[place : place + length // 4]
        elif kind == "put in":
            content[place:place] = generator.choice(PIECES)
        elif kind == "double":
            content[place:place] = content[other : other + length]
        elif kind == "splice":
            content[place : place + length] = generator.choice(SEEDS)[other : other + generator.randint(1, 40)]
        elif generator.random() < 0.1:
            del content[place:]
    return bytes(content)


def parts(value):
    """A value and all within it, each once."""
    waiting, seen = [value], {}
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen[id(one)] = one
            if isinstance(one, dict):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, (list, tuple)):
                waiting += one
            elif isinstance(one, (PickledArray, PickledNumber)):
                waiting += vars(one).values()
    return seen.values()


PLAIN = (dict, list, tuple, str, bytes, int, float, bool, type(None))


class WithoutNames(pickle._Unpickler):
    """The standard library's unpickler, for pickles that name nothing."""

    def find_class(self, module, name):
        raise LookupError(name)


def assert_read_as_by_pickle(found, content):
    """What names nothing, and is no bytearray, is what the standard library reads."""
    if all(type(one) in PLAIN for one in parts(found)) and b"\x96" not in content:
        with contextlib.suppress(LookupError):
            assert repr(found) == repr(WithoutNames(io.BytesIO(content), encoding="bytes").load())


def outcome(content):
    """Whether a pickle is refused, read, or read with the array of the table in it; anything else fails."""
    try:
        found = read_pickle(io.BytesIO(content), len(content), "some.pkl")
    except DataError:
        return "refused"
    for one in parts(found):
        assert type(one) in (*PLAIN, PickledArray, PickledNumber) or type(one).__name__ == "_Named", type(one)
    assert_read_as_by_pickle(found, content)
    with contextlib.suppress(DataError):
        array(entry(found, "image_data", "it"), "it")
        return "read with its array"
    return "read"


def fuzz(seed, count):
    """How often each outcome came, after ``count`` mutated pickles of which none did harm."""
    generator = random.Random(seed)
    outcomes = {"refused": 0, "read": 0, "read with its array": 0}
    for content in SEEDS:
        outcome(content)  # imports the modules of codecs, which Python does when they are first needed
    modules = set(sys.modules)
    RUNG.clear()
    tracemalloc.start()
    try:
        for number in range(count):
            content = mutated(generator)
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.process_time()
            outcomes[outcome(content)] += 1
            taken = tracemalloc.get_traced_memory()[1] - before
            assert taken < 300_000, f"pickle {number} of seed {seed} took {taken:,} bytes: {content!r}"
            assert time.process_time() - start < 5, f"pickle {number} of seed {seed} took long: {content!r}"
            assert not RUNG, f"pickle {number} of seed {seed} called a function: {content!r}"
    finally:
        tracemalloc.stop()
    assert set(sys.modules) == modules, "no name was looked up"
    return outcomes


def test_the_seeds_are_read_or_do_call_under_pickle():
    for content in HARMLESS:
        assert outcome(content) == "read with its array"
    for content in NAMELESS:
        assert outcome(content) == "read"
    RUNG.clear()
    for content in RINGING:
        assert outcome(content) == "refused"
        assert not RUNG
    for content in RINGING:
        assert pickle.loads(content) == {"image_data": ["rung"]}
    assert len(RUNG) == len(RINGING)


def test_a_thousand_mutated_pickles_do_no_harm():
    outcomes = fuzz(seed=0, count=1000)
    assert all(number > 10 for number in outcomes.values()), outcomes


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_ten_thousand_mutated_pickles_do_no_harm(seed):
    outcomes = fuzz(seed, count=2500)
    assert all(number > 25 for number in outcomes.values()), outcomes
