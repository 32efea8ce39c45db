"""Time and peak memory of loading each data set: ``python -m benchmarks.loading [--data-dir DIR]``.

CIFAR-100, miniImageNet and tieredImageNet are stood in for by files of the official form and size, full of noise,
written to a temporary folder (4 GB); MNIST, Omniglot and Caltech-101 are the real ones, where they are. Each data set
is loaded in a process of its own, which reports the growth of its peak resident memory and its processor time.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STAND_INS = {
    "CIFARFS train": "CIFARFS.from_archive(folder / 'cifar-100-python.tar.gz', split='train')",
    "FC100 test": "FC100.from_archive(folder / 'cifar-100-python.tar.gz', split='test')",
    "MiniImageNet train": "MiniImageNet.load(folder, split='train')",
    "MiniImageNet train, size 32": "MiniImageNet.load(folder, split='train', size=32)",
    "TieredImageNet validation": "TieredImageNet.load(folder, split='validation')",
    "TieredImageNet validation, size 32": "TieredImageNet.load(folder, split='validation', size=32)",
}
REAL = {
    "Omniglot background, four rotations": "Omniglot.load(folder, split='background', rotations=True)",
    "MNIST train": "MNIST.load(folder, split='train')",
    "Caltech101 train": "Caltech101.load(folder, split='train')",
}


def python2(value: Any) -> bytes:
    """A piece of a pickle as Python 2 wrote it, protocol 2."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    shape = b"".join(map(python2, value.shape))
    number = value.dtype.str[1:].encode()
    state = (
        b"(K\x01("
        + shape
        + b"tcnumpy\ndtype\n(U\x02"
        + number
        + b"K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    )
    data = b"K\x00tb\x89T" + struct.pack("<i", value.nbytes) + value.tobytes()
    return b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR" + state + data + b"tb"


def write_stand_ins(folder: Path) -> None:
    """Files of the official form and size."""
    from PIL import Image

    from diffopt.tasks.class_lists import class_list, superclasses

    noise = np.random.default_rng(0)
    names = sorted(name for five in superclasses().values() for name in five)
    tables: dict[str, Any] = {"meta": {"fine_label_names": names}}
    for half, count in (("train", 500), ("test", 100)):
        data = noise.integers(0, 256, (100 * count, 3072), dtype=np.uint8)
        tables[half] = {"fine_labels": [place % 100 for place in range(100 * count)], "data": data}
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz", compresslevel=1) as archive:
        for name, table in tables.items():
            content = b"\x80\x02" + python2(table) + b"."
            entry = tarfile.TarInfo(f"cifar-100-python/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    classes = class_list("mini-imagenet", "train")
    images = noise.integers(0, 256, (600 * len(classes), 84, 84, 3), dtype=np.uint8)
    places = {name: list(range(600 * place, 600 * place + 600)) for place, name in enumerate(classes)}
    with (folder / "mini-imagenet-cache-train.pkl").open("wb") as file:
        file.write(b"\x80\x02" + python2({"image_data": images, "class_dict": places}) + b".")
    # Smooth pictures: the official ones take 16.5 kB each, noise would take 21.
    grid = noise.integers(0, 256, (40, 60, 60, 3), dtype=np.uint8)
    encoded = []
    for picture in grid:
        content = io.BytesIO()
        Image.fromarray(picture).resize((84, 84), Image.Resampling.BILINEAR).save(content, format="PNG")
        encoded.append(python2(np.frombuffer(content.getvalue(), np.uint8)[:, None]))
    with (folder / "val_images_png.pkl").open("wb") as file:
        file.write(b"\x80\x02](")
        for place in range(124_261):
            file.write(encoded[place % 40])
        file.write(b"e.")
    labels = (np.arange(124_261) % 97).astype(np.int32)
    table = {"label_specific": labels, "label_specific_str": [f"kind {place}" for place in range(97)]}
    (folder / "val_labels.pkl").write_bytes(b"\x80\x02" + python2(table) + b".")


def peak_megabytes() -> float:
    """This process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(call: str, folder: Path) -> None:
    """One data set: prints what it holds, the growth of memory and the processor time."""
    import torch

    from diffopt import tasks

    torch.set_num_threads(1)
    before, start = peak_megabytes(), time.process_time()
    loaded = eval(call, vars(tasks) | {"folder": folder})
    images = loaded.images.flat if isinstance(loaded.images, tasks.RaggedImages) else loaded.images
    seconds, grown = time.process_time() - start, peak_megabytes() - before
    print(json.dumps([list(images.shape), images.numel() / 1e6, grown, seconds]))


def main() -> None:
    """Write the stand-ins, load everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="where the real files are")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write_stand_ins(given.write)
        return
    if given.measure:
        measure(given.measure[0], Path(given.measure[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: a child's peak starts at that of its parent.
        subprocess.run([sys.executable, "-m", "benchmarks.loading", "--write", folder], check=True)
        cells = [(name, call, folder) for name, call in STAND_INS.items()]
        cells += [(name, call, str(given.data_dir)) for name, call in REAL.items() if given.data_dir]
        print(f"{'split':36}{'images':>26}{'stored':>11}{'peak':>11}{'time':>9}")
        for name, call, place in cells:
            command = [sys.executable, "-m", "benchmarks.loading", "--measure", call, place]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            shape, stored, grown, seconds = json.loads(output)
            print(f"{name:36}{shape!s:>26}{stored:>8.0f} MB{grown:>8.0f} MB{seconds:>7.1f} s", flush=True)


if __name__ == "__main__":
    main()
