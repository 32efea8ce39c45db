"""Pickles: what numpy's own unpickler reads comes out the same, and nothing that a pickle names is ever run."""

from __future__ import annotations

import codecs
import contextlib
import copyreg
import io
import os
import pickle
import pickletools
import struct
import sys

import numpy as np
import pytest
from data_files import little_memory, refused, refuses
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from python2 import python2_pickle

from diffopt.tasks import DataError
from diffopt.tasks.pickled_arrays import PickledArray, text
from diffopt.tasks.pickles import array, entry, load_pickle, read_pickle

PROTOCOLS = range(6)


def read(content):
    return read_pickle(io.BytesIO(content), len(content), "some.pkl")


def form(value):
    """What there is to compare of a value: types are told apart, arrays are what they hold."""
    if isinstance(value, PickledArray):
        value = array(value, "it")
    elif isinstance(value, np.ndarray):
        value = value.astype(value.dtype.newbyteorder("="))  # numpy keeps a foreign byte order in some protocols
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return dict, [(form(key), form(one)) for key, one in value.items()]
    return type(value), [form(one) for one in value] if isinstance(value, (list, tuple)) else value


arrays = numpy_strategies.arrays(
    st.one_of(
        numpy_strategies.integer_dtypes(endianness="?"),
        numpy_strategies.unsigned_integer_dtypes(endianness="?"),
        numpy_strategies.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
        numpy_strategies.boolean_dtypes(),
    ),
    numpy_strategies.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
).map(lambda one: np.asfortranarray(one) if one.size % 2 else one)
leaves = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(), st.binary(), arrays)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.binary(), st.integers(1 - 2**63, 2**63 - 1)), inner, max_size=5),
    ),
    max_leaves=12,
)


@given(value=values, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_and_arrays_come_out_as_pickle_reads_them(value, protocol):
    content = pickle.dumps(value, protocol)
    assert form(read(content)) == form(pickle.loads(content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_numbers_become_numbers(protocol):
    assert read(pickle.dumps([np.int64(-3), np.float32(0.5), np.bool_(True)], protocol)) == [-3, 0.5, True]


@given(value=arrays)
def test_arrays_of_python_2_come_out_as_the_official_recipe_reads_them(value):
    value = np.ascontiguousarray(value)
    table = {"data": value, "fine_labels": [3, 300, -1], "long": "x" * 300, "names": ["a", "b"]}
    content = python2_pickle(table)
    expected = pickle.loads(content, encoding="bytes")
    assert list(expected) == [b"data", b"fine_labels", b"long", b"names"], "the writer writes what Python 2 wrote"
    found = read(content)
    assert form(found) == form(expected)
    assert form(entry(found, "data", "it")) == form(value)
    assert [text(name) for name in entry(found, "names", "it")] == ["a", "b"]


class Made:
    """An object whose pickle calls a function, and may give a state to what it returns, as numpy's arrays do."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


reconstruct = np.zeros(0).__reduce__()[0]
from_buffer = np.zeros(0).__reduce_ex__(5)[0]
BYTES = np.dtype("u1")


def array_of(shape, data, number=BYTES):
    return Made(reconstruct, np.ndarray, (0,), b"b", state=(1, shape, number, False, data))


def attacks(mark):
    """Pickles that run a command under pickle, or that abuse numpy's own functions; by name."""
    runs = f"__import__('os').system('touch {mark}')"
    command = Made(os.system, f"touch {mark}")
    pointers = struct.pack("<Q", 0xDEAD)
    lying = Made(np.dtype, "O", False, True, state=(3, "|", None, None, None, -1, -1, 0))
    titled = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 63)
    return {
        "os.system": command,
        "eval": Made(eval, runs),
        "in a list in a dictionary": {"data": [1, {"deep": (2, command)}]},
        "as the key of a dictionary": {command: 1},
        "as the shape of an array": array_of(command, b""),
        "as the bytes of an array": array_of((1,), command),
        "as the type to reconstruct": Made(reconstruct, command, (0,), b"b"),
        "numpy runs a string": Made(np.testing.measure, runs),
        "numpy loads a pickle": Made(np.load, str(mark), None, True),
        "numpy maps a file": Made(np.memmap, str(mark), "u1", "w+", 0, (1,)),
        "objects for bytes": array_of((1,), pointers, np.dtype("O")),
        "objects that call themselves numbers": array_of((1,), pointers, lying),
        "objects in a buffer": Made(from_buffer, bytearray(pointers), np.dtype("O"), (1,), "C"),
        "a number of objects": Made(np.int64(0).__reduce__()[0], lying, pointers),
        "a subclass of arrays": Made(reconstruct, np.memmap, (1,), b"b"),
        "records with a title": Made(np.dtype, "V8", state=titled),
        "a shape beyond the bytes": array_of((2**40,), b"x"),
        "a shape that wraps round": array_of((2**32, 2**32), b""),
        "a negative shape": array_of((-1, -1), b"x"),
    }


@pytest.mark.parametrize("name", attacks("somewhere"))
def test_nothing_that_a_pickle_names_is_run(name, tmp_path):
    mark = tmp_path / "mark"
    codecs.lookup("raw_unicode_escape")  # whose module Python imports when it is first needed
    tried = 0
    for protocol in PROTOCOLS:
        try:
            content = pickle.dumps(attacks(mark)[name], protocol)
        except (pickle.PicklingError, ValueError):
            continue  # what it is made of has no form in this protocol
        tried += 1
        before = set(sys.modules)
        with refused("expected"):
            array(read(content), "it")
        assert not mark.exists()
        assert set(sys.modules) == before, "not even looked up"
    assert tried >= 2


def test_the_attacks_above_do_run_under_pickle(tmp_path):
    mark = tmp_path / "mark"
    for name in ("os.system", "in a list in a dictionary", "numpy runs a string", "as the shape of an array"):
        content = pickle.dumps(attacks(mark)[name], 4)
        with contextlib.suppress(TypeError, ValueError):  # after the command ran, numpy refuses what it returned
            pickle.loads(content)
        assert mark.exists(), name
        mark.unlink()


DTYPE, RECONSTRUCT = b"\x80\x02cnumpy\ndtype\n", b"\x80\x02cnumpy.core.multiarray\n_reconstruct"
STATES = [b"}", b"}U\x08__call__NsN\x86", b"N}U\x07spelledU\x06systems\x86", b"N"]
CALLED = [b"}", b"U\x0bnumpy.dtype", b"cnumpy.core.multiarray\nscalar\n)R", b"N", b"cnumpy\ndtype\nU\x02u1\x85R"]
REFUSED = [
    (pickle.dumps(Made(os.system, "true"), 2), r"some\.pkl names '(posix|nt)\.system', expected numpy arr.*not open"),
    (b"\x80\x02cnumpy\nndarray\nK\x01\x85R.", r"calls numpy\.ndarray in another way"),
    (
        RECONSTRUCT + b"\ncnumpy\ndtype\nK\x00U\x01b\x87R.",
        r"calls numpy\.core\.multiarray\._reconstruct in another way",
    ),
    (DTYPE + b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NU\x01aNK\x01K\x01K\x00tb.", "an array of records"),
    (b"\x80\x02}}b.", "gives a state to a dict"),
    *((DTYPE + state + b"b.", r"gives a state to numpy\.dtype") for state in STATES),
    *((b"\x80\x02" + called + b"U\x02u1\x85R.", "in another way") for called in CALLED),
    (b"\x80\x02K\x01K\x02.", "leaves 2 values"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_the_message_names_what_was_refused(content, message):
    refuses(message, read, content)


ARGUMENTS = {"INST": b"os\nsystem\n", "PERSID": b"1\n", "EXT1": b"1", "EXT2": b"12", "EXT4": b"1234"}


@pytest.mark.parametrize("name", [*ARGUMENTS, "OBJ", "NEWOBJ", "NEWOBJ_EX", "BINPERSID", "NEXT_BUFFER"])
def test_opcodes_that_data_has_no_need_of_are_refused(name):
    code = next(one for one in pickletools.opcodes if one.name == name).code.encode("latin-1")
    refuses(f"uses the opcode {name}", read, b"\x80\x02((K\x01" + code + ARGUMENTS.get(name, b"") + b".")


def test_an_extension_of_the_process_is_no_way_in():
    copyreg.add_extension("os", "system", 0x71)
    try:
        refuses("EXT1", read, b"\x80\x02\x82\x71U\x04true\x85R.")
    finally:
        copyreg.remove_extension("os", "system", 0x71)


BOMBS = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.",
    "bytes of no computer": b"\x80\x04\x8e" + struct.pack("<Q", 2**64 - 1) + b"x.",
    "string": b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"x.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**45) + b"x.",
    "integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "buffer": b"\x80\x05\x96" + struct.pack("<Q", 2**45) + b"x.",
    "memo": b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b"K\x01t.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"]0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_lengths_beyond_the_file_take_no_memory(name, tmp_path):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(BOMBS[name])
    with little_memory(1_000_000), refused("expected"):
        load_pickle(path, limit=1000)


@given(st.binary(max_size=60))
def test_noise_is_refused(content):
    with contextlib.suppress(DataError):
        read(b"\x80\x02" + content)


def test_deep_and_circular_values_are_no_trap():
    deep = b"\x80\x02)" + b"\x85" * 200_000 + b"."
    refuses("expected a numpy array", array, read(deep), "it")
    before, after = b"(J\x00\x00\x00\x00tcnumpy\ndtype", b")" + b"\x85" * 200_000 + b"cnumpy\ndtype"
    content = python2_pickle(np.zeros(0, np.uint8)).replace(before, after)
    refuses("expected a shape of integers", array, read(content), "it")
    circular = read(b"\x80\x02]q\x00h\x00a.")
    assert circular[0] is circular
    refuses("expected a dictionary", entry, circular, "data", "it")


def test_cut_short_wherever_is_refused():
    content = python2_pickle({"data": np.arange(5)})
    for end in range(len(content) - 1):
        with refused(r"a whole pickle|holds an array"):
            array(entry(read(content[:end]), "data", "it"), "it")


def test_what_lies_behind_a_pickle_is_not_read():
    for protocol in PROTOCOLS:
        content = pickle.dumps({"data": [1, b"xy", "text"]}, protocol)
        stream = io.BytesIO(content + b"behind")
        assert read_pickle(stream, len(content), "it") == {"data": [1, b"xy", "text"]}
        assert stream.read() == b"behind"
        for size in (len(content) - 1, len(content) // 2, 1, 0):
            stream = io.BytesIO(content + b"behind")
            refuses("a whole pickle", read_pickle, stream, size, "it")
            assert stream.tell() <= size, "what is behind belongs to others"


@pytest.mark.parametrize("name", [b"numpy\nndarray", b"builtins\nbytes", b"__builtin__\nbytes", b"_codecs\nencode"])
def test_a_name_is_no_value_of_its_own(name):
    assert type(read(b"c" + name + b"\n.")).__module__ == "diffopt.tasks.pickles"


def test_files_and_keys_that_are_not_there(tmp_path):
    refuses(r"absent\.pkl cannot be read: No such file", load_pickle, tmp_path / "absent.pkl", 10)
    refuses("cannot be read", load_pickle, tmp_path, 10)
    path = tmp_path / "large.pkl"
    path.write_bytes(pickle.dumps([0] * 50))
    refuses("expected 10 at most", load_pickle, path, 10)
    assert load_pickle(path, 1000) == [0] * 50
    refuses("the keys 'a', 'b', 'int', expected 'data' among them", entry, {b"a": 1, "b": 2, 3: 3}, "data", "it")
    refuses("it is a str, expected a numpy array", array, "x", "it")
    refuses("it is a list", array, [1, 2.0], "it")
