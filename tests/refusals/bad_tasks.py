"""Bad inputs: problems with data, episode sampling, networks, loaders of files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bad_row import Row, elsewhere, tensor

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

EYE = torch.eye(2, dtype=torch.float64)
IMAGES = torch.zeros(5, 4, 8, 8, dtype=torch.uint8)


def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def episodes(images: Any = IMAGES, **changed: Any) -> Any:
    return sample_episodes(images, **{"way": 2, "shot": 1, "query": 1, "tasks": 2, "generator": source(), **changed})


def quadratic() -> Quadratic:
    return Quadratic(EYE, tensor(1, 1))


def ridge(**changed: Any) -> Ridge:
    return Ridge.random(**{"samples": 3, "features": 2, "generator": source(), **changed})


def rows(inputs: Any, targets: Any) -> Ridge:
    return Ridge(inputs, targets, torch.ones(3, 2), torch.ones(3))


UINT8 = r"expected uint8 \[classes, examples, \(channels,\) height, width\]"
WHOLE = "expected an integer >= 1"
GENERATOR = "expected a torch.Generator; make one and seed it"
PROBLEMS: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        f"episodes_{name}_{x}": (lambda name=name, x=x: episodes(**{name: x}), f"{name} is .*, {WHOLE}")
        for name in ("way", "shot", "query", "tasks")
        for x in (0, 2.0, "2", True)
    },
    "episodes_generator": (lambda: episodes(generator=0), f"generator is int 0, {GENERATOR}"),
    "quadratic_shapes": (
        lambda: Quadratic(torch.eye(2), torch.ones(3)),
        r"\(2, 2\) and \(3,\), expected \[d, d\] and \[d\]",
    ),
    "quadratic_not_symmetric": (
        lambda: Quadratic(tensor(1, 2, 0, 1).view(2, 2), tensor(1, 1)),
        "not symmetric, expected",
    ),
    "quadratic_dtypes": (
        lambda: Quadratic(EYE, torch.ones(2)),
        r"target is .*expected torch.float64 .* as hessian; use \.to",
    ),
    "quadratic_device": (lambda: Quadratic(EYE, elsewhere(2)), "target is .*on meta, expected .*on cpu as hessian"),
    "quadratic_integers": (
        lambda: Quadratic(EYE.int(), EYE[0].int()),
        "hessian is .*expected a floating tensor; convert",
    ),
    "quadratic_list": (
        lambda: Quadratic([[1.0]], [1.0]),
        r"hessian is list \[\[1.0\]\], expected a floating tensor",
    ),
    "quadratic_nan": (lambda: Quadratic(EYE / 0, EYE[0]), "hessian holds NaN or infinite numbers, expected finite"),
    "quadratic_dimension": (
        lambda: Quadratic.random(2.5, definite=True, generator=source()),
        "2.5, expected an integer >= 1",
    ),
    "quadratic_small": (
        lambda: Quadratic.random(1, definite=False, generator=source()),
        "is int 1, expected .*at least 2 if not",
    ),
    "quadratic_generator": (lambda: Quadratic.random(2, definite=True, generator=None), f"NoneType None, {GENERATOR}"),
    "quadratic_steps": (
        lambda: quadratic().hypergradient(EYE[0], EYE[0], 0.1, -1),
        "steps is int -1, expected an integer >= 0",
    ),
    "quadratic_start": (
        lambda: quadratic().hypergradient(tensor(1), EYE[0], 0.1, 1),
        r"initial has shape \(1,\), expected \(2,",
    ),
    "quadratic_params": (
        lambda: quadratic().loss(tensor(1), EYE[0]),
        r"params has shape \(1,\), expected \(2,\), one entry",
    ),
    "quadratic_indefinite": (
        lambda: Quadratic(-EYE, EYE[0]).minimiser(EYE[0]),
        "smallest eigenvalue is -1, expected one above 0; .*definite=True",
    ),
    "ridge_rows": (
        lambda: rows(torch.ones(3, 2), torch.ones(4)),
        r"\(3, 2\) and \(4,\), expected \[samples, features\]",
    ),
    "ridge_features": (
        lambda: rows(torch.ones(3, 4), torch.ones(3)),
        "expected .*as many features in training as in valid",
    ),
    "ridge_numpy": (
        lambda: rows(np.ones((3, 2)), np.ones(3)),
        "inputs is ndarray .*expected a floating tensor; convert",
    ),
    "ridge_dtypes": (lambda: rows(torch.ones(3, 2), tensor(1, 1, 1)), "targets is a float64 .*expected torch.float32"),
    "ridge_samples": (lambda: ridge(samples=0), f"samples is int 0, {WHOLE}"),
    "ridge_noise": (lambda: ridge(noise="x"), "noise is str 'x', expected a finite number >= 0"),
    "ridge_penalty": (
        lambda: ridge().hypergradient(tensor(1)),
        r"log_penalty has shape \(1,\), expected one entry per feature",
    ),
    "sinusoid_shots": (lambda: Sinusoid(1.5, 1), f"shots is float 1.5, {WHOLE}"),
    "sinusoid_queries": (lambda: Sinusoid(1, 0), f"queries is int 0, {WHOLE}"),
    "sinusoid_tasks": (lambda: Sinusoid().sample(0, source()), f"tasks is int 0, {WHOLE}"),
    "sinusoid_generator": (lambda: Sinusoid().sample(1, 0), f"generator is int 0, {GENERATOR}"),
    "sinusoid_dtype": (lambda: Sinusoid().sample(1, source(), torch.int64), "torch.int64, expected a floating one"),
    "mlp_one_size": (lambda: MLP((3,)), r"sizes is tuple \(3,\), expected two or more integers, such as"),
    "mlp_number": (lambda: MLP(3), "sizes is int 3, expected two or more integers"),
    "mlp_size": (lambda: MLP((1, 2.5)), rf"sizes\[1\] is float 2.5, {WHOLE}"),
    "mlp_activation": (
        lambda: MLP((1, 1), activation="relu"),
        "activation is str 'relu', expected a function, such as",
    ),
    "mlp_generator": (lambda: MLP((1, 1), generator=0), f"generator is int 0, {GENERATOR}"),
    "conv4_way": (lambda: Conv4(1, 0), f"way is int 0, {WHOLE}"),
    "conv4_small_images": (lambda: Conv4(1, 5, image_size=15), "image_size .*is int 15, expected an integer >= 16"),
    "norm_channels": (lambda: BatchStatisticsNorm2d(0), f"channels is int 0, {WHOLE}"),
    "norm_inputs": (
        lambda: BatchStatisticsNorm2d(2)(torch.ones(1, 2, 1, 1)),
        "expected .*two or more values per channel",
    ),
}


def in_folder(members: dict[str, bytes] | bytes | None, load: Callable[[Path], Any], name: str = "some.zip") -> Any:
    """Load from a folder that holds one file: a zip with these members, these bytes, or nothing."""
    with TemporaryDirectory(prefix="d") as folder:
        path = Path(folder) / name
        if isinstance(members, dict):
            with zipfile.ZipFile(path, "w") as file:
                for member, content in members.items():
                    file.writestr(member, content)
        elif members is not None:
            path.write_bytes(members)
        return load(path)


def background(path: Path) -> Omniglot:
    return Omniglot.load(path.parent, split="background")


def archive(path: Path) -> Omniglot:
    return Omniglot.from_archives([path])


DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "episodes_too_few_classes": (
        lambda: episodes(way=9),
        "way is 9, expected at most 5; there are only 5 classes; lower",
    ),
    "episodes_too_few_images": (
        lambda: episodes(shot=9),
        r"9 \+ 1, expected at most 4; a class has only 4 images; lower",
    ),
    "episodes_floats": (lambda: episodes(IMAGES.float()), rf"float32 of shape \(5, 4, 8, 8\), {UINT8}"),
    "episodes_axes": (lambda: episodes(IMAGES[0]), rf"shape \(4, 8, 8\), {UINT8}"),
    "episodes_numpy": (lambda: episodes(IMAGES.numpy()), "images is ndarray .*expected a uint8 tensor; convert"),
    "omniglot_split": (
        lambda: in_folder(None, lambda p: Omniglot.load(p.parent, split="train")),
        "'train', expected one of",
    ),
    "omniglot_folder": (
        lambda: Omniglot.load(3, split="background"),
        "folder is int 3, expected a path, a str or a Path",
    ),
    "omniglot_no_folder": (
        lambda: in_folder(None, lambda p: Omniglot.load(p.parent / "none", split="evaluation")),
        "there is no such folder, expected omniglot_28.npz or .*--data-dir",
    ),
    "omniglot_no_file": (lambda: in_folder(None, background), "none of the accepted files, expected omniglot_28.npz"),
    "omniglot_vinyals": (
        lambda: in_folder(None, lambda p: Omniglot.load(p.parent, split="vinyals-test")),
        "zips do not know the Vinyals splits",
    ),
    "omniglot_cut_short": (
        lambda: in_folder(b"PK", background, "images_background.zip"),
        "has 2 bytes, expected 9,464,212. .*download it again",
    ),
    "omniglot_other_bytes": (
        lambda: in_folder(bytes(5_524_973), background, "omniglot_28.npz"),
        "has SHA-256 .* expected a8d9.*download it again",
    ),
    "omniglot_not_a_list": (
        lambda: Omniglot.from_archives("x.zip"),
        r"paths is 'x.zip', expected a list .*put it in \[ \]",
    ),
    "omniglot_no_archives": (lambda: Omniglot.from_archives([]), r"no drawings in \[\], expected members such as"),
    "omniglot_no_archive": (
        lambda: in_folder(None, archive),
        "cannot be read .*No such file.*expected a zip; download it again",
    ),
    "omniglot_not_a_zip": (
        lambda: in_folder(b"PK\x03\x04", archive),
        "cannot be read .*expected a zip; download it again",
    ),
    "omniglot_no_drawings": (
        lambda: in_folder({"x/readme.txt": b""}, archive),
        "no drawings in .*expected members such as",
    ),
    "omniglot_no_picture": (
        lambda: in_folder({"x/A/character01/0001_01.png": b"?"}, archive),
        "not a readable image .*expected a PNG; download",
    ),
}
ROWS: dict[str, Row] = {
    **{f"tasks_{name}": Row("tasks", call, ProblemError, says) for name, (call, says) in PROBLEMS.items()},
    **{f"data_{name}": Row("data", call, DataError, says) for name, (call, says) in DATA.items()},
}
