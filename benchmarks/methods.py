"""The methods that several workloads share, under the names that tables, goals and pictures use."""

from __future__ import annotations

from benchmarks import limit, ours
from benchmarks.measure import Method, Role
from benchmarks.peers import functorch, higher, learn2learn, loop, torchopt
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

GRAPH, STATES, SQRT = Reverse("graph"), Reverse(1), Reverse("sqrt")

OURS_GRAPH = Method("ours, graphs", Role.OURS, lambda problem: ours.vmapped(problem, GRAPH))
OURS_STATES = Method("ours, states", Role.OURS, lambda problem: ours.vmapped(problem, STATES))
OURS_SQRT = Method("ours, checkpoints", Role.OURS, lambda problem: ours.vmapped(problem, SQRT))
OURS_VMAPPED = (OURS_GRAPH, OURS_STATES, OURS_SQRT)
OURS_COMPILED = Method(
    "ours, compiled", Role.OURS, lambda problem: ours.vmapped(problem, STATES, compiled=True), compiles=True
)
OURS_COMPILED_SQRT = Method(
    "ours, compiled checkpoints", Role.OURS, lambda problem: ours.vmapped(problem, SQRT, compiled=True), compiles=True
)

OURS_LOOP_GRAPH = Method("ours, loop, graphs", Role.OURS, lambda problem: ours.looped(problem, GRAPH))
OURS_LOOP_STATES = Method("ours, loop, states", Role.OURS, lambda problem: ours.looped(problem, STATES))
OURS_LOOP_SQRT = Method("ours, loop, checkpoints", Role.OURS, lambda problem: ours.looped(problem, SQRT))
OURS_LOOPED = (OURS_LOOP_GRAPH, OURS_LOOP_STATES, OURS_LOOP_SQRT)
