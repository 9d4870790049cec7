"""The comparison of engines: the talk with a worker, the turns and the table. Rivals are not needed."""

import json
import sys
from pathlib import Path

import pytest

import engines
from engine_process import Command, running
from engine_table import Cell, Run, Series, markdown
from engines import Plan

ECHO = """
import engine_worker
class Echo:
    abilities = ("batches",)
    def prefill(self, tokens): print("noise"); return tokens / 100
    def decode(self, context, batch, steps): raise SystemExit("out of wits")
engine_worker.serve(lambda model, threads: Echo())
"""


def test_our_engines_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "found.json"
    arguments = "--preset tiny --engines onnx-int4 torch-bf16 --threads 1 --contexts 8 16 --batches 2 --prompt 8"
    engines.main(
        [
            *arguments.split(),
            "--rounds",
            "2",
            "--steps",
            "2",
            "--folder",
            str(tmp_path / "models"),
            "--json",
            str(output),
        ]
    )
    assert list((tmp_path / "models").iterdir()) == []
    (run,) = json.loads(output.read_text())["runs"]
    assert [series["engine"] for series in run["series"]] == ["onnx-int4", "torch-bf16"] * 5
    cells = [(series["cell"]["command"], series["cell"]["tokens"], series["cell"]["batch"]) for series in run["series"]]
    assert cells[::2] == [("encode", 0, 1), ("prefill", 8, 1), ("decode", 8, 1), ("decode", 8, 2), ("decode", 16, 1)]
    assert all(len(series["seconds"]) == len(series["bandwidths"]) == 2 for series in run["series"])
    assert min(series["peak_memory"] for series in run["series"]) > 3e7
    table = capsys.readouterr().out
    assert "| batch 2, context 8, tokens/s |" in table and "| prefill of 8, s |" in table


def test_batches_are_measured_at_the_shortest_context():
    cells = Plan(prompt=64, contexts=(512, 64), batches=(16, 1, 4), rounds=1, steps=1).cells()
    assert [(cell.tokens, cell.batch) for cell in cells[2:]] == [(64, 1), (64, 4), (64, 16), (512, 1)]


def worker(tmp_path: Path) -> Command:
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    return Command([sys.executable, script, "model", "1"], {"PYTHONPATH": str(Path(engines.__file__).parent)})


def test_what_an_engine_prints_is_no_answer(tmp_path: Path):
    with running("echo", worker(tmp_path)) as process:
        assert process.abilities == {"batches"}
        assert [process.seconds(Cell("prefill", tokens).request(steps=1)) for tokens in (64, 7)] == [0.64, 0.07]
        assert process.peak_memory() > 1e6


def test_an_engine_that_stops_is_named_with_its_last_words(tmp_path: Path):
    with (
        running("echo", worker(tmp_path)) as process,
        pytest.raises(SystemExit, match=r"echo stopped with 1:\n(.*\n)*out of wits"),
    ):
        process.seconds(Cell("decode", 8).request(steps=1))


def test_a_rival_that_is_not_set_up(tmp_path: Path):
    arguments = [
        "--engines",
        "torch-bf16",
        "llama-q4_0",
        "--folder",
        str(tmp_path / "models"),
        "--rivals",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit, match=r"llama-q4_0 needs .*set it up with: bench/setup_rivals.sh"):
        engines.main(arguments)
    assert not (tmp_path / "models").exists()


def test_the_table():
    prefill, decode, batch = Cell("prefill", 64), Cell("decode", 128), Cell("decode", 128, 4)
    bandwidths = (20e9, 40e9, 20e9)
    series = [
        Series("ours", prefill, (1.0, 2.0, 1.5), bandwidths, 5_000_000_000),
        Series("theirs", prefill, (2.0, 2.0, 6.0), bandwidths, 4_000_000_000),
        Series("ours", decode, (0.2, 0.1, 0.2), bandwidths, 5_000_000_000),
        Series("theirs", decode, (0.4, 0.1, 0.3), bandwidths, 4_100_000_000),
        Series("ours", batch, (0.4, 0.4, 0.4), bandwidths, 6_000_000_000),
        Series("theirs", Cell("encode"), (0.4, 0.4, 0.4), bandwidths, 1_000_000_000),
    ]
    run = Run(4, {"ours": 3.0, "theirs": 1.0}, {"ours": 3_200_000_000, "theirs": 3_000_000_000}, series)
    assert markdown([run]).splitlines() == [
        "| threads: 4 | ours | theirs | ours : theirs |",
        "| --- | --- | --- | --- |",
        "| weights read for a token, GB | 3.20 | 3.00 |  |",
        "| loading, warm cache, s | 3.0 | 1.0 |  |",
        "| prefill of 64, s | 1.50 | 2.00 | 2.00× |",
        "| decoding, context 128, ms/token | 200.0 | 300.0 | 1.50× |",
        "| its share of the bandwidth, % | 80 | 50 |  |",
        "| batch 4, context 128, tokens/s | 10.0 | – |  |",
        "| encoding an image, s | – | 0.40 |  |",
        "| peak memory, one row, GB | 5.0 | 4.1 |  |",
        "| peak memory, all of this, GB | 6.0 | 4.1 |  |",
        "| read bandwidth meanwhile, GB/s | 20.0 | 20.0 |  |",
    ]
