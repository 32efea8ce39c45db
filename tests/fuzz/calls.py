"""One call of the public interface, drawn whole: what it is given, in which forms, and under which mode it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fuzz import rules, trees
from fuzz.estimators import Spec, specs
from fuzz.losses import RANDOM, SPECIAL, Loss, Scope, losses
from hypothesis import strategies as st
from torch import Tensor

import diffopt

VECTORS = ("x", "u", "anchor", "batch_x")
PLAIN = ("autograd", "autograd", "backward", "func", "no_grad", "save_on_cpu", "twice", "autocast")
BATCHED = ("vmap_grad", "grad_vmap", "autograd_vmap", "mean_over_tasks", "jacrev", "batched_grads")
REFUSED = ("inference", "second", "checkpointed")
MODES = PLAIN + BATCHED + BATCHED + REFUSED
TASK_MODES = ("vmap_grad", "grad_vmap", "autograd_vmap", "mean_over_tasks")


@dataclass(frozen=True)
class Call:
    """A call of ``solve`` and a derivative of what it returns.

    ``shapes`` are those of what the leaves are laid out from; ``leaves`` says of each leaf which of these it shows, and
    how. ``frozen`` are the names of tensors that do not require grad, ``own`` of those that each task has of its own.
    """

    seed: int
    dtype: torch.dtype
    steps: int
    shapes: tuple[tuple[int, ...], ...]
    leaves: tuple[tuple[int, str], ...]
    params: Any
    args: Any
    spectators: tuple[str, ...]
    loss: Loss
    batches: str
    rule: rules.Rule
    estimator: Spec
    mode: str
    frozen: frozenset[str]
    own: frozenset[str]
    tasks: int
    task_chunk: int | None
    reads_buffers: bool
    check: bool = True
    row: int | None = None
    compiled: bool = False

    # ------------------------------------------------------------------ the tensors

    def bases(self) -> dict[str, Tensor]:
        """The tensors that everything is made of, by name, those of each task stacked; drawn from the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        found: dict[str, Tensor] = {}
        for name, shape in self._float_shapes().items():
            lead = (self.tasks,) if name in self.own else ()
            noise = torch.randn((*lead, *shape), generator=generator, dtype=torch.float64)
            number = self.rule.of.numbers.get(name.removeprefix("h.").split("/")[0]) if name[:2] == "h." else None
            found[name] = number * (1 + 0.1 * torch.tanh(noise)) if number is not None else 0.7 * noise + 0.1
        if "complex" in self.loss.names:
            lead = (self.tasks,) if "complex" in self.own else ()
            found["complex"] = 0.5 * torch.randn((*lead, self.width), generator=generator, dtype=torch.complex128)
        return {name: x.to(_of_kind(x, self.dtype)) for name, x in found.items()}

    @property
    def width(self) -> int:
        """How many numbers the parameters are."""
        return sum(x.numel() for x in self._example())

    def _example(self) -> list[Tensor]:
        return [trees.LAYOUTS[layout](torch.zeros(self.shapes[base])) for base, layout in self.leaves]

    def _float_shapes(self) -> dict[str, tuple[int, ...]]:
        width, names = self.width, self.loss.names
        shapes = {f"p{i}": shape for i, shape in enumerate(self.shapes)}
        named = {"x": (width,), "u": (width,), "hidden": (3, 1), "last": (1, 3)}
        shapes |= {name: shape for name, shape in named.items() if name in names}
        if "batch_x" in names:
            shapes["batch_x"] = (width,) if self.batches in ("none", "expanded") else (self.steps, width)
        leaf_shapes = [tuple(x.shape) for x in self._example()]
        return shapes | {f"h.{name}": shape for name, shape in self.rule.shapes(leaf_shapes, self.steps).items()}

    def wanted(self, bases: dict[str, Tensor]) -> list[str]:
        """The names of what the derivative is taken of; always one at least."""
        return [name for name in bases if name not in self.frozen] or ["p0"]

    # ------------------------------------------------------------------ what they are made into

    def leaves_of(self, bases: dict[str, Tensor]) -> list[Tensor]:
        """The leaves of the parameters; two that show one tensor in one way are one object."""
        made = {pair: trees.LAYOUTS[pair[1]](bases[f"p{pair[0]}"]) for pair in self.leaves}
        return [made[pair] for pair in self.leaves]

    def optimizer(self, bases: dict[str, Tensor]) -> diffopt.Optimizer:
        return self.rule.optimizer(self.hyperparameters(bases), self.params, len(self.leaves), self.steps)

    def hyperparameters(self, bases: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name[2:]: x for name, x in bases.items() if name[:2] == "h."}

    def arguments(self, bases: dict[str, Tensor]) -> tuple[Any, ...]:
        """The arguments of the loss besides the parameters and the batch: one tree, with spectators; or none."""
        held = [self.constants(bases)[name] for name in self.argument_names]
        held += [SPECTATORS[name] for name in self.spectators]
        return (trees.fill(self.args, held),) if held else ()

    @property
    def argument_names(self) -> list[str]:
        """The named tensors that come in the arguments, in the order of the leaves of their tree."""
        return sorted(name for name in self.loss.names if not name.startswith("batch_") and name != "number")

    def constants(self, bases: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named tensors, those included that cannot be learned."""
        places = torch.arange(self.width)
        anchor = self.leaves_of(bases)[0]  # where its layout is plain, the very object that is a leaf of the parameters
        return {**bases, "anchor": anchor, "mask": places % 3 != 1, "index": (places * 2 + 1) % self.width}

    def batch_tree(self, bases: dict[str, Tensor]) -> Any:
        """What is given as ``batches``."""
        if self.batches == "none":
            return None
        tree: dict[str, Any] = {"number": torch.arange(self.steps)}
        if "batch_x" in bases:
            x = bases["batch_x"]
            tree["batch_x"] = x.expand(self.steps, *x.shape) if self.batches == "expanded" else x
        return tree if self.batches != "tuple" else (tree, torch.ones(self.steps, 2, 0), torch.zeros(self.steps).bool())

    # ------------------------------------------------------------------ the losses

    def solved_loss(self, params: Any, *rest: Any) -> Tensor:
        """The loss as the library calls it: it finds everything by walking down the trees that it is given."""
        rest, named = list(rest), {}
        if self.batches != "none":
            batch = rest.pop()
            named = dict(batch[0] if self.batches == "tuple" else batch)
        count = len(self.argument_names) + len(self.spectators)
        if count:
            found = trees.pick(self.args, rest.pop())
            named |= dict(zip(self.argument_names, found, strict=False))
        assert not rest
        return self._loss(trees.pick(self.params, params), named, solving=True)

    def plain_loss(self, leaves: Sequence[Tensor], bases: dict[str, Tensor], step: int) -> Tensor:
        """The same, from what it is made of; ``step`` counts from 1."""
        named = self.constants(bases)
        if "batch_x" in named and self.batches not in ("none", "expanded"):
            named["batch_x"] = named["batch_x"][step - 1]
        if self.batches != "none":
            named["number"] = torch.tensor(step - 1)
        return self._loss(leaves, named, solving=False)

    def _loss(self, leaves: Sequence[Tensor], named: dict[str, Any], solving: bool) -> Tensor:
        return self.loss.at(Scope(torch.cat([x.reshape(-1) for x in leaves]), named, solving))

    def outer(self, leaves: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Tensor:
        """The outer loss of the final parameters (and of the buffers, in a fixed order); or one final number."""
        if self.row is not None:
            return torch.cat([x.reshape(-1) for x in leaves])[self.row]
        total = sum((torch.sin(x + 0.3 * i) + 0.5 * x * x).sum() for i, x in enumerate(leaves))
        return total + sum((0.3 + 0.1 * i) * torch.sin(x).sum() for i, x in enumerate(buffers))


def _of_kind(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if not x.is_complex() else dtype.to_complex()


SPECTATORS: dict[str, Any] = {
    "none": None,
    "text": "x",
    "number": 3,
    "module": torch.nn.Linear(1, 1),
    "function": torch.sin,
    "no_numbers": torch.empty(0),
    "sparse": torch.eye(2).to_sparse(),
    "integers": torch.arange(3),
    "half": torch.ones(2, dtype=torch.float16),
    "array": torch.arange(3).numpy(),
    "generator": torch.Generator(),
    "wants_grad": torch.ones(2, requires_grad=True),
    "set": {1, 2},
    "boolean": True,
}
"""Arguments that the loss does not look at."""


@st.composite
def calls(draw: st.DrawFn, modes: tuple[str, ...] = MODES) -> Call:
    """A call that has an oracle, or that is to be refused because of its mode or its estimator."""
    mode = draw(st.sampled_from(modes))
    steps = draw(st.integers(0, 6))
    batches = draw(st.sampled_from(("none", "stacked", "expanded", "tuple")))
    vectors = VECTORS if batches != "none" else VECTORS[:3]
    special = set(SPECIAL) - ({"branch"} if batches == "none" else set())
    special -= {"complex"} if mode == "jacrev" else set()  # torch's jacrev is for real inputs
    loss = draw(losses(vectors, tuple(sorted(special)) if draw(st.booleans()) else ()))
    bases = draw(st.integers(1, 3))
    shapes = tuple(draw(st.sampled_from(trees.SHAPES)) for _ in range(bases))
    layouts = tuple(trees.LAYOUTS) if draw(st.booleans()) else ("plain",)
    if mode in TASK_MODES:  # torch cannot make such a view under vmap
        layouts = tuple(layout for layout in layouts if layout != "negative")
    leaves = [(i, draw(st.sampled_from(layouts))) for i in range(bases)]
    if draw(st.integers(0, 3)) == 0:  # one tensor in two places
        leaves.append(leaves[0])
    names = [name for name in loss.names if not name.startswith("batch_") and name != "number"]
    spectators = tuple(draw(st.lists(st.sampled_from(sorted(SPECTATORS)), max_size=2)))
    count = len(names) + len(spectators)
    rule = draw(rules.rules())
    if steps == 0:  # a schedule without an entry has no first value
        rule = rules.Rule(
            rule.kind,
            tuple((name, "float" if "schedule" in form else form) for name, form in rule.forms),
            rule.switches,
        )
    dtype = torch.float32 if mode == "autocast" else draw(st.sampled_from([torch.float64] * 4 + [torch.float32]))
    call = Call(
        seed=draw(st.integers(0, 999)),
        dtype=torch.float64 if loss.specials & RANDOM else dtype,
        steps=steps,
        shapes=shapes,
        leaves=tuple(leaves),
        params=draw(trees.skeletons(len(leaves))),
        args=draw(trees.skeletons(count)) if count else 0,
        spectators=spectators,
        loss=loss,
        batches=batches,
        rule=rule,
        estimator=draw(specs(steps)),
        mode=mode,
        frozen=frozenset(),
        own=frozenset(),
        tasks=draw(st.integers(1, 3)) if mode in TASK_MODES else 1,
        task_chunk=draw(st.sampled_from((None, 1, 2))),
        reads_buffers=draw(st.booleans()),
        check=draw(st.integers(0, 3)) > 0,
    )
    learned = sorted(call.bases())
    frozen = frozenset(draw(st.sets(st.sampled_from(learned)))) if draw(st.integers(0, 2)) == 0 else frozenset()
    own = frozenset(draw(st.sets(st.sampled_from(learned), min_size=1))) if mode in TASK_MODES else frozenset()
    return Call(**{**vars(call), "frozen": frozen, "own": own})
