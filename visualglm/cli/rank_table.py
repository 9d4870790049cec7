"""`visualglm rank-table`: which Ascend card has which rank, in a file for processes that train together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from visualglm.checkpoint.files import replace_file
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import Quiet
from visualglm.errors import ConfigError
from visualglm.rank_table import (
    ALL_CARDS,
    CARDS,
    RankTable,
    card_addresses,
    merged_name,
    merged_tables,
    parse_range,
    parse_visible,
    read_rank_table,
    server_address,
    table_name,
)
from visualglm.rank_table import (
    rank_table as make_table,
)

_ALL = f"[0,{CARDS})"


def rank_table(
    tables: Annotated[
        list[Path] | None, Argument(metavar="TABLE", help="With --merge: one of each server, in order of ranks.")
    ] = None,
    device_num: Annotated[
        str | None,
        Option(
            "--device_num",
            "--device-num",
            metavar="RANGE",
            help=f'Cards, else "{_ALL}"; in "[0,8)" 8 is not one of them.',
        ),
    ] = None,
    visible_devices: Annotated[
        str | None,
        Option(
            "--visible_devices",
            "--visible-devices",
            metavar="LIST",
            help=f"Numbers of the cards that there are, else {ALL_CARDS}: with 4,5,6,7, as in a container, "
            '"[0,4)" is these four.',
        ),
    ] = None,
    server_ip: Annotated[
        str | None,
        Option("--server_ip", "--server-ip", metavar="IP", help="Address of this server; else that of its name."),
    ] = None,
    merge: Annotated[bool, Option("--merge", help="Make one table of those of several servers.")] = False,
    output: Annotated[
        Path | None, Option(metavar="FILE", help="Where to write; else as hccl_8p_01234567_IP.json, here.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace a table that is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write the rank table of this server's Ascend cards, or merge those of several servers.

    The addresses of the cards are those that the driver's hccn_tool tells, or else /etc/hccn.conf.
    """
    given = tables or []
    if merge != bool(given):
        raise ConfigError("To merge, give --merge and the tables of the servers; to make one, give neither.")
    if merge:
        _require_unused(device_num=device_num, visible_devices=visible_devices, server_ip=server_ip)
        table = merged_tables([read_rank_table(path) for path in given])
        name = merged_name(table)
    else:
        visible = parse_visible(ALL_CARDS if visible_devices is None else visible_devices)
        cards = parse_range(_ALL if device_num is None else device_num, visible)
        address = server_address(server_ip)
        table = make_table(cards, visible, address, card_addresses([visible[place] for place in cards]))
        name = table_name(cards, address)
    path = output or Path(name)
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; give --force to replace it, or another --output.")
    try:
        replace_file(path, [table.to_json()])
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); give --output in another folder.") from error
    print_table(_rows(table), ("rank", "server", "card", "address"))
    Messages(quiet).tell(f"Written to {path}; each process is told of it by RANK_TABLE_FILE={path.resolve()}.")


def _require_unused(**options: str | None) -> None:
    """Raises `ConfigError` if one of these options is given beside --merge."""
    for name, given in options.items():
        if given is not None:
            raise ConfigError(f"--{name} is for making a table, and --merge takes tables as they are; leave it out.")


def _rows(table: RankTable) -> list[tuple[str, ...]]:
    return [
        (card.rank_id, server.server_id, card.device_id, card.device_ip)
        for server in table.server_list
        for card in server.device
    ]
