"""The class lists: sorted, complete, no class in two splits, and those of the published facts where they are."""

from __future__ import annotations

import itertools
import json
from importlib.resources import files

import pytest

from diffopt.tasks.class_lists import class_list, superclasses

SIZES = {"cifar-fs": (64, 16, 20), "fc100": (60, 20, 20), "mini-imagenet": (64, 16, 20)}
SPLITS = ("train", "validation", "test")


def test_the_file_is_sorted_throughout():
    content = json.loads((files("diffopt.tasks") / "classes.json").read_text(encoding="utf-8"))
    assert list(content) == sorted(content) == ["cifar-100", *SIZES]
    for lists in content.values():
        assert list(lists) == sorted(lists)
        for names in lists.values():
            assert names == sorted(set(names))


@pytest.mark.parametrize("data_set", SIZES)
def test_splits_have_the_published_sizes_and_no_class_in_common(data_set):
    lists = [class_list(data_set, split) for split in SPLITS]
    assert tuple(map(len, lists)) == SIZES[data_set]
    assert all(list(names) == sorted(names) for names in lists)
    assert len(set(itertools.chain(*lists))) == 100
    if data_set != "mini-imagenet":
        assert set(itertools.chain(*lists)) == set(itertools.chain(*superclasses().values()))
    else:
        assert all(name[0] == "n" and name[1:].isdigit() and len(name) == 9 for names in lists for name in names)


def test_superclasses_are_twenty_times_five():
    assert len(superclasses()) == 20
    assert all(len(names) == 5 for names in superclasses().values())


@pytest.mark.data
def test_lists_are_the_collected_facts(data_folder):
    path = data_folder / "splits.json"
    if not path.is_file():
        pytest.skip("the collected class lists are not here")
    facts = json.loads(path.read_text(encoding="utf-8"))
    old = dict(zip(SPLITS, ("train", "val", "test"), strict=True))
    for split in SPLITS:
        assert list(class_list("cifar-fs", split)) == sorted(facts["cifar_fs"][old[split]])
        assert list(class_list("fc100", split)) == sorted(facts["fc100"][old[split]]["classes"])
        assert list(class_list("mini-imagenet", split)) == sorted(facts["mini_imagenet_ravi"][old[split]])
    cifar = facts["cifar100"]
    coarse = cifar["coarse_label_names_in_official_order"]
    for name, place in zip(cifar["fine_label_names_in_official_order"], cifar["fine_to_coarse"], strict=True):
        assert name in superclasses()[coarse[place]]
