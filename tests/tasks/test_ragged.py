"""Episodes from classes of unequal size, against a search for where each image came from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffopt.tasks import DataError, RaggedImages, sample_episodes


def numbered(counts, *rest):
    """Images that carry their class in one corner and their example in the other."""
    images = torch.full((sum(counts), *rest), 7, dtype=torch.uint8)
    place = 0
    for label, count in enumerate(counts):
        images[place : place + count, ..., 0, 0] = label
        numbers = torch.arange(count, dtype=torch.uint8).reshape(-1, *[1] * (len(rest) - 2))
        images[place : place + count, ..., -1, -1] = numbers
        place += count
    return RaggedImages(images, torch.tensor(counts))


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(4, 9), min_size=3, max_size=5),
    channels=st.sampled_from([(), (1,), (3,)]),
)
def test_every_image_comes_from_the_class_it_is_labelled_as(seed, counts, channels):
    images = numbered(counts, *channels, 2, 3)
    generator = torch.Generator().manual_seed(seed)
    episodes = sample_episodes(images, way=3, shot=1, query=3, tasks=2, generator=generator)
    assert episodes.query_inputs.shape == (2, 9, channels[0] if channels else 1, 2, 3)
    for task in range(2):
        drawn = {label: [] for label in range(3)}
        for inputs, targets in (episodes[:2], episodes[2:]):
            for image, label in zip(inputs[task], targets[task].tolist(), strict=True):
                corners = (image * 255).round().long()
                drawn[label].append((int(corners[0, 0, 0]), int(corners[0, -1, -1])))
        assert len({origins[0][0] for origins in drawn.values()}) == 3, "classes are drawn without replacement"
        for origins in drawn.values():
            assert len({label for label, _ in origins}) == 1
            assert len({example for _, example in origins}) == 4, "images are drawn without replacement"
            assert all(example < counts[label] for label, example in origins)


def test_every_image_of_a_class_comes_equally_often(generator):
    counts = [2, 5, 3]
    episodes = sample_episodes(numbered(counts, 2, 2), way=2, shot=1, query=1, tasks=6000, generator=generator)
    corners = (episodes.support_inputs * 255).round().long()
    classes, examples = corners[..., 0, 0, 0].flatten(), corners[..., 0, -1, -1].flatten()
    for label, count in enumerate(counts):
        times = torch.bincount(examples[classes == label], minlength=count).double()
        expected = 12_000 / 3 / count
        # Five standard deviations of a count that is at most binomial.
        assert (times - expected).abs().max() < 5 * math.sqrt(expected)


def test_classes_of_one_size_are_drawn_as_from_a_plain_tensor(generator):
    ragged = numbered([5, 5, 5, 5], 3, 4, 4)
    sizes = {"way": 3, "shot": 2, "query": 2, "tasks": 4}
    state = generator.get_state()
    first = sample_episodes(ragged, **sizes, generator=generator)
    generator.set_state(state)
    plain = ragged.flat.reshape(4, 5, 3, 4, 4)
    second = sample_episodes(plain, **sizes, generator=generator)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_class_is_a_view_of_its_images():
    images = numbered([2, 4, 1], 3, 5, 5)
    assert len(images) == 3
    assert [len(images[label]) for label in range(3)] == [2, 4, 1]
    assert images[1].data_ptr() == images.flat[2].data_ptr()
    assert torch.equal(images[2][0], images.flat[6])
    moved = images.to("cpu")
    assert torch.equal(moved.flat, images.flat)


def test_errors_name_the_fault(generator):
    images = numbered([4, 9], 3, 5, 5)
    sizes = {"way": 2, "tasks": 1, "generator": generator}
    with pytest.raises(DataError, match=r"shot \+ query is 2 \+ 3, expected at most 4; a class has only 4 images"):
        sample_episodes(images, shot=2, query=3, **sizes)
    with pytest.raises(DataError, match="way is 3, expected at most 2; there are only 2 classes"):
        sample_episodes(images, shot=1, query=3, **sizes | {"way": 3})
    with pytest.raises(DataError, match=r"float32 of shape \(13, 3, 5, 5\), expected uint8 \[images, \(channels"):
        sample_episodes(RaggedImages(images.flat.float(), images.counts), shot=1, query=1, **sizes)
    with pytest.raises(DataError, match=r"uint8 of shape \(13, 75\), expected uint8 \[images"):
        sample_episodes(RaggedImages(images.flat.flatten(1), images.counts), shot=1, query=1, **sizes)
    flat = torch.zeros(5, 2, 2, dtype=torch.uint8)
    with pytest.raises(DataError, match="counts says 6 images, the smallest class with 3, expected the 5 images"):
        RaggedImages(flat, torch.tensor([3, 3]))
    with pytest.raises(DataError, match=r"the smallest class with 0, expected .* no empty class"):
        RaggedImages(flat, torch.tensor([5, 0]))
    with pytest.raises(DataError, match=r"counts is float32 of shape \(1,\), expected int64"):
        RaggedImages(flat, torch.tensor([5.0]))
    with pytest.raises(DataError, match=r"counts is int64 of shape \(0,\)"):
        RaggedImages(flat, torch.tensor([], dtype=torch.int64))
    with pytest.raises(DataError, match="counts is on meta, expected cpu as the images"):
        RaggedImages(flat, torch.tensor([5], device="meta"))
