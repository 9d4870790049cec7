"""Running the program, and files for it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

PROGRAM = [sys.executable, "-m", "visualglm.cli"]


@dataclass
class Outcome:
    """How a command ended, and what it wrote."""

    code: object
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence of a command that failed as it should: exit code 1, nothing on stdout, no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("visualglm: error: ")]
        assert self.code == 1 and len(lines) == 1 and not self.out and "Traceback" not in self.err, self
        assert lines[0].endswith("."), lines[0]
        return lines[0]


Invoke = Callable[..., Outcome]


def spawn(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Starts `visualglm` in a process of its own; stdin, stdout and stderr are pipes unless `options` say otherwise."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}  # type: ignore[dict-item]
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, text=True, env=environment, **{**pipes, **options})  # type: ignore[call-overload, no-any-return]


def finish(process: subprocess.Popen[str], stdin: str = "") -> Outcome:
    """Waits for a process."""
    out, err = process.communicate(stdin, timeout=120)
    return Outcome(process.returncode, out or "", err or "")


def draw(path: Path, seed: int) -> Path:
    """A picture of its own for each seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(colours.repeat(16, 0).repeat(16, 1)).save(path)
    return path


def replace_file(model: Path, name: str, content: bytes) -> None:
    """Another content for a file of a model directory, as if it had been written so."""
    (model / name).write_bytes(content)
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    (model / "manifest.json").write_text(json.dumps(manifest))


def change_config(model: Path, section: str, **values: object) -> None:
    """Other values in the configuration of a model directory."""
    config = json.loads((model / "config.json").read_text())
    config[section].update(values)
    replace_file(model, "config.json", json.dumps(config).encode())
