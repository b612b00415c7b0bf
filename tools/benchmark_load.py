"""Measures how fast a transformer is loaded from a generated file, and the memory that this takes beyond the model.

python tools/benchmark_load.py [dtype=bfloat16 device=cpu folder=/tmp depth=3 depth_single_blocks=4 ...]

Other keys are MMDiTConfig's fields; the default is a seventh of FLUX.1-Fill-dev, 3.3 GB. Linux only. The page cache is
dropped before each read, and as much memory touched first: a virtual machine's host is slow to provide it.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from layerdecomp.cli import device_name, named_dtype, run_command, take
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.overrides import merge_config
from layerdecomp.tensor_files import empty, write_tensors
from layerdecomp.weights import load_mmdit


def main(arguments: list[str]) -> None:
    own, settings = take(arguments, dtype="bfloat16", device="cpu", folder=tempfile.gettempdir())
    dtype, config = named_dtype(own), merge_config(MMDiTConfig(depth=3, depth_single_blocks=4), [], settings)
    with tempfile.TemporaryDirectory(dir=own["folder"]) as folder:
        path = Path(folder) / "transformer.safetensors"
        generate(path, config)
        size, alone = path.stat().st_size / 1e9, read(path)
        first = touch(round(path.stat().st_size * dtype.itemsize / 2))
        forget(path)
        before, start = gigabytes("VmRSS"), time.perf_counter()
        model = load_mmdit(path, dtype=dtype, device=device_name(own))
        seconds, peak = time.perf_counter() - start, gigabytes("VmHWM") - before
    held = sum(p.nbytes for p in model.parameters()) / 1e9 if own["device"] == "cpu" else 0.0
    print(f"{size:.2f} GB in {seconds:.1f} s: {size / seconds:.2f} GB/s, the disk alone {size / alone:.2f} GB/s")
    print(f"first touch of as much memory, before: {first:.1f} s")
    print(f"peak memory {peak:.2f} GB, {max(0.0, peak - held):.2f} GB above the model's {held:.2f} GB")


def generate(path: Path, config: MMDiTConfig) -> None:
    with torch.device("meta"):
        state = MMDiT(config).to(torch.bfloat16).state_dict()
    number, described = torch.randn(1, dtype=torch.bfloat16), {"config": json.dumps(asdict(config))}
    write_tensors(path, state, lambda name: number.expand(state[name].shape), described)


def touch(size: int) -> float:
    """Seconds to write `size` bytes of new memory, which is then freed; resets the process's peak memory."""
    start = time.perf_counter()
    empty((size,), torch.uint8).fill_(1)
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    return time.perf_counter() - start


def read(path: Path) -> float:
    """Seconds to read the file and discard it."""
    forget(path)
    buffer, start = bytearray(1 << 24), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def gigabytes(field: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024 / 1e9


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
