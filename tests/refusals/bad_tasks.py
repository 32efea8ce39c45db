"""Bad inputs: problems with data, episode sampling, networks, loaders of files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bad_row import Refused, elsewhere, tensor

from diffopt.tasks import (
    MLP,
    BatchStatisticsNorm2d,
    Conv4,
    DataError,
    Omniglot,
    ProblemError,
    Quadratic,
    Ridge,
    Sinusoid,
    sample_episodes,
)

refused = Refused("tasks")
EYE = torch.eye(2, dtype=torch.float64)
IMAGES = torch.zeros(5, 4, 8, 8, dtype=torch.uint8)
UINT8 = r"expected uint8 \[classes, examples, \(channels,\) height, width\]"
WHOLE = "expected an integer >= 1"
FLOATING = "expected a floating tensor"
GENERATOR = "expected a torch.Generator; make one and seed it"


def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@refused(ProblemError, f"generator is int 0, {GENERATOR}", generator=0)
@refused(DataError, "way is 9, expected at most 5; there are only 5 classes; lower", way=9)
@refused(DataError, r"9 \+ 1, expected at most 4; a class has only 4 images; lower", shot=9)
@refused(DataError, rf"float32 of shape \(5, 4, 8, 8\), {UINT8}", IMAGES.float())
@refused(DataError, rf"shape \(4, 8, 8\), {UINT8}", IMAGES[0])
@refused(DataError, "images is ndarray .*expected a uint8 tensor; convert", IMAGES.numpy(), name="episodes_of_numpy")
def episodes(images: Any = IMAGES, **changed: Any) -> None:
    sample_episodes(images, **{"way": 2, "shot": 1, "query": 1, "tasks": 2, "generator": source(), **changed})


for size in ("way", "shot", "query", "tasks"):
    for value in (0, 2.0, "2", True):
        refused(ProblemError, f"{size} is .*, {WHOLE}", **{size: value})(episodes)


@refused(ProblemError, r"\(2, 2\) and \(3,\), expected \[d, d\] and \[d\]", torch.eye(2), torch.ones(3))
@refused(ProblemError, "not symmetric, expected", tensor(1, 2, 0, 1).view(2, 2), tensor(1, 1))
@refused(ProblemError, r"target is .*expected torch.float64 .* as hessian; use \.to", EYE, torch.ones(2))
@refused(ProblemError, "target is .*on meta, expected .*on cpu as hessian", EYE, elsewhere(2))
@refused(ProblemError, f"hessian is .*{FLOATING}; convert", EYE.int(), EYE[0].int())
@refused(ProblemError, rf"hessian is list \[\[1.0\]\], {FLOATING}", [[1.0]], [1.0])
@refused(ProblemError, "hessian holds NaN or infinite numbers, expected finite", EYE / 0, EYE[0])
def quadratic(hessian: Any, target: Any) -> None:
    Quadratic(hessian, target)


@refused(ProblemError, "2.5, expected an integer >= 1", 2.5)
@refused(ProblemError, "is int 1, expected .*at least 2 if not", 1, definite=False)
@refused(ProblemError, f"NoneType None, {GENERATOR}", 2, generator=None)
def random_quadratic(size: Any, **changed: Any) -> None:
    Quadratic.random(size, **{"definite": True, "generator": source(), **changed})


@refused(ProblemError, "steps is int -1, expected an integer >= 0", EYE[0], -1)
@refused(ProblemError, r"initial has shape \(1,\), expected \(2,", tensor(1), 1)
def quadratic_hypergradient(initial: Any, steps: Any) -> None:
    Quadratic(EYE, tensor(1, 1)).hypergradient(initial, EYE[0], 0.1, steps)


@refused(ProblemError, r"params has shape \(1,\), expected \(2,\), one entry")
def quadratic_params() -> None:
    Quadratic(EYE, tensor(1, 1)).loss(tensor(1), EYE[0])


@refused(ProblemError, "smallest eigenvalue is -1, expected one above 0; .*definite=True")
def quadratic_indefinite() -> None:
    Quadratic(-EYE, EYE[0]).minimiser(EYE[0])


@refused(ProblemError, r"\(3, 2\) and \(4,\), expected \[samples, features\]", torch.ones(3, 2), torch.ones(4))
@refused(ProblemError, "as many features in training as in valid", torch.ones(3, 4), torch.ones(3))
@refused(ProblemError, f"inputs is ndarray .*{FLOATING}; convert", np.ones((3, 2)), np.ones(3))
@refused(ProblemError, "targets is a float64 .*expected torch.float32", torch.ones(3, 2), tensor(1, 1, 1))
def ridge_rows(inputs: Any, targets: Any) -> None:
    Ridge(inputs, targets, torch.ones(3, 2), torch.ones(3))


@refused(ProblemError, f"samples is int 0, {WHOLE}", samples=0)
@refused(ProblemError, "noise is str 'x', expected a finite number >= 0", noise="x")
def ridge(**changed: Any) -> Ridge:
    return Ridge.random(**{"samples": 3, "features": 2, "generator": source(), **changed})


@refused(ProblemError, r"log_penalty has shape \(1,\), expected one entry per feature")
def ridge_penalty() -> None:
    ridge().hypergradient(tensor(1))


@refused(ProblemError, f"shots is float 1.5, {WHOLE}", 1.5, 1)
@refused(ProblemError, f"queries is int 0, {WHOLE}", 1, 0)
def sinusoid(shots: Any, queries: Any) -> None:
    Sinusoid(shots, queries)


@refused(ProblemError, f"tasks is int 0, {WHOLE}", 0)
@refused(ProblemError, f"generator is int 0, {GENERATOR}", 1, 0)
@refused(ProblemError, "torch.int64, expected a floating one", dtype=torch.int64)
def sinusoid_sample(tasks: Any = 1, generator: Any = None, **options: Any) -> None:
    Sinusoid().sample(tasks, source() if generator is None else generator, **options)


@refused(ProblemError, r"sizes is tuple \(3,\), expected two or more integers, such as", (3,))
@refused(ProblemError, "sizes is int 3, expected two or more integers", 3)
@refused(ProblemError, rf"sizes\[1\] is float 2.5, {WHOLE}", (1, 2.5))
@refused(ProblemError, "activation is str 'relu', expected a function, such as", (1, 1), activation="relu")
@refused(ProblemError, f"generator is int 0, {GENERATOR}", (1, 1), generator=0)
def mlp(sizes: Any, **options: Any) -> None:
    MLP(sizes, **options)


@refused(ProblemError, f"way is int 0, {WHOLE}", 0)
@refused(ProblemError, "image_size .*is int 15, expected an integer >= 16", 5, image_size=15)
def conv4(way: Any, **options: Any) -> None:
    Conv4(1, way, **options)


@refused(ProblemError, f"channels is int 0, {WHOLE}", 0)
@refused(ProblemError, "expected .*two or more values per channel", 2)
def batch_statistics(channels: Any) -> None:
    BatchStatisticsNorm2d(channels)(torch.ones(1, 2, 1, 1))


# --------------------------------------------------------------------------- files of Omniglot


@refused(DataError, "'train', expected one of", split="train")
@refused(DataError, "folder is int 3, expected a path, a str or a Path", folder=3)
@refused(DataError, "there is no such folder, expected omniglot_28.npz or .*--data-dir", folder="none")
@refused(DataError, "none of the accepted files, expected omniglot_28.npz")
@refused(DataError, "zips do not know the Vinyals splits", split="vinyals-test")
@refused(DataError, "has 2 bytes, expected 9,464,212. .*download it again", ("images_background.zip", b"PK"))
@refused(DataError, "has SHA-256 .* expected a8d9.*download it again", ("omniglot_28.npz", bytes(5_524_973)))
def omniglot(file: Any = None, folder: Any = "", split: str = "background") -> None:
    """Loaded from a folder with one file in it, or with none."""
    with TemporaryDirectory(prefix="d") as parent:
        if file is not None:
            Path(parent, file[0]).write_bytes(file[1])
        Omniglot.load(Path(parent, folder) if isinstance(folder, str) else folder, split=split)


@refused(DataError, r"paths is 'x.zip', expected a list .*put it in \[ \]", "x.zip")
@refused(DataError, r"no drawings in \[\], expected members such as", [])
def omniglot_archives(paths: Any) -> None:
    Omniglot.from_archives(paths)


@refused(DataError, "cannot be read .*No such file.*expected a zip; download it again", None)
@refused(DataError, "cannot be read .*expected a zip; download it again", b"PK\x03\x04")
@refused(DataError, "no drawings in .*expected members such as", {"x/readme.txt": b""})
@refused(DataError, "not a readable image .*expected a PNG; download", {"x/A/character01/0001_01.png": b"?"})
def omniglot_archive(content: dict[str, bytes] | bytes | None) -> None:
    """Read from a zip with these members, from these bytes, or from nothing."""
    with TemporaryDirectory(prefix="d") as folder:
        path = Path(folder, "some.zip")
        if isinstance(content, dict):
            with zipfile.ZipFile(path, "w") as file:
                for member, held in content.items():
                    file.writestr(member, held)
        elif content is not None:
            path.write_bytes(content)
        Omniglot.from_archives([path])
