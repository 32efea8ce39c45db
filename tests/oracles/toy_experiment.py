"""An experiment for the tests of the frame, and the command line with this experiment only."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from diffopt.cli import main
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.experiment import Claim, Experiment, Needs, Row, Summary, Table, Unit
from diffopt.experiments.framework.options import option, real, whole
from diffopt.experiments.framework.unit_context import Work


@dataclass(frozen=True)
class Settings:
    draws: int = option(3, "units that only draw", whole(0))
    iterations: int = option(40, "of the long unit", whole(1))
    seconds: float = option(0.0, "that a unit or an iteration sleeps", real(0, above=False))


def draw(settings: Settings, number: int, work: Work) -> Row:
    time.sleep(settings.seconds)
    shared, own = (torch.rand(2, generator=work.generator(label)) for label in ("shared", f"own {number}"))
    return {"shared": shared.tolist(), "own": own.tolist()}


def train(settings: Settings, work: Work) -> Row:
    """Adam on a noisy quadratic: parameters, optimizer and generator all decide where it ends."""
    generator, weights = work.generator("noise"), torch.ones(3, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.Adam([weights], lr=0.1)
    losses: list[float] = []
    if state := work.saved():
        with torch.no_grad():
            weights.copy_(state["weights"])
        outer.load_state_dict(state["outer"])
        generator.set_state(state["generator"])
        losses = state["losses"]
    while len(losses) < settings.iterations:
        time.sleep(settings.seconds)
        loss = (weights - torch.randn(3, generator=generator, dtype=torch.float64)).square().sum()
        outer.zero_grad()
        torch.autograd.backward(loss)
        outer.step()
        losses.append(loss.item())
        work.step(
            len(losses),
            settings.iterations,
            f"loss {losses[-1]:.2f}",
            lambda: {
                "weights": weights.detach(),
                "outer": outer.state_dict(),
                "generator": generator.get_state(),
                "losses": losses,
            },
        )
    return {"weights": weights.tolist(), "losses": losses}


def units(settings: Settings) -> list[Unit]:
    drawing = [Unit(f"draw {number}", partial(draw, settings, number)) for number in range(settings.draws)]
    return [*drawing, Unit("train", partial(train, settings), cost=settings.iterations, resumable=True)]


def summarise(settings: Settings, results: dict[str, Row]) -> Summary:
    rows = tuple((name, row["shared"][0], 0.5) for name, row in results.items() if "shared" in row)
    claim = Claim("it trains", "no paper", "yes" if results else "not measured", "it ran")
    return Summary((Table("what was drawn", ("unit", "ours", "paper"), rows),), (claim,), ("A note.",))


def picture(settings: Settings, results: dict[str, Row], folder: Path) -> list[Path]:
    (folder / "toy.png").write_bytes(b"\x89PNG")
    return [folder / "toy.png"]


TOY = Experiment(
    name="toy",
    title="A toy",
    paper="none",
    needs=Needs("none", 0, None),
    quick=Settings(1, 5),
    standard=Settings(),
    full=Settings(10, 400),
    units=units,
    summarise=summarise,
    draw=picture,
)


def program() -> list[str]:
    """The start of a command line that runs ``diffopt`` with the toy in a process of its own."""
    # from the current folder, as python -m diffopt would: that is where a checkout under test is
    lines = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import toy_experiment as toy; toy.run()"
    return [sys.executable, "-c", lines]


def run() -> None:
    """For :func:`program`."""
    catalogue.experiment = lambda name: TOY
    sys.exit(main(sys.argv[1:]))
