"""Tests of the canary against the local platform, and of the local platform against a recording of the real one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import scripts.canary  # noqa: F401  (which adds the command)
from tests.support.deploy_runner import NAMESPACE, TOKEN, Runner, deploy, hub, storage_client
from tests.support.hub_server import Hub
from tests.support.project_copy import PROJECT

__all__ = ["deploy", "hub", "storage_client"]  # fixtures

RECORDED = Path(__file__).parent / "platform_answers.json"
"""Recording of `make canary` on the real platform. The file does not exist until somebody has run it."""


def unlike(local: Any, real: Any, where: str = "") -> list[str]:
    """Return the fields of the local platform that the real platform does not have, or has with another type."""
    if isinstance(local, dict) and isinstance(real, dict):
        missing = [f"{where}.{key}: not in the real platform" for key in local.keys() - real.keys()]
        both = local.keys() & real.keys()
        return missing + [line for key in sorted(both) for line in unlike(local[key], real[key], f"{where}.{key}")]
    if isinstance(local, list) and isinstance(real, list):
        return unlike(local[0], real[0], f"{where}[0]") if local and real else []
    if local is None or real is None or type(local) is type(real) or {type(local), type(real)} == {int, float}:
        return []
    return [f"{where}: {type(local).__name__}, and {type(real).__name__} in the real platform"]


def compare(local: list[dict[str, Any]], real: list[dict[str, Any]]) -> list[str]:
    """Compare responses with the same method, path (without commits) and status."""

    def by_request(responses: list[dict[str, Any]]) -> dict[tuple, Any]:
        plain = re.compile(r"[0-9a-f]{40,64}")
        return {
            (record["method"], plain.sub("X", record["path"]), record["status"]): record["body"] for record in responses
        }

    known = by_request(real)
    return [
        f"{request[0]} {request[1]} {request[2]}{line}"
        for request, body in by_request(local).items()
        if request in known
        for line in unlike(body, known[request])
    ]


def test_the_canary_deletes_everything_and_records_without_names(
    hub: Hub, deploy: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.serve_files()
    monkeypatch.setattr("scripts.deployment.repository.PROJECT", PROJECT)
    file = tmp_path / "recording.json"

    result = deploy("canary", "--record", str(file))

    assert (result.status, result.lines[-1:]) == (0, [])
    assert (hub.endpoints, f"{NAMESPACE}/remote-vae-canary" in hub.repos) == ({}, False)
    for text in ("cold start: ", "the same pixels", "pause: ", "resume: ", "delete: ", "nothing remains", "it cost $"):
        assert text in result.out
    text = file.read_text()
    assert TOKEN not in text
    assert not re.search(rf"\b{NAMESPACE}\b", text)
    local = json.loads(text)
    assert {"POST", "GET", "PUT", "DELETE"} & {record["method"] for record in local} >= {"POST", "GET", "DELETE"}
    assert any(record["path"].startswith("/v2/provider/") for record in local)
    assert compare(local, json.loads(RECORDED.read_text()) if RECORDED.exists() else local) == []

    other = json.loads(text)
    for record in other:
        if record["path"].startswith("/v2/endpoint/") and record["body"]:
            record["body"]["type"] = 1
    assert any("type: str, and int in the real platform" in line for line in compare(local, other))


@pytest.mark.parametrize("path", ["/live/", "/commit/"])
def test_a_failed_canary_deletes_everything(hub: Hub, deploy: Runner, tmp_path: Path, path: str) -> None:
    hub.fail("POST", path, 500, "broken")
    result = deploy("canary", "--record", str(tmp_path / "recording.json"))
    assert result.status == 1
    assert hub.endpoints == {}
    assert "nothing remains" in result.out


def test_a_failed_deletion_is_reported(hub: Hub, deploy: Runner, tmp_path: Path) -> None:
    hub.fail("POST", "/live/", 500, "broken")
    hub.deletion = 10_000
    result = deploy("canary", "--record", str(tmp_path / "recording.json"))
    assert result.status == 1
    assert "was deleted 300 s ago and is still" in result.lines[-1]
