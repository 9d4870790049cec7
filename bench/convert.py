"""Measure conversion of checkpoints against `cp` of the same file: `bench/convert.py [--preset full] [--folder DIR]`.

Copies and conversions alternate. Before each the source is dropped from the page cache and everything written before is
on the disk; both are timed until their output is on the disk too (`cp` and then fsync). The peak of resident memory is
that of a process of its own for each conversion.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from make_archive import PRESETS, write_archive

FORMATS = ("model", "sat", "hf")


def drop_cache(path: Path) -> None:
    """Forget the cached pages of a file or of all files in a folder."""
    os.sync()
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def copy(source: Path, output: Path) -> None:
    subprocess.run(["cp", str(source), str(output)], check=True)
    descriptor = os.open(output, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def convert_and_report_memory(source: Path, output: Path, to: str, results: multiprocessing.Queue[float]) -> None:
    from visualglm.checkpoint.convert import convert

    convert(source, output, to=to)  # type: ignore[arg-type]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    results.put(int(peak.split()[1]) / 1024)


def convert_in_child(source: Path, output: Path, to: str) -> float:
    """Peak resident memory in MiB."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=convert_and_report_memory, args=(source, output, to, results))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"The conversion failed with {child.exitcode}.")
    return float(results.get())


def measure(folder: Path, source: Path, to: str, rounds: int) -> str:
    weights = max((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    copied, converted = folder / "copy", folder / "converted"
    copying, converting, peaks = [], [], []
    for _ in range(rounds):
        drop_cache(weights)
        copying.append(timed(lambda: copy(weights, copied)) * size / weights.stat().st_size)
        copied.unlink()
        drop_cache(source)
        converting.append(timed(lambda: peaks.append(convert_in_child(source, converted, to))))
        shutil.rmtree(converted)
    seconds, copy_seconds = median(converting), median(copying)
    return (
        f"| {source.name} → {to} | {size / 1e9:.2f} | {seconds:.1f} | {size / seconds / 1e6:.0f} "
        f"| {size / copy_seconds / 1e6:.0f} | {copy_seconds / seconds:.2f} | {max(peaks):.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-convert"), help="needs three times the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", choices=FORMATS, nargs="+", default=["model"])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source = arguments.folder / "sat"
    write_archive(source, PRESETS[arguments.preset])
    print("| conversion | GB | s | MB/s | cp MB/s | speed / cp | peak RSS MiB |\n|---|---|---|---|---|---|---|")
    for to in arguments.to:
        print(measure(arguments.folder, source, to, arguments.rounds), flush=True)
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
