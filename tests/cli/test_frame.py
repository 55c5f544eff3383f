"""The command line's frame: help without imports, one line an error, exit codes by class."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from fix_mounts import run_pbkfs

from pbkfs import errors
from pbkfs.cli import main as frame

HEAVY = ("trio", "pyfuse3", "rich", "yaml", "asyncio")


def imported(*args: str) -> set[str]:
    """Return the names of the modules that ``pbkfs ARGS`` imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pbkfs", *args],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize("args", [(), ("--help",), ("list",), ("stat", "-D", "/"), ("--version",)])
def test_quick_commands_import_little(args: tuple[str, ...]) -> None:
    names = imported(*args)
    assert "click" in names
    assert not [name for name in names if name.split(".")[0] in HEAVY]
    if "list" not in args and "stat" not in args:
        assert not [name for name in names if name.startswith("pbkfs.mount")]


def test_no_subcommand_prints_help() -> None:
    assert run_pbkfs().stdout == run_pbkfs("--help").stdout
    assert "Mount a backup as a writable PGDATA." in run_pbkfs().stdout


@pytest.mark.parametrize("verb", frame.COMMANDS)
def test_every_verb_has_a_module_and_help(verb: str) -> None:
    command = importlib.import_module(frame.COMMANDS[verb][0]).command
    assert isinstance(command, click.Command)
    assert command.help
    done = run_pbkfs(verb, "--help")
    assert done.stdout.startswith(f"Usage: pbkfs {verb} ")


@pytest.mark.parametrize("alias", frame.ALIASES)
def test_aliases(alias: str) -> None:
    assert run_pbkfs(alias, "--help").returncode == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["moutn"], "no such command 'moutn'. Did you mean 'mount'?"),
        (["mount", "--nope"], "no such option '--nope'"),
        (["mount", "--timeout", "x"], "duration 'x' is not understood"),
        (["mount", "--index-memory", "x"], "size 'x' is not understood"),
        (["mount", "--log-sink", "x"], "'x' is not one of 'file', 'journald'"),
        (["mount", "-d", "/x"], "no mount point is given"),
        (["mount", "-D", "/x"], "no diff is given"),
        (["unmount"], "neither a mount point nor a diff is given"),
        (["stat"], "neither a mount point nor a diff is given"),
        (["cleanup"], "no diff is given"),
        (["backups"], "no store is given"),
    ],
)
def test_usage_errors(args: list[str], says: str) -> None:
    done = run_pbkfs(*args, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("pbkfs: error: ")
    assert says in first
    assert second.startswith("hint: ")


@pytest.mark.parametrize("flag", ["--no-wal", "--perf-unsafe"])
def test_unsafe_flags_are_declined(flag: str) -> None:
    done = run_pbkfs("mount", flag, check=False)
    assert done.returncode == errors.UnsupportedError.exit_code
    assert f"{flag} is not supported: pbkfs never trades safety for speed" in done.stderr


def test_exit_codes_are_one_a_class() -> None:
    codes = [
        cls.exit_code
        for cls in errors.PbkfsError.__subclasses__()
        if cls.__module__ == errors.__name__
    ]
    assert len(codes) == len(set(codes))
    assert not {0, 1} & set(codes)


class TestFailures:
    """What ``run`` makes of exceptions, with a verb that raises them."""

    @pytest.fixture(autouse=True)
    def _state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def raising(
        self, monkeypatch: pytest.MonkeyPatch, error: BaseException, *params: click.Parameter
    ) -> None:
        def fail(**_options: object) -> None:
            raise error

        command = click.Command("list", params=list(params), callback=fail)
        monkeypatch.setattr(frame.LazyGroup, "get_command", lambda *_: command)

    @pytest.mark.parametrize("cls", errors.PbkfsError.__subclasses__())
    def test_expected(
        self,
        cls: type[errors.PbkfsError],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.raising(monkeypatch, cls("diff /x is odd", hint="Look at it."))
        assert frame.run(["list"]) == cls.exit_code
        assert capsys.readouterr().err == "pbkfs: error: diff /x is odd\nhint: Look at it.\n"

    def test_debug_shows_the_traceback(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.raising(monkeypatch, errors.HostError("no"), click.Option(["--debug"], is_flag=True))
        assert frame.run(["list", "--debug"]) == errors.HostError.exit_code
        assert "Traceback" in capsys.readouterr().err

    def test_unexpected(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        self.raising(monkeypatch, ZeroDivisionError("of all\nthings"))
        assert frame.run(["list"]) == 1
        first, second = capsys.readouterr().err.splitlines()
        assert first == "pbkfs: error: unexpected ZeroDivisionError: of all things (this is a bug)"
        log = tmp_path / "pbkfs" / "pbkfs.log"
        assert str(log) in second
        assert "Traceback" in log.read_text()

    def test_unexpected_without_a_place_for_the_log(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        self.raising(monkeypatch, ZeroDivisionError("x"))
        assert frame.run(["list"]) == 1
        assert "Traceback" in capsys.readouterr().err

    def test_interrupt(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.raising(monkeypatch, KeyboardInterrupt())
        assert frame.run(["list"]) == 130
        assert capsys.readouterr().err.strip() == "pbkfs: error: interrupted"


def test_reader_that_left_is_quiet() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "pbkfs", "--help"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert done.stderr == ""
    assert done.returncode == 141


def test_not_mounted(place: Path) -> None:
    for verb in ("unmount", "stat"):
        done = run_pbkfs(verb, "-D", place, check=False)
        assert done.returncode == 3
        assert f"no backup is mounted on {place}" in done.stderr
        done = run_pbkfs(verb, "-d", place, check=False)
        assert done.returncode == 3
        done = run_pbkfs(verb, "-d", place / "absent", check=False)
        assert done.returncode == 4


def test_list_as_json() -> None:
    assert isinstance(json.loads(run_pbkfs("list", "-o", "json").stdout), list)


def test_environment_stands_for_options(place: Path) -> None:
    done = run_pbkfs("stat", check=False, PBKFS_PGDATA=str(place))
    assert done.returncode == 3
    done = run_pbkfs("mount", check=False, PBKFS_MOUNT_NO_WAL="1")
    assert "--no-wal is not supported" in done.stderr


def options_of(command: click.Command, name: str) -> list[tuple[str, click.Option]]:
    """Return all options of a command and of those below it, each with the command's name."""
    found = [(name, each) for each in command.params if isinstance(each, click.Option)]
    if isinstance(command, click.Group):
        for below, each in command.commands.items():
            found += options_of(each, f"{name}_{below}")
    return found


@pytest.mark.parametrize("verb", frame.COMMANDS)
def test_every_long_option_has_its_name_in_the_environment(verb: str) -> None:
    command = frame.group.get_command(click.Context(frame.group), verb)
    assert command is not None
    for name, option in options_of(command, f"pbkfs_{verb}"):
        for long in (each for each in option.opts if each.startswith("--")):
            variable = f"{name}_{long[2:]}".replace("-", "_").upper()
            assert option.envvar is not None
            assert variable in option.envvar


def test_option_is_taken_from_the_environment(tmp_path: Path) -> None:
    done = run_pbkfs("check", check=False, PBKFS_CHECK_DIFF_DIR=str(tmp_path / "gone"))
    assert str(tmp_path / "gone") in done.stderr
    done = run_pbkfs(
        "mount",
        check=False,
        PBKFS_MOUNT_EMPTY="1",
        PBKFS_MOUNT_PGDATA=str(tmp_path / "nowhere"),
        PBKFS_DIFF_DIR=str(tmp_path / "diff"),
        PBKFS_MOUNT_TIMEOUT="soon",
    )
    assert done.returncode == 2
    assert "'soon'" in done.stderr


def test_older_command_line_has_a_help_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from pbkfs.cli.pgbranch import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("pgbranch COMMAND is 'pbkfs branch COMMAND'")
    assert "  destroy " in done.stdout
    assert "  unmount " not in done.stdout
