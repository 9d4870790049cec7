"""`visualglm rank-table`."""

import json
from pathlib import Path

import pytest

from tests.cli.program import Invoke

HERE = ("--server-ip", "10.0.0.1")


@pytest.fixture(autouse=True)
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's tool, which knows eight cards."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "hccn_tool"
    tool.write_text('#!/bin/sh\necho "ipaddr:${NETWORK:-192.168.100}.10$2"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)


def test_a_table_is_written_here_under_the_recipes_name(invoke: Invoke, tmp_path: Path) -> None:
    outcome = invoke("rank-table", "--device_num", "[0,8)", "--server_ip", "10.0.0.1")
    assert outcome.code == 0
    path = tmp_path / "hccl_8p_01234567_10.0.0.1.json"
    table = json.loads(path.read_text())
    assert [card["device_ip"] for card in table["server_list"][0]["device"]] == [f"192.168.100.10{n}" for n in range(8)]
    assert outcome.out.splitlines()[-1].split() == ["7", "10.0.0.1", "7", "192.168.100.107"]
    assert f"RANK_TABLE_FILE={path}" in outcome.err
    assert [each.name for each in tmp_path.iterdir() if each.suffix] == [path.name]


def test_a_table_that_is_there_stays(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("mine")
    command = ("rank-table", "--device-num", "[4,8)", *HERE, "--output", path)
    assert "table.json is there already; give --force to replace it" in invoke(*command).error
    assert path.read_text() == "mine"
    assert invoke(*command, "--force", "-q").err == ""
    assert len(json.loads(path.read_text())["server_list"][0]["device"]) == 4


def test_visible_devices_are_the_cards_that_there_are(invoke: Invoke, tmp_path: Path) -> None:
    for option in ("--visible_devices", "--visible-devices"):
        assert invoke("rank-table", "--device_num", "[0,2)", option, "6,7", *HERE, "--force").code == 0
        table = json.loads((tmp_path / "hccl_2p_01_10.0.0.1.json").read_text())
        assert [card["device_id"] for card in table["server_list"][0]["device"]] == ["6", "7"]


def test_tables_are_merged(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        monkeypatch.setenv("NETWORK", f"192.168.{number}")
        invoke("rank-table", "--server_ip", f"10.0.0.{number}")
    names = [f"hccl_8p_01234567_10.0.0.{n}.json" for n in (1, 2)]
    assert invoke("rank-table", "--merge", *names).code == 0
    merged = json.loads((tmp_path / "hccl_2s_16p.json").read_text())
    assert merged["server_count"] == "2"
    assert [card["rank_id"] for server in merged["server_list"] for card in server["device"]] == [
        str(rank) for rank in range(16)
    ]
    assert "is in two of the tables" in invoke("rank-table", "--merge", names[0], names[0]).error
    assert "There is one table, and nothing to merge it with" in invoke("rank-table", "--merge", names[0]).error
    for option in (HERE, ("--device_num", "[0,4)"), ("--visible-devices", "0,1")):
        error = invoke("rank-table", "--merge", *names, *option, "--force").error
        assert f"{option[0].replace('-', '_').replace('__', '--')} is for making a table, and --merge takes" in error


def test_a_folder_that_cannot_be_written(invoke: Invoke, tmp_path: Path) -> None:
    outcome = invoke("rank-table", *HERE, "--output", tmp_path / "none" / "table.json")
    assert "none/table.json cannot be written (No such file or directory); give --output in another" in outcome.error
    (tmp_path / "table.json").mkdir()
    outcome = invoke("rank-table", *HERE, "--output", tmp_path / "table.json", "--force")
    assert "table.json cannot be written (Is a directory); give" in outcome.error


@pytest.mark.parametrize("arguments", [["--merge"], ["a.json"]])
def test_merge_goes_with_tables(arguments: list[str], invoke: Invoke) -> None:
    assert "give --merge and the tables of the servers" in invoke("rank-table", *arguments).error


def test_a_range_over_both_groups_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    outcome = invoke("rank-table", "--device_num", "[2,6)", *HERE)
    assert outcome.code == 1 and "takes cards of both groups" in outcome.error
    assert not list(tmp_path.glob("*.json"))
