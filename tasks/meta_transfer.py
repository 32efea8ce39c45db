"""Learning what and where to transfer: meta-networks weight how a network's features are matched with another's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, linear

from diffopt.tasks.errors import ProblemError
from diffopt.tasks.residual import Staged

Network: TypeAlias = dict[str, Tensor]
Params: TypeAlias = dict[str, Network]
"""Of the target: ``network``, its own, and ``match``, the maps from its channels to the source's."""
Meta: TypeAlias = dict[str, Network]
"""Of the meta-networks: ``where`` and ``what``."""

HIGHEST = 6.0
"""The largest weight of a pair, as in the reference: where the weights are without bounds they grow without end."""


@final
@dataclass(frozen=True, eq=False)
class MetaTransfer:
    r"""The losses of a target network that learns from a source network what meta-networks tell it to.

    .. math:: L_{tfr}(\phi; \theta) = \frac1B \sum_x \sum_{(m, n)} \lambda^{mn}_\theta(x) \sum_c w^{mn}_{\theta, c}(x)\,
              \frac{1}{HW} \sum_{ij} \big(r_\phi(T^n_\phi(x))_{cij} - S^m(x)_{cij}\big)^2,\qquad
              L_{total} = L_{acc} + \beta L_{tfr}

    with :math:`S^m` the source's features of stage ``m``, brought to the target's height and width bilinearly,
    :math:`T^n` the target's of stage ``n``, and :math:`r` a 1x1 convolution to the source's channels. :math:`L_{acc}`
    is the cross entropy. The meta-networks read the source's features averaged over the picture, :math:`s^m`:

    .. math:: \text{where:}\ \lambda^{mn} = \min(\mathrm{relu}(a^\top s^m + b), 6),\qquad
              \text{what:}\ w^{mn} = \mathrm{softmax}(A s^m + b)

    :math:`\theta` acts on the classification loss through the steps on :math:`L_{tfr}` alone: no first-order estimator
    reaches it. Everything here is a pure function; the inner problem is made of them with :func:`diffopt.solve`::

        steps on the transfer loss, then one on the task's loss without theta, then the outer loss, the task's

    References: Jang, Lee, Hwang, Shin (2019), "Learning what and where to transfer", equations (1)-(4); Kim, Park, Choi
    (2020), "Multi-step estimation for gradient-based meta-learning", equation (19) and algorithm 1.

    Attributes:
        target: the target network as a function of its parameters: ``target(network, inputs)``.
        source_channels: channels of each of the source's stages.
        target_channels: channels of each of the target's stages.
        pairs: which stages are matched, ``(source, target)`` from 0; empty: all with all.
        beta: weight of the transfer loss in the total loss.

    Raises:
        ProblemError: a pair names no stage or stands twice, or ``beta`` is negative or not finite.
    """

    target: Callable[[Network, Tensor], Staged]
    source_channels: tuple[int, ...]
    target_channels: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    beta: float = 0.5

    def __post_init__(self) -> None:
        """Fill in the pairs; refuse those of no stage."""
        sizes = len(self.source_channels), len(self.target_channels)
        if not self.pairs:
            object.__setattr__(self, "pairs", tuple((m, n) for m in range(sizes[0]) for n in range(sizes[1])))
        wrong = [(m, n) for m, n in self.pairs if not (0 <= m < sizes[0] and 0 <= n < sizes[1])]
        if wrong or len(set(self.pairs)) < len(self.pairs) or not self.pairs:
            raise ProblemError(
                f"pairs is {self.pairs}",
                f"pairs (source stage, target stage), none twice, of {sizes[0]} and {sizes[1]} stages counted from 0",
            )
        if not 0 <= self.beta < math.inf:
            raise ProblemError(f"beta is {self.beta}", "a weight, 0 or more")

    def start(self, network: Network, generator: torch.Generator) -> Params:
        """The target's parameters with new maps between the channels beside them, each from ``+-1/sqrt(channels)``.

        Args:
            network: parameters of the target network; the maps are of their dtype, on their device.
            generator: draws the maps.
        """
        like = next(iter(network.values()))
        match: Network = {}
        for m, n in self.pairs:
            outputs, inputs = self.source_channels[m], self.target_channels[n]
            drawn = torch.rand(outputs, inputs, generator=generator, device=generator.device, dtype=like.dtype)
            match[f"{m}.{n}.weight"] = ((2 * drawn - 1) / math.sqrt(inputs)).to(like.device)
            match[f"{m}.{n}.bias"] = like.new_zeros(outputs)
        return {"network": dict(network), "match": match}

    def meta_start(self, like: Tensor) -> Meta:
        """Meta-networks that weight all pairs by one and all channels alike, of the dtype and device of ``like``."""
        where: Network = {}
        what: Network = {}
        for m, n in self.pairs:
            channels = self.source_channels[m]
            where[f"{m}.{n}.weight"], where[f"{m}.{n}.bias"] = like.new_zeros(1, channels), like.new_ones(1)
            what[f"{m}.{n}.weight"], what[f"{m}.{n}.bias"] = (
                like.new_zeros(channels, channels),
                like.new_zeros(channels),
            )
        return {"where": where, "what": what}

    def weights(self, meta: Meta, source: Sequence[Tensor]) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """What the meta-networks say to each example.

        Args:
            meta: of the meta-networks.
            source: the source's features of every stage.

        Returns:
            For each pair, *where* ``[examples]`` in ``[0, 6]`` and *what* ``[examples, channels]`` with sums of one.

        Raises:
            ProblemError: there are not the features of every stage.
        """
        shapes = tuple(feature.shape[1] for feature in source)
        if shapes != self.source_channels:
            raise ProblemError(f"the source's features have {shapes} channels", f"{self.source_channels}")
        pooled = [feature.mean(dim=(2, 3)) for feature in source]

        def affine(kind: str, m: int, n: int) -> Tensor:
            return linear(pooled[m], meta[kind][f"{m}.{n}.weight"], meta[kind][f"{m}.{n}.bias"])

        return {
            (m, n): (affine("where", m, n)[:, 0].clamp(0, HIGHEST), affine("what", m, n).softmax(1))
            for m, n in self.pairs
        }

    def transfer_loss(self, params: Params, meta: Meta, inputs: Tensor, source: Sequence[Tensor]) -> Tensor:
        """``L_tfr``: the weighted mismatch of the features of ``inputs``.

        Args:
            params: of the target, with its maps.
            meta: of the meta-networks.
            inputs: images ``[examples, channels, height, width]``.
            source: the source's features of the same images; constants, so that they need computing once.
        """
        return self._mismatch(params, meta, self.target(params["network"], inputs).features, source)

    def task_loss(self, params: Params, inputs: Tensor, labels: Tensor) -> Tensor:
        """``L_acc``: the mean cross entropy, without the meta-networks; labels ``[examples]``, int64."""
        return cross_entropy(self.target(params["network"], inputs).logits, labels)

    def total_loss(
        self, params: Params, meta: Meta, inputs: Tensor, labels: Tensor, source: Sequence[Tensor]
    ) -> Tensor:
        """``L_acc + beta * L_tfr``, by one pass through the target."""
        found = self.target(params["network"], inputs)
        return cross_entropy(found.logits, labels) + self.beta * self._mismatch(params, meta, found.features, source)

    def _mismatch(self, params: Params, meta: Meta, target: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
        total = target[0].new_zeros(())
        sized: dict[tuple[int, torch.Size], Tensor] = {}
        for (m, n), (where, what) in self.weights(meta, source).items():
            size = target[n].shape[2:]
            if (m, size) not in sized:
                sized[m, size] = source[m] if source[m].shape[2:] == size else _resized(source[m], size)
            weight, bias = (params["match"][f"{m}.{n}.{part}"] for part in ("weight", "bias"))
            mapped = torch.nn.functional.conv2d(target[n], weight[:, :, None, None], bias)
            each = (mapped - sized[m, size]).square().mean(dim=(2, 3))
            total = total + (where * (what * each).sum(1)).mean()
        return total


def _resized(feature: Tensor, size: torch.Size) -> Tensor:
    return interpolate(feature, size=tuple(size), mode="bilinear", align_corners=False)
