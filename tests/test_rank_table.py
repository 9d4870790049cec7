"""Rank tables, with a tool in place of the driver's that answers as that does."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visualglm import rank_table as module
from visualglm.errors import ConfigError
from visualglm.rank_table import (
    ALL_CARDS,
    card_addresses,
    merged_name,
    merged_tables,
    parse_range,
    parse_visible,
    rank_table,
    read_rank_table,
    server_address,
    table_name,
)

VISIBLE = parse_visible(ALL_CARDS)
TOOL = """#!/bin/sh
echo "$@" >> "{log}"
[ "$1 $3 $4" = "-i -ip -g" ] || exit 9
{body}
"""


@pytest.fixture
def hccn_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a tool with this body first on the PATH; returns where it writes its arguments."""

    def make(body: str) -> Path:
        (tmp_path / "bin").mkdir()
        tool, log = tmp_path / "bin" / "hccn_tool", tmp_path / "calls"
        tool.write_text(TOOL.format(log=log, body=body))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        return log

    return make


def addresses(first: int = 101) -> dict[str, str]:
    return {number: f"192.168.{int(number) // 4}.{first + int(number)}" for number in VISIBLE}


def test_the_table_of_a_whole_server() -> None:
    table = rank_table(parse_range("[0,8)", VISIBLE), VISIBLE, "10.0.0.1", addresses())
    values = json.loads(table.to_json())
    devices = [{"device_id": str(n), "device_ip": f"192.168.{n // 4}.{101 + n}", "rank_id": str(n)} for n in range(8)]
    assert values == {
        "version": "1.0",
        "server_count": "1",
        "server_list": [{"server_id": "10.0.0.1", "device": devices, "host_nic_ip": "reserve"}],
        "status": "completed",
    }
    assert table_name(range(8), "10.0.0.1") == "hccl_8p_01234567_10.0.0.1.json"


def test_cards_by_their_place_among_those_there_are() -> None:
    visible = parse_visible("4, 5,6,7")
    table = rank_table(parse_range("[1,3)", visible), visible, "10.0.0.1", addresses())
    assert [(card.device_id, card.rank_id) for card in table.cards] == [("5", "0"), ("6", "1")]
    assert table.cards[0].device_ip == "192.168.1.106"


def test_tables_of_several_servers_are_one() -> None:
    tables = [rank_table(range(4, 8), VISIBLE, f"10.0.0.{n}", addresses(10 * n)) for n in (2, 1)]
    table = merged_tables(tables)
    assert (table.server_count, merged_name(table)) == ("2", "hccl_2s_8p.json")
    assert [server.server_id for server in table.server_list] == ["10.0.0.2", "10.0.0.1"]
    assert [card.rank_id for card in table.cards] == list("01234567")
    assert [card.device_id for card in table.cards] == list("45674567")
    assert table.cards[-1].device_ip == tables[1].cards[-1].device_ip
    with pytest.raises(ConfigError, match=r"The server 10\.0\.0\.2 is in two of the tables"):
        merged_tables([tables[0], table])
    third = rank_table(range(4), VISIBLE, "10.0.0.3", addresses(200))
    more = merged_tables([table, third])
    assert (more.server_count, merged_name(more)) == ("3", "hccl_3s_12p.json")
    assert [card.rank_id for card in more.cards] == [*map(str, range(12))]


def test_tables_that_are_not_merged() -> None:
    table = rank_table(range(4, 8), VISIBLE, "10.0.0.1", addresses())
    other = rank_table(range(7, 8), VISIBLE, "10.0.0.2", addresses())
    for tables in ([], [table]):
        with pytest.raises(ConfigError, match="There is one table, and nothing to merge it with; give those of two"):
            merged_tables(tables)
    with pytest.raises(ConfigError, match=r"The address 192\.168\.1\.108 is that of a card in two of the tables; give"):
        merged_tables([table, other])


@pytest.mark.parametrize("text", ["[0,8)", "[0,4)", "[4,8)", "[3,4)", "[ 5, 7 )"])
def test_ranges(text: str) -> None:
    start, end = (int(part) for part in text.strip("[)").split(","))
    assert parse_range(text, VISIBLE) == range(start, end)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", r'must be a range of cards such as "\[0,8\)"'),
        ("(0,8)", "must be a range"),
        ("[-1,4)", "must be a range"),
        ("[0,8\x1b)", "must be a range"),
        ("[0,8]", r'reads in two ways; write "\[0,8\)" for the cards 0 to 7, or "\[0,9\)" for 0 to 8'),
        ("[0,9)", r'must lie in "\[0,8\)"'),
        ("[4,4)", r'must lie in "\[0,8\)"'),
        ("[4,3)", r'must lie in "\[0,8\)"'),
        ("[3,6)", r"takes cards of both groups, \[0,4\) and \[4,8\); give cards of one group, or all in \[0,8\)"),
        ("[0,5)", "takes cards of both groups"),
        ("[1,8)", "takes cards of both groups"),
    ],
)
def test_ranges_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_range(text, VISIBLE)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("visible", "cards", "fits"),
    [
        ("4,5,6,7", range(4), True),
        ("6,4", range(2), True),
        ("7,6,5,4,3,2,1,0", range(8), True),
        ("2,3,4,5", range(4), False),
        ("0,7", range(2), False),
        ("0,1,2,3,4,5,6", range(7), False),
    ],
)
def test_groups_are_those_of_the_cards_themselves(visible: str, cards: range, fits: bool) -> None:
    numbers = parse_visible(visible)
    if fits:
        assert [card.device_id for card in rank_table(cards, numbers, "10.0.0.1", addresses()).cards] == numbers
        return
    message = r"takes cards of both groups of 10\.0\.0\.1, \[0,4\) and \[4,8\), and not all of them; look at --visible"
    with pytest.raises(ConfigError, match=message):
        rank_table(cards, numbers, "10.0.0.1", addresses())


def test_two_cards_with_one_address() -> None:
    with pytest.raises(ConfigError, match=r"has the address 10\.0\.0\.9 for two cards; look at .* what hccn_tool has"):
        rank_table(range(2), VISIBLE, "10.0.0.1", dict.fromkeys(VISIBLE, "10.0.0.9"))


def test_no_more_cards_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r'must lie in "\[0,2\)", which are the cards there are'):
        parse_range("[0,4)", ["4", "5"])


@pytest.mark.parametrize("text", ["", "0,,1", "0,0", "0;1", "a", "-1", "01", "1234"])
def test_cards_that_are_no_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="must be different numbers of cards"):
        parse_visible(text)


def test_addresses_are_asked_of_the_tool(hccn_tool: Callable[[str], Path], tmp_path: Path) -> None:
    log = hccn_tool('echo "ipaddr:192.168.100.10$2"; echo "netmask:255.255.255.0"')
    found = card_addresses(["4", "5"], tmp_path / "none")
    assert found == {"4": "192.168.100.104", "5": "192.168.100.105"}
    assert log.read_text() == "-i 4 -ip -g\n-i 5 -ip -g\n"


@pytest.mark.parametrize("body", ["exit 1", "echo ipaddr:10.1.1.1; exit 1", "echo nothing", "sleep 5"])
def test_else_they_are_in_the_file(
    body: str, hccn_tool: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hccn_tool(body)
    monkeypatch.setattr(module, "_TOOL_SECONDS", 0.2)
    lines = ("# set", "address_0=192.168.100.101", "netmask_0=255.0.0.0", " address_10 = 10.0.0.7", "")
    (tmp_path / "hccn.conf").write_text("\n".join(lines))
    assert card_addresses(["0"], tmp_path / "hccn.conf") == {"0": "192.168.100.101"}
    assert card_addresses(["10"], tmp_path / "hccn.conf") == {"10": "10.0.0.7"}
    with pytest.raises(ConfigError, match=r"Neither `hccn_tool -i 1 -ip -g` nor .*hccn\.conf tells the address"):
        card_addresses(["0", "1"], tmp_path / "hccn.conf")


def test_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="run this on the server that has the cards"):
        card_addresses(["0"], tmp_path / "none")
    (tmp_path / "hccn.conf").write_text("address_0=somewhere\n")
    with pytest.raises(ConfigError, match="Card 0 has somewhere for an address; set it with hccn_tool"):
        card_addresses(["0"], tmp_path / "hccn.conf")


def test_the_address_of_this_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_address("10.0.0.9") == "10.0.0.9"
    for given in ("", "host", "../x", "10.0.0"):
        with pytest.raises(ConfigError, match="which is no address; give one such as"):
            server_address(given)
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.3")
    assert server_address(None) == "10.0.0.3"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(ConfigError, match=r"box, stands for 127\.0\.1\.1, by which no other can reach it; give"):
        server_address(None)

    def fail(name: str) -> str:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "gethostbyname", fail)
    with pytest.raises(ConfigError, match="box, has no address; give --server_ip"):
        server_address(None)


def test_tables_are_read_back(tmp_path: Path) -> None:
    table = rank_table(range(2), VISIBLE, "10.0.0.1", addresses())
    (tmp_path / "a.json").write_bytes(table.to_json())
    assert read_rank_table(tmp_path / "a.json") == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[1]", "is no rank table"),
        ("{", "holds no valid JSON"),
        ("[" * 100_000, "holds no valid JSON"),
        ('{"version": "1.0", "server_count": "1", "server_list": []}', "is no rank table"),
        ({"version": "2.0"}, "is no rank table"),
        ({"device_id": "x"}, "is no rank table"),
        ({"rank_id": "1"}, "does not number its cards from 0 on"),
    ],
)
def test_tables_that_are_none(change: str | dict[str, str], message: str, tmp_path: Path) -> None:
    if isinstance(change, dict):
        values = json.loads(rank_table(range(1), VISIBLE, "10.0.0.1", addresses()).to_json())
        (values if "version" in change else values["server_list"][0]["device"][0]).update(change)
        change = json.dumps(values)
    (tmp_path / "a.json").write_text(change)
    with pytest.raises(ConfigError, match=message) as caught:
        read_rank_table(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rank_table(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(server_count="5"), "counts 5 servers and lists 2"),
        (lambda it: it.update(status="failed"), "has the status failed and not completed"),
        (lambda it: it["server_list"][1].update(server_id="10.0.0.1"), r"lists the server 10\.0\.0\.1 twice"),
        (lambda it: card(it, 0, 1).update(device_ip=card(it, 0, 0)["device_ip"]), "for two cards"),
        (lambda it: card(it, 1, 1).update(device_ip=card(it, 0, 0)["device_ip"]), "for two cards"),
        (lambda it: card(it, 1, 1).update(device_id="4"), r"lists card 4 of 10\.0\.0\.2 twice"),
        (lambda it: card(it, 1, 1).update(device_id="3"), r"takes cards of both groups of 10\.0\.0\.2, \[0,4\) and"),
        (lambda it: it["server_list"][0]["device"].pop(), "does not number its cards from 0 on"),
    ],
)
def test_tables_that_contradict_themselves(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    tables = [rank_table(range(4, 8), VISIBLE, f"10.0.0.{n}", addresses(100 * n)) for n in (1, 2)]
    values = json.loads(merged_tables(tables).to_json())
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values))
    assert len(read_rank_table(path).cards) == 8
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"^{path} .*{message}.*; make it again with `visualglm rank-table`\.$"):
        read_rank_table(path)


def card(table: dict[str, Any], server: int, place: int) -> dict[str, str]:
    found: dict[str, str] = table["server_list"][server]["device"][place]
    return found
