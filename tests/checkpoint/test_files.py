import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from visualglm.checkpoint.files import (
    checked_path,
    read_json_object,
    replace_file,
    require_folder,
    staged_folder,
    write_file,
)
from visualglm.errors import CheckpointError

Entries = Callable[[Path], list[str]]


def allow(folder: Path) -> None:
    if not (folder / "manifest.json").is_file():
        raise CheckpointError("it is not replaced.")


def fill(output: Path, *, force: bool = False, needed: int = 0) -> None:
    with staged_folder(output, needed_bytes=needed, force=force, require_replaceable=allow) as folder:
        write_file(folder / "manifest.json", [b"{}"])


def test_the_folder_appears_when_it_is_whole(tmp_path: Path, entries: Entries) -> None:
    with staged_folder(tmp_path / "out", needed_bytes=0, force=False, require_replaceable=allow) as folder:
        assert write_file(folder / "a", [b"x", b"", memoryview(b"yz")]) == hashlib.sha256(b"xyz").hexdigest()
        assert not (tmp_path / "out").exists()
    assert entries(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_bytes() == b"xyz"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path, entries: Entries) -> None:
    with (
        pytest.raises(error),
        staged_folder(tmp_path / "out", needed_bytes=0, force=False, require_replaceable=allow) as folder,
    ):
        write_file(folder / "a", [b"x"])
        raise error
    assert entries(tmp_path) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, entries: Entries) -> None:
    def broken() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    path = tmp_path / "page.html"
    replace_file(path, [b"old"])
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, broken())
    assert (path.read_bytes(), entries(tmp_path)) == (b"old", ["page.html"])
    replace_file(path, [b"new", b"er"])
    assert (path.read_bytes(), entries(tmp_path)) == (b"newer", ["page.html"])
    with pytest.raises(OSError) as caught:
        replace_file(tmp_path / "none" / "page.html", [])
    assert caught.value.filename == str(tmp_path / "none" / "page.html")


def test_an_empty_folder_is_filled_and_another_one_is_not(tmp_path: Path, entries: Entries) -> None:
    output = tmp_path / "out"
    output.mkdir()
    fill(output)
    (output / "more").touch()
    with pytest.raises(CheckpointError, match=r"out is not empty; give another folder, or --force to replace it\."):
        fill(output)
    assert entries(output) == ["manifest.json", "more"]
    fill(output, force=True)
    assert entries(output) == ["manifest.json"]
    assert entries(tmp_path) == ["out"]


def test_force_replaces_no_folder_of_other_things(tmp_path: Path, entries: Entries) -> None:
    (tmp_path / "letter").touch()
    with pytest.raises(CheckpointError, match=r"it is not replaced"):
        fill(tmp_path, force=True)
    assert entries(tmp_path) == ["letter"]


def test_an_old_folder_survives_a_failure_under_force(tmp_path: Path, entries: Entries) -> None:
    fill(tmp_path / "out")
    with (
        pytest.raises(ZeroDivisionError),
        staged_folder(tmp_path / "out", needed_bytes=0, force=True, require_replaceable=allow),
    ):
        raise ZeroDivisionError
    assert entries(tmp_path / "out") == ["manifest.json"]


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file; give the name of a new folder"):
        fill(tmp_path / "file")
    with pytest.raises(CheckpointError, match="nowhere does not exist; create the folder"):
        fill(tmp_path / "nowhere" / "out")
    with pytest.raises(CheckpointError, match="mount point"):
        fill(Path("/proc"), force=True)
    with pytest.raises(CheckpointError, match=r"Writing needs 931322574\.6 GiB, but .* has .* GiB free"):
        fill(tmp_path / "out", needed=10**18)


def test_the_current_folder_may_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    fill(Path("."))
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    with (
        staged_folder(tmp_path / "out", needed_bytes=0, force=False, require_replaceable=allow),
        pytest.raises(CheckpointError, match=r"Another process is writing .*\.out\.partial"),
    ):
        fill(tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_a_link_in_place_of_the_partial_folder_is_not_followed(tmp_path: Path, entries: Entries) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letter").touch()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="out could not be written"):
        fill(tmp_path / "out")
    assert entries(tmp_path / "precious") == ["letter"]


KILLED = """
    import sys, time
    from pathlib import Path
    from visualglm.checkpoint.files import staged_folder, write_file
    with staged_folder(Path(sys.argv[1]), needed_bytes=0, force=False, require_replaceable=lambda _: None) as folder:
        (folder / "1").mkdir()
        write_file(folder / "1" / "a", [b"x"])
        print("ready", flush=True)
        time.sleep(60)
"""


def test_what_a_killed_process_leaves_is_cleared_by_the_next(tmp_path: Path, entries: Entries) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert entries(tmp_path) == [".out.partial"]
    fill(tmp_path / "out")
    assert entries(tmp_path) == ["out"]
    assert entries(tmp_path / "out") == ["manifest.json"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(small_disk: Path, entries: Entries) -> None:
    with (
        pytest.raises(CheckpointError, match=r"The disk is full: .*out could not be written and nothing of it is left"),
        staged_folder(small_disk / "out", needed_bytes=0, force=False, require_replaceable=allow) as folder,
    ):
        write_file(folder / "a", [os.urandom(1 << 16)] * 20)
    assert entries(small_disk) == []
    with pytest.raises(CheckpointError, match=r"Writing needs 2 MiB, but .* has \d+ [KM]iB free"):
        fill(small_disk / "out", needed=2 << 20)


LIMITED = """
    import resource, sys
    from pathlib import Path
    from visualglm.checkpoint.convert import convert
    from visualglm.errors import CheckpointError
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[3])
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.parametrize("to", ["model", "sat", "hf"])
def test_a_conversion_that_may_write_no_more(to: str, goldens: Path, tmp_path: Path, entries: Entries) -> None:
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(goldens / "a_image_b1"), str(tmp_path / "out"), to]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert done.stdout.startswith("The disk is full: ")
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert entries(tmp_path) == []


def test_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(CheckpointError, match=r"a\.json is missing"):
        read_json_object(path)
    for content, message in ((b"{", "no valid JSON"), (b"\xff", "no valid JSON"), (b"[]", "must hold one JSON object")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_json_object(path)
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match="no valid JSON"):
        read_json_object(path)


def test_endless_json(tmp_path: Path) -> None:
    """An empty object in ever more blanks: it is not read to its end."""
    path = tmp_path / "a.json"
    path.write_bytes(b"{}" + bytes([32]) * (64 * 2**20 - 2))
    assert read_json_object(path) == {}
    with open(path, "ab") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(CheckpointError) as caught:
        read_json_object(path)
    assert str(caught.value) == (
        f"{path} has 10,737,418,240 bytes, and may have 67,108,864: it is no file of a checkpoint; get it again."
    )


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder and should be a file"):
        read_json_object(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (5, r"A path must be text, not int; give the path of a folder\."),
        (None, "A path must be text, not NoneType"),
        ("", "The path is empty; give the path of a folder"),
        ("a\0b", r"The path 'a\\x00b' cannot be used \(.*null .*\); give another\."),
        ("a" * 10_000, r"The path 'a{100}' cannot be used \(File name too long\); give another\."),
    ],
)
def test_paths_that_no_file_can_have(path: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checked_path(path)


def test_paths_in_bytes(tmp_path: Path) -> None:
    assert checked_path(os.fsencode(tmp_path)) == checked_path(str(tmp_path)) == checked_path(tmp_path) == tmp_path


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file; give the folder that holds the checkpoint"):
        require_folder(tmp_path / "file")
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        require_folder(tmp_path / "nothing")
