"""Episode sampling against a search, image by image, for where each one came from; and the sine waves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffopt.tasks import Episodes, Sinusoid, sample_episodes


def numbered(classes, examples, *rest):
    """Images that carry their class in one corner and their example in the other."""
    images = torch.full((classes, examples, *rest), 7, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(classes).reshape(-1, 1, *[1] * (len(rest) - 2))
    images[..., -1, -1] = torch.arange(examples).reshape(1, -1, *[1] * (len(rest) - 2))
    return images


def origins(image):
    """The class and example that one image [channels, height, width] in [0, 1] carries."""
    values = (image * 255).round().long()
    return int(values[0, 0, 0]), int(values[0, -1, -1])


@given(
    seed=st.integers(0, 2**31),
    way=st.integers(1, 4),
    shot=st.integers(1, 3),
    query=st.integers(1, 3),
    tasks=st.integers(1, 3),
    channels=st.sampled_from([(), (1,), (3,)]),
)
def test_every_image_is_where_a_loop_would_put_it(seed, way, shot, query, tasks, channels):
    images = numbered(4, 6, *channels, 2, 3)
    generator = torch.Generator().manual_seed(seed)
    episodes = sample_episodes(images, way=way, shot=shot, query=query, tasks=tasks, generator=generator)
    with_channels = images if channels else images[:, :, None]
    for task in range(tasks):
        drawn = {label: [] for label in range(way)}
        for side, size in (("support", shot), ("query", query)):
            inputs = getattr(episodes, f"{side}_inputs")[task]
            targets = getattr(episodes, f"{side}_targets")[task]
            assert targets.tolist() == [label for label in range(way) for _ in range(size)]
            for image, label in zip(inputs, targets.tolist(), strict=True):
                origin = origins(image)
                drawn[label].append(origin)
                torch.testing.assert_close(image, with_channels[origin].float() / 255, rtol=0, atol=0)
        classes = [{category for category, _ in origin} for origin in drawn.values()]
        assert all(len(one) == 1 for one in classes), "one label, one class"
        assert len(set.union(*classes)) == way, "classes are drawn without replacement"
        for origin in drawn.values():
            assert len(set(origin)) == shot + query, "support and query are disjoint"


def test_shapes_and_dtypes(generator):
    images = numbered(5, 4, 3, 8, 9)
    episodes = sample_episodes(images, way=2, shot=1, query=3, tasks=7, generator=generator)
    assert isinstance(episodes, Episodes)
    assert [tuple(value.shape) for value in episodes] == [(7, 2, 3, 8, 9), (7, 2), (7, 6, 3, 8, 9), (7, 6)]
    assert [value.dtype for value in episodes] == [torch.float32, torch.int64] * 2
    assert all(value.is_contiguous() for value in episodes)


def test_every_class_and_every_example_comes_equally_often(generator):
    episodes = sample_episodes(numbered(5, 4, 2, 2), way=2, shot=1, query=1, tasks=4000, generator=generator)
    for inputs in (episodes.support_inputs, episodes.query_inputs):
        for corner, values in ((inputs[..., 0, 0], 5), (inputs[..., -1, -1], 4)):
            for position in range(2):
                counts = torch.bincount((corner[:, position, 0] * 255).round().long(), minlength=values)
                # Five standard deviations of a binomial count.
                spread = 5 * math.sqrt(4000 / values * (1 - 1 / values))
                assert (counts - 4000 / values).abs().max() < spread


def test_episodes_depend_on_the_generator_alone():
    def draw(seed):
        torch.rand(3)  # torch's global generator moves on, and must not matter
        generator = torch.Generator().manual_seed(seed)
        return sample_episodes(numbered(9, 9, 2, 2), way=3, shot=2, query=2, tasks=4, generator=generator)

    assert all(torch.equal(one, other) for one, other in zip(draw(5), draw(5), strict=True))
    assert not torch.equal(draw(5).support_inputs, draw(6).support_inputs)


def test_successive_draws_differ(generator):
    sizes = {"way": 3, "shot": 2, "query": 2, "tasks": 4}
    first, second = (sample_episodes(numbered(9, 9, 2, 2), **sizes, generator=generator) for _ in range(2))
    assert not torch.equal(first.support_inputs, second.support_inputs)
    assert not torch.equal(first.support_inputs[0], first.support_inputs[1])


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
    assert episodes.support_inputs.shape == episodes.query_targets.shape == (4000, 10, 1)
    assert inputs.dtype == torch.float32
    assert -5 <= inputs.min() < -4.99
    assert 4.99 < inputs.max() <= 5
    # The mean of amplitude^2 is (5^3 - 0.1^3) / (3 * 4.9) = 8.503, and a sine's square halves it; over 4,000 waves
    # the standard error is 2 %.
    assert float(episodes.query_targets.square().mean()) == pytest.approx(8.503 / 2, rel=0.1)


def test_sinusoid_depends_on_the_generator_alone():
    first, again = (Sinusoid(3, 2).sample(4, torch.Generator().manual_seed(8)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
