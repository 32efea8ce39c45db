"""``diffopt.Batches``: every sample once an epoch, the same batch whenever a step is asked for, and refusals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import diffopt
from diffopt import Batches, BatchesError
from diffopt.estimators import Reverse

DATA = TensorDataset(torch.arange(22.0).reshape(11, 2), torch.arange(11))


class Samples(Dataset):
    """The same samples, one by one."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return DATA.tensors[0][index], index


class Many(Samples):
    """With a way to get several at once."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1.0])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
@pytest.mark.parametrize(
    "data", [DATA, Samples(), Many(), Subset(DATA, range(11)), [*DATA]], ids=lambda x: type(x).__name__
)
def test_an_epoch_is_a_permutation(data, size):
    batches = Batches(data, size, seed=4)
    orders = []
    for epoch in range(3):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        found = [batches(step) for step in steps]
        for x, index in found:
            assert len(x) == len(index) == size
            assert torch.equal(x, DATA.tensors[0][index])
        orders.append(torch.cat([index for _, index in found]))
        counts = Counter(orders[-1].tolist())
        assert max(counts.values()) == 1
        assert len(counts) == 11 // size * size
        assert set(counts) <= set(range(11))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])


def test_other_samples_are_left_over_in_other_epochs():
    batches = Batches(DATA, 4)
    left = [set(range(11)) - {int(i) for step in (2 * e, 2 * e + 1) for i in batches(step)[1]} for e in range(20)]
    assert all(len(x) == 3 for x in left)
    assert set().union(*left) == set(range(11))


def test_any_order_of_asking_gives_the_same_batches():
    expected = [Batches(DATA, 3, seed=1)(step)[1] for step in range(12)]
    batches = Batches(DATA, 3, seed=1)
    for step in [7, 0, 11, 3, 3, 2, 8, 1, 0]:
        assert torch.equal(batches(step)[1], expected[step])


def test_seeds_differ_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    orders = [tuple(Batches(DATA, 11, seed=seed)(0)[1].tolist()) for seed in range(20)]
    assert len(set(orders)) == 20
    assert torch.equal(state, torch.get_rng_state())


def test_another_process_gets_the_same():
    code = (
        "import torch, diffopt; x = torch.arange(11)\n"
        "b = diffopt.Batches(torch.utils.data.TensorDataset(x), 3, seed=9)\n"
        "print([b(i)[0].tolist() for i in (5, 0, 40)])"
    )
    batches = Batches(TensorDataset(torch.arange(11)), 3, seed=9)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([batches(i)[0].tolist() for i in (5, 0, 40)])
    assert [batches(i)[0].tolist() for i in (5, 0)] == [[0, 4, 1], [8, 0, 10]]


def test_threads_get_the_same():
    batches, steps = Batches(DATA, 2), list(range(60)) * 3
    expected = [Batches(DATA, 2)(step)[1] for step in steps]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda step: batches(step)[1], steps))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_the_same_stream(copied):
    batches = Batches(DATA, 2, seed=3)
    first = batches(17)
    assert torch.equal(copied(batches)(17)[1], first[1])


def test_samples_are_collated_by_a_function_of_ones_own():
    batches = Batches(
        DATA, 2, collate_fn=lambda rows: {"n": torch.tensor(len(rows)), "i": torch.stack([r[1] for r in rows])}
    )
    assert int(batches(0)["n"]) == 2
    assert torch.equal(batches(3)["i"], Batches(DATA, 2)(3)[1])


BAD = {
    "a loader": (lambda: Batches(DataLoader(DATA), 2), r"diffopt\.Batches\(loader\.dataset, batch_size\)"),
    "an iterable data set": (lambda: Batches(Stream(), 1), "into a list of samples"),
    "an iterator": (lambda: Batches(iter(DATA), 1), "into a list of samples"),
    "a set": (lambda: Batches({1, 2}, 1), "into a list of samples"),
    "a tuple of tensors": (lambda: Batches(DATA.tensors, 2), r"TensorDataset\(\*tensors\)"),
    "a dict of tensors": (lambda: Batches({"x": torch.ones(3)}, 1), r"TensorDataset\(\*tensors\)"),
    "a number": (lambda: Batches(3, 1), "map-style"),
    "no size": (lambda: Batches(DATA, 0), "batch_size is int 0"),
    "half a sample": (lambda: Batches(DATA, 2.5), "batch_size is float 2.5"),
    "more than there is": (lambda: Batches(DATA, 12), "there are 11 samples"),
    "nothing": (lambda: Batches(DATA, None), "batch_size"),
    "a seed that is none": (lambda: Batches(DATA, 2, seed=None), "seed"),
    "a collate that is none": (lambda: Batches(DATA, 2, collate_fn=3), "collate_fn"),
    "a step before the first": (lambda: Batches(DATA, 2)(-1), "the step is int -1"),
    "half a step": (lambda: Batches(DATA, 2)(0.5), "the step is float 0.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_data_set_is_refused(name):
    make, message = BAD[name]
    with pytest.raises(BatchesError, match=message):
        make()


@pytest.mark.parametrize("data", [DATA, Samples()], ids=["tensors", "samples"])
def test_the_weight_of_each_sample_is_an_argument_that_the_batch_indexes(data):
    def loss(w, weights, batch):
        x, index = batch
        return (weights[index] * (x @ w - 1).square()).mean()

    def found(batches):
        weights, w = torch.ones(11, dtype=torch.float64, requires_grad=True), torch.zeros(2, dtype=torch.float64)
        options = {"optimizer": diffopt.SGD(0.001), "steps": 9, "batches": batches, "estimator": Reverse(1)}
        end = diffopt.solve(loss, w, weights, **options).params
        return torch.autograd.grad(end.sum(), weights)[0]

    rows = [Batches(DATA, 4, seed=2)(step) for step in range(9)]
    stack = tuple(torch.stack([row[i].double() if i == 0 else row[i] for row in rows]) for i in range(2))
    batches = Batches(
        data,
        4,
        seed=2,
        collate_fn=lambda rows: [torch.stack([x.double() for x, _ in rows]), torch.tensor([int(i) for _, i in rows])],
    )
    torch.testing.assert_close(found(batches), found(stack), rtol=1e-12, atol=1e-12)
