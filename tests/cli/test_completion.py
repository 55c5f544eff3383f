"""Completion: where it is installed, and what it answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from fix_mounts import run_pbkfs

from pbkfs.branch.store import Head, Store, now


def test_install_and_uninstall(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "XDG_DATA_HOME": "", "XDG_CONFIG_HOME": "", "SHELL": "/bin/bash"}
    places = {
        "bash": ".local/share/bash-completion/completions/pbkfs",
        "zsh": ".local/share/zsh/site-functions/_pbkfs",
        "fish": ".config/fish/completions/pbkfs.fish",
    }
    for shell, place in places.items():
        said = run_pbkfs("completion", "install", "--shell", shell, **env).stdout
        assert said.startswith(f"Installed {tmp_path / place}\n")
        assert "_PBKFS_COMPLETE" in (tmp_path / place).read_text()
    assert run_pbkfs("completion", "uninstall", **env).stdout == (
        f"Removed {tmp_path / places['bash']}\n"
    )
    assert not (tmp_path / places["bash"]).exists()
    assert "is not there" in run_pbkfs("completion", "uninstall", **env).stdout
    assert "_pbkfs_completion" in run_pbkfs("completion", "show", **env).stdout
    done = run_pbkfs("completion", "install", check=False, **{**env, "SHELL": "/bin/tcsh"})
    assert done.returncode == 2
    assert "tcsh" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pbkfs tru", ["trunk"]),
        ("pbkfs branch connect ", ["feature"]),
        ("pbkfs branch create x --from p", ["prod"]),
        ("pbkfs trunk stop ", ["prod"]),
    ],
)
def test_names_are_completed(tmp_path: Path, words: str, expected: list[str]) -> None:
    store = Store(tmp_path / "metadata.db")
    common = {"status": "stopped", "engine": "overlay", "pg_user": "postgres"}
    common |= {"pg_database": "postgres", "auth": "password", "created_at": now()}
    with store.transaction() as tx:
        tx.insert(Head("1", "prod", "trunk", None, **common))  # type: ignore[arg-type]
        tx.insert(Head("2", "feature", "branch", "1", **common))  # type: ignore[arg-type]
    store.close()
    done = run_pbkfs(
        PBKFS_DATA_DIR=str(tmp_path),
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split(" ")) - 1),
        _PBKFS_COMPLETE="bash_complete",
    )
    assert done.stdout.splitlines() == [f"plain,{word}" for word in expected]
