"""W1 by JAX, as its users write it: ``jit`` of ``value_and_grad`` of ``vmap`` of ``scan``, optionally with ``remat``.

It needs JAX and numpy, not torch, so that it may run in an environment of its own: ``benchmarks.programs`` starts it,
hands it the tensors in a file, and talks to it by lines of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")


def program(steps: int, lr: float, remat: bool) -> Any:
    """The mean outer loss after ``steps`` steps of gradient descent, and its gradient by the initial params."""
    import jax

    numpy: Any = jax.numpy

    def loss(params: Any, x: Any, y: Any) -> Any:
        hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
        hidden = jax.nn.relu(hidden @ params["w2"] + params["b2"])
        return numpy.mean((hidden @ params["w3"] + params["b3"] - y) ** 2)

    def adapted(params: Any, x: Any, y: Any) -> Any:
        def step(now: Any, _: Any) -> Any:
            grads = jax.grad(loss)(now, x, y)
            return {name: now[name] - lr * grads[name] for name in now}, None

        return jax.lax.scan(jax.checkpoint(step) if remat else step, params, None, length=steps)[0]

    def outer(params: Any, data: Any) -> Any:
        return numpy.mean(jax.vmap(lambda a, b, c, d: loss(adapted(params, a, b), c, d))(*data))

    return jax.jit(jax.value_and_grad(outer))


def main(path: str, steps: int, lr: float, remat: bool) -> None:
    """Compile, print the gradient; then, for each line that is a number, the milliseconds of so many calls, each."""
    import jax
    import numpy

    with numpy.load(path) as stored:
        given = dict(stored)
    if given["support_x"].dtype == numpy.float64:
        jax.config.update("jax_enable_x64", True)
    params = {name: jax.numpy.asarray(given[name]) for name in ("w1", "b1", "w2", "b2", "w3", "b3")}
    data = tuple(jax.numpy.asarray(given[name]) for name in ("support_x", "support_y", "query_x", "query_y"))
    call, began = program(steps, lr, remat), time.process_time()
    _, grads = jax.block_until_ready(call(params, data))
    answer = {name: numpy.asarray(x).tolist() for name, x in grads.items()}
    print(json.dumps({"compiled": time.process_time() - began, "gradient": answer}), flush=True)
    for line in sys.stdin:
        began = time.process_time()
        for _ in range(int(line)):
            jax.block_until_ready(call(params, data))
        print(json.dumps((time.process_time() - began) / int(line) * 1e3), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "remat")
