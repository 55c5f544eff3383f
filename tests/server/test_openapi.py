"""The OpenAPI document, held against the daemon: by schemathesis, and by the routes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fix_web import TOKEN, Daemon

pytestmark = pytest.mark.xdist_group("openapi")

_REST = {
    ("GET", "/health"),
    ("GET", "/trunks"),
    ("POST", "/trunks"),
    ("GET", "/trunks/{name}"),
    ("DELETE", "/trunks/{name}"),
    ("GET", "/trunks/{name}/connection"),
    ("POST", "/trunks/{name}/start"),
    ("POST", "/trunks/{name}/stop"),
    ("POST", "/trunks/{name}/restart"),
    ("GET", "/branches"),
    ("POST", "/branches"),
    ("GET", "/branches/{name}"),
    ("DELETE", "/branches/{name}"),
    ("GET", "/branches/{name}/connection"),
    ("POST", "/branches/{name}/start"),
    ("POST", "/branches/{name}/stop"),
}


def test_document_names_every_endpoint(served: Daemon) -> None:
    document = served.get("openapi.json").json
    assert document["openapi"].startswith("3.1")
    there = {
        (method.upper(), path.removeprefix("/api/v1"))
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert there >= _REST
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["description"]
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert list(answer["content"]) == ["application/problem+json"], path
    assert "HTTPValidationError" not in json.dumps(document)


@pytest.mark.parametrize(
    "options",
    [
        ["--include-method", "GET"],
        # Whether what the document allows is also accepted depends on what there is.
        [
            "--exclude-method",
            "GET",
            "--mode",
            "negative",
            "--exclude-checks",
            "positive_data_acceptance",
        ],
    ],
    ids=["reading", "refusals"],
)
@pytest.mark.timeout(300)
def test_schemathesis_finds_nothing(served: Daemon, tmp_path: Path, options: list[str]) -> None:
    served.branch("a")
    document = tmp_path / "openapi.json"
    document.write_bytes(served.get("openapi.json").body)
    done = subprocess.run(
        [
            Path(sys.executable).with_name("st"), "run", document,
            "--url", f"http://127.0.0.1:{served.port}", "-H", f"Authorization: Bearer {TOKEN}",
            "--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--seed", "1",
            "--request-timeout", "100", "--generation-database", "none", "--no-color", *options,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "main" in served.names("trunks")
