"""Episodes of classes of one size or of several, searched for where each image came from; and the sine waves."""

from __future__ import annotations

import math

import pytest
import torch
from data_files import refuses
from hypothesis import given
from hypothesis import strategies as st

from diffopt.tasks import Episodes, RaggedImages, Sinusoid, sample_episodes


def numbered(counts, *rest):
    """Images that carry their class in one corner and their example in the other; ragged where counts differ."""
    images = torch.full((sum(counts), *rest), 7, dtype=torch.uint8)
    places = [(label, example) for label, count in enumerate(counts) for example in range(count)]
    labels, examples = torch.tensor(places, dtype=torch.uint8).T.reshape(2, -1, *[1] * (len(rest) - 2))
    images[..., 0, 0], images[..., -1, -1] = labels, examples
    if len(set(counts)) == 1:
        return images.unflatten(0, (len(counts), counts[0]))
    return RaggedImages(images, torch.tensor(counts))


def origins(inputs):
    """The class and example that images [..., channels, height, width] in [0, 1] carry."""
    values = (inputs[..., 0, :, :] * 255).round().long()
    return values[..., 0, 0], values[..., -1, -1]


@given(
    seed=st.integers(0, 2**31),
    counts=st.one_of(st.just([6] * 4), st.lists(st.integers(6, 9), min_size=4, max_size=5)),
    way=st.integers(1, 4),
    shot=st.integers(1, 3),
    query=st.integers(1, 3),
    tasks=st.integers(1, 3),
    channels=st.sampled_from([(), (1,), (3,)]),
)
def test_every_image_is_where_a_loop_would_put_it(seed, counts, way, shot, query, tasks, channels):
    images = numbered(counts, *channels, 2, 3)
    generator = torch.Generator().manual_seed(seed)
    episodes = sample_episodes(images, way=way, shot=shot, query=query, tasks=tasks, generator=generator)
    for task in range(tasks):
        drawn = {label: [] for label in range(way)}
        for inputs, targets, size in ((*episodes[:2], shot), (*episodes[2:], query)):
            assert targets[task].tolist() == [label for label in range(way) for _ in range(size)]
            for image, label in zip(inputs[task], targets[task].tolist(), strict=True):
                of, example = map(int, origins(image))
                drawn[label].append((of, example))
                assert example < counts[of]
                expected = images[of][example] if channels else images[of][example][None]
                torch.testing.assert_close(image, expected.float() / 255, rtol=0, atol=0)
        classes = [{of for of, _ in origin} for origin in drawn.values()]
        assert all(len(one) == 1 for one in classes), "one label, one class"
        assert len(set.union(*classes)) == way, "classes are drawn without replacement"
        for origin in drawn.values():
            assert len(set(origin)) == shot + query, "support and query are disjoint"


def test_shapes_and_dtypes(generator):
    images = numbered([4] * 5, 3, 8, 9)
    episodes = sample_episodes(images, way=2, shot=1, query=3, tasks=7, generator=generator)
    assert isinstance(episodes, Episodes)
    assert [tuple(value.shape) for value in episodes] == [(7, 2, 3, 8, 9), (7, 2), (7, 6, 3, 8, 9), (7, 6)]
    assert [value.dtype for value in episodes] == [torch.float32, torch.int64] * 2
    assert all(value.is_contiguous() for value in episodes)


@pytest.mark.parametrize("counts", [[4] * 5, [2, 5, 3]])
def test_every_class_and_every_example_comes_equally_often(counts, generator):
    episodes = sample_episodes(numbered(counts, 2, 2), way=2, shot=1, query=1, tasks=6000, generator=generator)

    def assert_even(values, expected, number):
        times = torch.bincount(values, minlength=number)
        # Five standard deviations of a binomial count.
        assert (times - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected / 6000))

    for inputs in (episodes.support_inputs, episodes.query_inputs):
        for classes, examples in zip(*(corner.T for corner in origins(inputs)), strict=True):
            assert_even(classes, 6000 / len(counts), len(counts))
            for label, count in enumerate(counts):
                assert_even(examples[classes == label], 6000 / len(counts) / count, count)


SIZES = {"way": 3, "shot": 2, "query": 2, "tasks": 4}


def test_episodes_depend_on_the_generator_alone():
    def draw(seed):
        torch.rand(3)  # torch's global generator moves on, and must not matter
        return sample_episodes(numbered([9] * 9, 2, 2), **SIZES, generator=torch.Generator().manual_seed(seed))

    assert all(torch.equal(one, other) for one, other in zip(draw(5), draw(5), strict=True))
    assert not torch.equal(draw(5).support_inputs, draw(6).support_inputs)


def test_successive_draws_differ(generator):
    first, second = (sample_episodes(numbered([9] * 9, 2, 2), **SIZES, generator=generator) for _ in range(2))
    assert not torch.equal(first.support_inputs, second.support_inputs)
    assert not torch.equal(first.support_inputs[0], first.support_inputs[1])


def test_classes_of_one_size_are_drawn_alike_from_a_plain_tensor_and_from_a_ragged_one():
    plain = numbered([5] * 4, 3, 4, 4)
    ragged = RaggedImages(plain.flatten(0, 1), torch.tensor([5] * 4))
    drawn = [sample_episodes(one, **SIZES, generator=torch.Generator().manual_seed(1)) for one in (plain, ragged)]
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


def test_a_class_of_ragged_images_is_a_view_of_them():
    images = numbered([2, 4, 1], 3, 5, 5)
    assert len(images) == 3
    assert [len(images[label]) for label in range(3)] == [2, 4, 1]
    assert images[1].data_ptr() == images.flat[2].data_ptr()
    assert torch.equal(images[2][0], images.flat[6])
    assert torch.equal(images.to("cpu").flat, images.flat)


RAGGED = numbered([4, 9], 3, 5, 5)
FLOATING, IN_ROWS = (RaggedImages(one, RAGGED.counts) for one in (RAGGED.flat.float(), RAGGED.flat.flatten(1)))
FLAT = torch.zeros(5, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "sizes", "message"),
    [
        (RAGGED, (2, 2, 3), r"shot \+ query is 2 \+ 3, expected at most 4; a class has only 4 images"),
        (RAGGED, (3, 1, 3), "way is 3, expected at most 2; there are only 2 classes"),
        (FLOATING, (2, 1, 1), r"float32 of shape \(13, 3, 5, 5\), expected uint8 \[images, \(channels"),
        (IN_ROWS, (2, 1, 1), r"uint8 of shape \(13, 75\), expected uint8 \[images"),
    ],
)
def test_ragged_images_that_cannot_be_drawn_from_are_refused(images, sizes, message, generator):
    way, shot, query = sizes
    refuses(message, sample_episodes, images, way=way, shot=shot, query=query, tasks=1, generator=generator)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([3, 3]), "counts says 6 images, the smallest class with 3, expected the 5 images"),
        (torch.tensor([5, 0]), "the smallest class with 0, expected .* no empty class"),
        (torch.tensor([5.0]), r"counts is float32 of shape \(1,\), expected int64"),
        (torch.tensor([], dtype=torch.int64), r"counts is int64 of shape \(0,\)"),
        (torch.tensor([5], device="meta"), "counts is on meta, expected cpu as the images"),
    ],
)
def test_counts_that_do_not_belong_to_the_images_are_refused(counts, message):
    refuses(message, RaggedImages, FLAT, counts)


def test_sinusoid_targets_lie_on_one_wave_per_task(generator):
    episodes = Sinusoid(shots=6, queries=5).sample(50, generator, dtype=torch.float64)
    assert [tuple(value.shape[1:]) for value in episodes] == [(6, 1), (6, 1), (5, 1), (5, 1)]
    for support_inputs, support_targets, query_inputs, query_targets in zip(*episodes, strict=True):
        # y = a sin x - b cos x: fit a and b on the support, predict the query.
        basis, query_basis = (torch.cat([x.sin(), -x.cos()], dim=1) for x in (support_inputs, query_inputs))
        fit = torch.linalg.lstsq(basis, support_targets).solution
        torch.testing.assert_close(query_basis @ fit, query_targets, rtol=1e-8, atol=1e-8)
        assert 0.1 <= float(fit.norm()) <= 5  # the amplitude
        assert 0 <= math.atan2(float(fit[1]), float(fit[0])) <= math.pi  # the phase


def test_sinusoid_fills_its_ranges(generator):
    episodes = Sinusoid().sample(4000, generator)
    inputs = episodes.support_inputs
    assert inputs.shape == episodes.query_targets.shape == (4000, 10, 1)
    assert inputs.dtype == torch.float32
    assert -5 <= inputs.min() < -4.99
    assert 4.99 < inputs.max() <= 5
    # The mean of amplitude^2 is (5^3 - 0.1^3) / (3 * 4.9) = 8.503, and a sine's square halves it; over 4,000 waves
    # the standard error is 2 %.
    assert float(episodes.query_targets.square().mean()) == pytest.approx(8.503 / 2, rel=0.1)


def test_sinusoid_depends_on_the_generator_alone():
    first, again = (Sinusoid(3, 2).sample(4, torch.Generator().manual_seed(8)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
