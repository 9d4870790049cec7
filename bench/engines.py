"""Measure engines alternately on models of the same sizes, with random weights: `bench/engines.py --engines A B …`.

Each engine is a process of its own. At each cell (encoding, prefill, decoding at a context and a batch) they take turns
between which the read bandwidth is measured: shares and ratios are to be trusted more than times. Batches are measured
at the shortest context. `bench/setup_rivals.sh` sets up the engines that are not ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from engine_process import EngineProcess, running
from engine_table import Cell, Run, Series, markdown
from rivals import BUILTIN, RIVALS, Rival, remove
from visualglm.bandwidth import Bandwidth, CpuReadBandwidth
from visualglm.benchmark import stolen_share
from visualglm.checkpoint.files import file_pieces
from visualglm.checkpoint.model_dir import CONFIG
from visualglm.config import VisualGLMConfig
from visualglm.loading import builtin_path
from visualglm.random_model import PRESETS


@dataclass(frozen=True)
class Plan:
    """What is measured: medians of `rounds`; `steps` tokens are decoded in each."""

    prompt: int
    contexts: Sequence[int]
    batches: Sequence[int]
    rounds: int
    steps: int

    def cells(self) -> list[Cell]:
        shortest = min(self.contexts)
        return [
            Cell("encode"),
            Cell("prefill", self.prompt),
            *(Cell("decode", shortest, batch) for batch in sorted({1, *self.batches})),
            *(Cell("decode", context) for context in sorted(self.contexts) if context != shortest),
        ]


@dataclass(frozen=True)
class Contest:
    """The engines and their models, in the order they were named."""

    config: VisualGLMConfig
    models: dict[Rival, Path]
    environments: Path
    plan: Plan

    def run(self, threads: int) -> Run:
        """Start all engines with so many threads, and measure."""
        probe = CpuReadBandwidth(threads)
        with ExitStack() as stack:
            processes = [stack.enter_context(self._start(rival, threads)) for rival in self.models]
            series = []
            for cell in self.plan.cells():
                able = [process for process in processes if process.abilities >= cell.needs]
                series += self._measure(cell, able, probe) if able else []
        return Run(
            threads,
            {process.name: process.load_seconds for process in processes},
            {rival.name: rival.step_bytes(path, self.config) for rival, path in self.models.items()},
            series,
        )

    def _start(self, rival: Rival, threads: int) -> AbstractContextManager[EngineProcess]:
        model = self.models[rival]
        tell(f"{threads} threads: loading {rival.name}")
        read(model)
        return running(rival.name, rival.command(model, threads, self.environments))

    def _measure(self, cell: Cell, able: Sequence[EngineProcess], probe: Bandwidth) -> list[Series]:
        """Rounds of turns of the engines that are able to do it, after one that does not count."""
        request = cell.request(self.plan.steps)
        seconds: dict[str, list[float]] = {process.name: [] for process in able}
        bandwidths: dict[str, list[float]] = {process.name: [] for process in able}
        tell(f"{cell.command}, {cell.tokens} tokens, batch {cell.batch}: {', '.join(seconds)}")
        for process in able:
            process.seconds(request)
        before = probe.measure()
        for index in range(self.plan.rounds):
            for process in able if index % 2 == 0 else reversed(able):
                seconds[process.name].append(process.seconds(request))
                after = probe.measure()
                bandwidths[process.name].append((before + after) / 2)
                before = after
        return [
            Series(process.name, cell, seconds[process.name], bandwidths[process.name], process.peak_memory())
            for process in able
        ]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read(path: Path) -> None:
    """Bring a file, or all files of a folder, into the system's cache."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        for _ in file_pieces(file):
            pass


@contextmanager
def prepared_models(
    rivals: Sequence[Rival], folder: Path, config: VisualGLMConfig, keep: bool
) -> Iterator[dict[Rival, Path]]:
    """The engines' models in `folder`; those that were not there are deleted afterwards, unless they are to stay."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [rival for rival in RIVALS.values() if rival in rivals and not rival.path(folder).exists()]
    try:
        for rival in missing:
            tell(f"writing the model of {rival.name}")
            rival.write_model(folder, config)
        yield {rival: rival.path(folder) for rival in rivals}
    finally:
        for rival in () if keep else missing:
            remove(rival.path(folder))


@contextmanager
def found_or_prepared(
    rivals: Sequence[Rival], options: argparse.Namespace
) -> Iterator[tuple[VisualGLMConfig, dict[Rival, Path]]]:
    """The models that are to be run, with their configuration. Leaves the program if one has no such model."""
    if options.preset != BUILTIN:
        config = PRESETS[options.preset]
        with prepared_models(rivals, options.folder, config, options.keep) as models:
            yield config, models
        return
    found = {rival: rival.builtin for rival in rivals if rival.builtin}
    if unable := [rival.name for rival in rivals if rival not in found]:
        sys.exit(f"The built-in model is not there for {', '.join(unable)}; leave them out, or give another preset.")
    yield VisualGLMConfig.from_file(builtin_path() / CONFIG), found


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=RIVALS, required=True, help="ratios are those of the first")
    parser.add_argument("--preset", choices=[*PRESETS, BUILTIN], default="full", help="sizes; or the built-in model")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-engines"), help="for the models")
    parser.add_argument("--keep", action="store_true", help="keep the models, to be measured again")
    parser.add_argument("--rivals", type=Path, default=Path("runs/rivals"), help="folder given to setup_rivals.sh")
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prefill")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--batches", type=int, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write every round there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    plan = Plan(options.prompt, options.contexts, options.batches, options.rounds, options.steps)
    rivals = [RIVALS[name] for name in dict.fromkeys(options.engines)]
    for rival in rivals:
        rival.command(rival.path(options.folder), 1, options.rivals)  # before anything large is written
    times = psutil.cpu_times()
    with found_or_prepared(rivals, options) as (config, models):
        runs = [Contest(config, models, options.rivals, plan).run(threads) for threads in options.threads]
    stolen = 100 * stolen_share(times, psutil.cpu_times())
    print(markdown(runs) + f"\n\nprocessor time taken by the host: {stolen:.1f} %")
    if options.json:
        found = {"preset": options.preset, "stolen_percent": stolen, "runs": [asdict(run) for run in runs]}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
