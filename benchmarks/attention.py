"""Memory and time of hypergradients through attention: ``python -m benchmarks.attention``.

One table of attention alone (value, gradient, product with the Hessian), one of a hypergradient of a deep transformer,
by torch's math kernel and by ``diffopt.nn``, with and without blocks that are computed again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt
from benchmarks.measure import Cell, Method, Role
from diffopt.estimators import Reverse
from diffopt.nn import second_order_attention
from diffopt.tensors.memory import peak_bytes

HEADS, WIDTH, BLOCKS, LENGTH = 4, 64, 8, 256
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "math kernel": lambda: sdpa_kernel([SDPBackend.MATH]),
    "diffopt.nn": second_order_attention,
}


def leaves(dtype: torch.dtype, device: torch.device, tasks: int, length: int) -> list[Tensor]:
    """Queries, keys and values."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return [draw(1, HEADS, length, WIDTH // HEADS).to(device).requires_grad_() for _ in range(3)]


def product(context: Callable[[], AbstractContextManager[Any]], leaves: list[Tensor]) -> Sequence[Tensor]:
    """A product with the Hessian of a loss of attention."""
    with context():
        value = F.scaled_dot_product_attention(*leaves).square().sum()
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    return torch.autograd.grad([g.sum() for g in gradients], leaves)


def cells(lengths: Sequence[int]) -> list[Cell]:
    """The products alone, as cells of the benchmark."""
    roles = {"math kernel": Role.PEER, "diffopt.nn": Role.OURS}
    ways = [Method(name, role, functools.partial(product, CONTEXTS[name])) for name, role in roles.items()]
    return [Cell("GPU", f"attention, {n} keys", functools.partial(leaves, length=n), ways) for n in lengths]


def hypergradient(context: Callable[[], AbstractContextManager[Any]], checkpoint: Any) -> None:
    """Of a weight of the data, through a step of AdamW."""
    torch.manual_seed(0)
    blocks = [nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(BLOCKS)]
    function, params = diffopt.functional(nn.Sequential(*blocks), checkpoint)
    x, weight = torch.randn(1, LENGTH, WIDTH), torch.ones((), requires_grad=True)

    def loss(params: Any, weight: Tensor) -> Tensor:
        with context():
            return (function(params, x) - 1).square().mean() * weight

    optimizer = diffopt.AdamW(1e-3)
    end = diffopt.solve(loss, params, weight, optimizer=optimizer, steps=1, estimator=Reverse(1), check=False).params
    torch.autograd.grad(sum(p.square().sum() for p in end.values()), weight)


def row(name: str, work: Callable[[], None]) -> None:
    work()  # what is loaded at the first use
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    print(f"| {name} | {(peak_bytes(work) or 0) / 2**20:.1f} MB | {seconds:.2f} s |", flush=True)


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    print("| attention, 4 heads | peak | time |\n|---|---|---|")
    for length in (512, 1024, 2048):
        for name, context in CONTEXTS.items():
            given = leaves(torch.float32, torch.device("cpu"), 1, length)
            row(f"{length} keys, {name}", lambda c=context, x=given: product(c, x))  # type: ignore[misc]
    print(f"\n| hypergradient, {BLOCKS} blocks, {LENGTH} words | peak | time |\n|---|---|---|")
    for name, context in CONTEXTS.items():
        for blocks in ((), lambda name: name.isdecimal()):
            text = f"{name}, checkpoint=blocks" if blocks else name
            row(text, lambda c=context, b=blocks: hypergradient(c, b))  # type: ignore[misc]


if __name__ == "__main__":
    main()
