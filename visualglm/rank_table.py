"""The rank table of a run on Ascend cards: which card of which server has which rank, and its address."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visualglm.checkpoint.files import readable
from visualglm.errors import ConfigError
from visualglm.faults import first_fault

CARDS = 8
"""Of a server, in two groups of `_GROUP`."""
ALL_CARDS = ",".join(map(str, range(CARDS)))
CONFIGURATION = Path("/etc/hccn.conf")

_GROUP = 4
_COMPLETED = "completed"
_TOOL = "hccn_tool"
_TOOL_SECONDS = 10
_LARGEST_BYTES = 2**20
_RANGE = re.compile(r"\[(\d{1,3}),(\d{1,3})(\)|\])")
_TOLD = re.compile(r"^ipaddr:(\S+)$", re.MULTILINE)
_CONFIGURED = re.compile(r"^\s*address_(\d{1,3})\s*=\s*(\S+)\s*$", re.MULTILINE)

Number = Annotated[str, Field(pattern=r"^\d{1,6}$")]
Address = Annotated[str, Field(min_length=1, max_length=64)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Card(_Part):
    """A card by its number in its server, its address there, and its rank among all; texts, as MindSpore has them."""

    device_id: Number
    device_ip: Address
    rank_id: Number


class Server(_Part):
    """A server by its address, and its cards."""

    server_id: Address
    device: Annotated[tuple[Card, ...], Field(min_length=1)]
    host_nic_ip: str = "reserve"


class RankTable(_Part):
    """A rank table of version 1.0."""

    version: Literal["1.0"] = "1.0"
    server_count: Number
    server_list: Annotated[tuple[Server, ...], Field(min_length=1)]
    status: str = _COMPLETED

    @property
    def cards(self) -> tuple[Card, ...]:
        return tuple(card for server in self.server_list for card in server.device)

    def to_json(self) -> bytes:
        """As MindSpore reads it."""
        return json.dumps(self.model_dump(), indent=4).encode() + b"\n"


def rank_table(cards: range, visible: Sequence[str], server_ip: str, addresses: Mapping[str, str]) -> RankTable:
    """The table of one server. cards: by their place in `visible`, the numbers of cards that there are; addresses: by
    these numbers. Raises `ConfigError` if the cards are some of both groups, or two have one address."""
    numbers = [visible[place] for place in cards]
    devices = tuple(
        Card(device_id=number, device_ip=addresses[number], rank_id=str(rank)) for rank, number in enumerate(numbers)
    )
    table = RankTable(server_count="1", server_list=(Server(server_id=server_ip, device=devices),))
    if fault := _fault(table):
        raise ConfigError(f"A table of these cards {fault}; look at --visible_devices and what {_TOOL} has set.")
    return table


def table_name(cards: range, server_ip: str) -> str:
    """What the recipe's tool calls the table of one server."""
    return f"hccl_{len(cards)}p_{''.join(map(str, cards))}_{server_ip}.json"


def merged_name(table: RankTable) -> str:
    """What it calls one of several servers."""
    return f"hccl_{len(table.server_list)}s_{len(table.cards)}p.json"


def merged_tables(tables: Sequence[RankTable]) -> RankTable:
    """One table of all servers, ranks counted on in the order given; raises `ConfigError` if there is one table only,
    or a server or the address of a card is in two of them."""
    if len(tables) < 2:
        raise ConfigError("There is one table, and nothing to merge it with; give those of two servers or more.")
    servers = [server for table in tables for server in table.server_list]
    twice = _repeated(server.server_id for server in servers)
    if twice:
        raise ConfigError(f"The server {readable(twice)} is in two of the tables; give one table of each server.")
    twice = _repeated(card.device_ip for server in servers for card in server.device)
    if twice:
        raise ConfigError(
            f"The address {readable(twice)} is that of a card in two of the tables; give each card one of its own with "
            f"{_TOOL}, and make the tables again."
        )
    ranks = iter(range(sum(len(server.device) for server in servers)))
    renumbered = tuple(
        server.model_copy(
            update={"device": tuple(card.model_copy(update={"rank_id": str(next(ranks))}) for card in server.device)}
        )
        for server in servers
    )
    return RankTable(server_count=str(len(servers)), server_list=renumbered)


def read_rank_table(path: Path) -> RankTable:
    """Raises `ConfigError` if the file is missing, no rank table, or one that contradicts itself."""
    remedy = "make one with `visualglm rank-table`"
    try:
        with path.open("rb") as file:
            table = RankTable.model_validate(json.loads(file.read(_LARGEST_BYTES)))
    except OSError as error:
        raise ConfigError(f"The rank table {path} cannot be read ({error.strerror}); {remedy}.") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is no rank table ({first_fault(error)}); {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} holds no valid JSON, so it is no rank table; {remedy}.") from error
    if fault := _fault(table):
        raise ConfigError(f"{path} {fault}; make it again with `visualglm rank-table`.")
    return table


def _fault(table: RankTable) -> str | None:
    """What is wrong with a table whose parts are well formed, if something is."""
    if table.status != _COMPLETED:
        return f"has the status {readable(table.status)} and not {_COMPLETED}"
    if int(table.server_count) != len(table.server_list):
        return f"counts {table.server_count} servers and lists {len(table.server_list)}"
    if sorted(int(card.rank_id) for card in table.cards) != list(range(len(table.cards))):
        return "does not number its cards from 0 on"
    twice = _repeated(server.server_id for server in table.server_list)
    if twice:
        return f"lists the server {readable(twice)} twice"
    twice = _repeated(card.device_ip for card in table.cards)
    if twice:
        return f"has the address {readable(twice)} for two cards"
    return next(filter(None, map(_server_fault, table.server_list)), None)


def _server_fault(server: Server) -> str | None:
    name, numbers = readable(server.server_id), [int(card.device_id) for card in server.device]
    twice = _repeated(map(str, numbers))
    if twice:
        return f"lists card {twice} of {name} twice"
    if len({number // _GROUP for number in numbers}) > 1 and {*numbers} != {*range(CARDS)}:
        return f"takes cards of both groups of {name}, [0,{_GROUP}) and [{_GROUP},{CARDS}), and not all of them"
    return None


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def parse_range(text: str, visible: Sequence[str]) -> range:
    """The cards from "[0,8)", where 8 is not one of them; raises `ConfigError` if there are none such, or if they are
    some of both groups."""
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if not match:
        raise ConfigError(f'--device_num is {readable(text)}, and must be a range of cards such as "[0,8)".')
    start, end = int(match[1]), int(match[2])
    if match[3] == "]":
        raise ConfigError(
            f'--device_num is {readable(text)}, which reads in two ways; write "[{start},{end})" for the cards '
            f'{start} to {end - 1}, or "[{start},{end + 1})" for {start} to {end}.'
        )
    if not start < end <= min(CARDS, len(visible)):
        raise ConfigError(
            f'--device_num is {readable(text)}, and must lie in "[0,{min(CARDS, len(visible))})", which are the cards '
            "there are."
        )
    if start < _GROUP < end and (start, end) != (0, CARDS):
        raise ConfigError(
            f"--device_num is {readable(text)}, which takes cards of both groups, [0,{_GROUP}) and [{_GROUP},{CARDS}); "
            f"give cards of one group, or all in [0,{CARDS})."
        )
    return range(start, end)


def parse_visible(text: str) -> list[str]:
    """The numbers of cards in "4,5,6,7"; raises `ConfigError` if they are not different numbers."""
    numbers = [each.strip() for each in text.split(",")]
    valid = [each.isascii() and each.isdigit() and len(each) <= 3 and str(int(each)) == each for each in numbers]
    if not all(valid) or len(set(numbers)) != len(numbers):
        raise ConfigError(
            f'--visible_devices is {readable(text)}, and must be different numbers of cards such as "{ALL_CARDS}".'
        )
    return numbers


def server_address(given: str | None) -> str:
    """`given`, or what this machine's name stands for; raises `ConfigError` if that is no address others could use."""
    if given is not None:
        if not _is_address(given):
            raise ConfigError(f"--server_ip is {readable(given)}, which is no address; give one such as 10.0.0.1.")
        return given
    name = socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except OSError as error:
        raise ConfigError(f"The name of this machine, {name}, has no address; give --server_ip.") from error
    if ip_address(found).is_loopback:
        raise ConfigError(
            f"The name of this machine, {name}, stands for {found}, by which no other can reach it; give --server_ip."
        )
    return found


def card_addresses(numbers: Sequence[str], configuration: Path = CONFIGURATION) -> dict[str, str]:
    """The network address of each card by its number, as the driver's `hccn_tool` tells it, else the file that it
    writes; raises `ConfigError` if neither does."""
    told = {number: _told_address(number) for number in numbers}
    missing = [number for number in numbers if told[number] is None]
    found = dict(_configured(configuration)) if missing else {}
    unknown = [number for number in missing if number not in found]
    if unknown:
        raise ConfigError(
            f"Neither `{_TOOL} -i {unknown[0]} -ip -g` nor {configuration} tells the address of card {unknown[0]}; run "
            "this on the server that has the cards, where the driver is installed and their addresses are set."
        )
    addresses = {number: told[number] or found[number] for number in numbers}
    wrong = next((number for number in numbers if not _is_address(addresses[number])), None)
    if wrong is not None:
        raise ConfigError(f"Card {wrong} has {readable(addresses[wrong])} for an address; set it with {_TOOL}.")
    return addresses


def _told_address(number: str) -> str | None:
    try:
        done = subprocess.run(
            [_TOOL, "-i", number, "-ip", "-g"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TOOL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _TOLD.search(done.stdout[:_LARGEST_BYTES].decode("utf-8", "replace"))
    return match[1] if match and done.returncode == 0 else None


def _configured(path: Path) -> Iterator[tuple[str, str]]:
    """Numbers and addresses in lines `address_0=192.168.100.101`; none if the file cannot be read."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_BYTES).decode("utf-8", "replace")
    except OSError:
        return
    for match in _CONFIGURED.finditer(text):
        yield str(int(match[1])), match[2]


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
