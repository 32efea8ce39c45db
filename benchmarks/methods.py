"""The methods that several workloads share, under the names that tables, goals and pictures use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import limit, ours
from benchmarks.measure import Method, Prepared, Role
from benchmarks.peers import functorch, higher, jax, learn2learn, loop, torchopt
from diffopt.estimators import Reverse

PLAIN_LOOP = Method("plain loop", Role.LOOP_PEER, loop.unroll)
HIGHER = Method("higher", Role.LOOP_PEER, higher.innerloop)
LEARN2LEARN = Method("learn2learn style", Role.LOOP_PEER, learn2learn.adapt)
TORCHOPT_META = Method("TorchOpt MetaSGD", Role.LOOP_PEER, torchopt.meta_sgd)
TORCHOPT_FUNCTIONAL = Method("TorchOpt functional", Role.LOOP_PEER, torchopt.functional)
LOOP_PEERS = (PLAIN_LOOP, HIGHER, LEARN2LEARN, TORCHOPT_META, TORCHOPT_FUNCTIONAL)

FUNCTORCH = Method("functorch, backward outside", Role.PEER, functorch.backward_outside)
FUNCTORCH_INSIDE = Method("functorch, vmap(grad)", Role.PEER, functorch.gradient_inside)

STACKED = Method("by hand (a limit)", Role.LIMIT, limit.stacked)
PRODUCTS = Method("matrix products alone", Role.ARITHMETIC, Prepared(limit.products))

GRAPH, STATES, SQRT = Reverse("graph"), Reverse(1), Reverse("sqrt")

OURS_GRAPH = Method("ours, graphs", Role.OURS, lambda problem: ours.vmapped(problem, GRAPH))
OURS_STATES = Method("ours, states", Role.OURS, lambda problem: ours.vmapped(problem, STATES))
OURS_SQRT = Method("ours, checkpoints", Role.OURS, lambda problem: ours.vmapped(problem, SQRT))
OURS_VMAPPED = (OURS_GRAPH, OURS_STATES, OURS_SQRT)

PROGRAM = Method("ours, compiled program", Role.OURS, Prepared(ours.program), compiles=True)
COMPILED = Method(
    "ours, compile=True", Role.OURS, lambda problem: ours.vmapped(problem, STATES, compiled=True), compiles=True
)
COMPILED_SQRT = Method(
    "ours, compile=True, checkpoints",
    Role.OURS,
    lambda problem: ours.vmapped(problem, SQRT, compiled=True),
    compiles=True,
)
LOOP_COMPILED = Method(
    "ours, loop, compile=True", Role.OURS, lambda problem: ours.looped(problem, STATES, compiled=True), compiles=True
)

OURS_LOOP_GRAPH = Method("ours, loop, graphs", Role.OURS, lambda problem: ours.looped(problem, GRAPH))
OURS_LOOP_STATES = Method("ours, loop, states", Role.OURS, lambda problem: ours.looped(problem, STATES))
OURS_LOOP_SQRT = Method("ours, loop, checkpoints", Role.OURS, lambda problem: ours.looped(problem, SQRT))
OURS_LOOPED = (OURS_LOOP_GRAPH, OURS_LOOP_STATES, OURS_LOOP_SQRT)


def jax_method(name: str, make: Callable[[Any], Any], needs: str = "jax") -> Method:
    """A method of JAX's, which is compiled once for a problem, and says itself how much memory it plans."""
    program = Prepared(make)
    return Method(name, Role.JAX, program, needs=needs, weigh=lambda problem: program.of(problem).bytes())


def by_jax(losses: jax.Losses) -> tuple[Method, Method]:
    """JAX through the steps, with and without ``jax.checkpoint``."""
    return (
        jax_method("JAX", jax.unrolled(losses)),
        jax_method("JAX, remat", jax.unrolled(losses, remat=True)),
    )
