"""The estimators with their options, and what is known of each: whether it is exact, and what it may refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from diffopt.estimators import (
    Binomial,
    ESJacobian,
    Estimator,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense


@dataclass(frozen=True)
class Spec:
    """An estimator by its name and options."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def get(self, option: str, default: Any = None) -> Any:
        return dict(self.options).get(option, default)

    def make(self) -> Estimator | None:
        """The library's object."""
        options = dict(self.options)
        if self.name == "default":
            return None
        if self.name == "MultiStep":
            return MultiStep(options["window"], Spec(options["adjoint"]).make() or Reverse())
        if self.name == "Implicit":
            solver = {"cg": ConjugateGradient(500, rtol=1e-9), "gmres": GMRES(60, rtol=1e-9), "dense": Dense()}
            return Implicit(solver[options["solver"]])
        if self.name == "ESJacobian":
            return ESJacobian(400, 1e-4, generator=torch.Generator().manual_seed(1))
        return _CLASSES[self.name](**options)

    @property
    def batches_steps(self) -> bool:
        """Whether it may evaluate the loss under a vmap of its own, which not every loss allows."""
        return self.name in ("Binomial", "Krylov", "ForwardMode", "ESJacobian")


_CLASSES: dict[str, Any] = {
    "Reverse": Reverse,
    "Unrolled": Unrolled,
    "ForwardMode": ForwardMode,
    "FirstOrder": FirstOrder,
    "Reptile": Reptile,
    "Truncated": Truncated,
    "Binomial": Binomial,
    "Krylov": Krylov,
}


@st.composite
def specs(draw: st.DrawFn, steps: int) -> Spec:
    """An estimator for this many steps; now and then with an option that does not fit them."""
    name = draw(st.sampled_from(("default", "Reverse", *_CLASSES, "MultiStep", "Implicit", "ESJacobian")))
    if name in ("Reverse", "Truncated"):
        checkpoint = draw(st.sampled_from((None, "graph", "sqrt", "log", 1, 2, 3, 10)))
        options = {"checkpoint": checkpoint, "offload": checkpoint not in (None, "graph") and draw(st.booleans())}
        if name == "Truncated":
            options["steps"] = draw(st.integers(0, steps + 1))
    elif name == "ForwardMode":
        options = {"chunk_size": draw(st.sampled_from((None, 1, 2, 100)))}
    elif name == "Binomial":
        options = {
            "order": draw(st.integers(0, steps + 1)),
            "window": draw(st.one_of(st.none(), st.integers(0, steps + 1))),
            "scale": draw(st.sampled_from((1.0, 1.0, 0.5, 0.0, -1.0, 2))),
            "chunk_size": draw(st.sampled_from((None, 1, 2))),
        }
    elif name == "Krylov":
        options = {"order": draw(st.integers(0, steps + 1)), "chunk_size": draw(st.sampled_from((None, 1, 2)))}
    elif name == "MultiStep":
        adjoint = draw(st.sampled_from(("default", "FirstOrder", "Unrolled", "ForwardMode", "Reptile")))
        options = {"window": draw(st.integers(1, 4)), "adjoint": adjoint}
    elif name == "Implicit":
        options = {"solver": draw(st.sampled_from(("cg", "gmres", "dense")))}
    else:
        options = {}
    return Spec(name, tuple(options.items()))
