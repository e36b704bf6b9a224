"""Tests of a fault at each request of a deployment, before or after its work.

The message must tell what remains and how to continue.
"""

from __future__ import annotations

import pytest

from handlers import MODELS
from tests.support.deploy_runner import NAMESPACE, Runner, deploy, hub, storage_client
from tests.support.hub_server import Hub

__all__ = ["deploy", "hub", "storage_client"]  # fixtures

FLUX = ("deploy", "--model", "flux")
NAME = "remote-vae-flux"
KEY = f"{NAMESPACE}/{NAME}"
LIVE = f"/live/{KEY}"

REQUESTS = {
    "token": ("GET", "whoami", None, "check the token"),
    "endpoint": ("GET", f"^/v2/endpoint/{KEY}$", False, f"look up the endpoint {NAME}"),
    "repository": ("GET", f"^/api/models/{KEY}$", None, "look up the repository"),
    "checkpoint": ("GET", f"^/api/models/{MODELS['flux'].checkpoint}", None, "look up the checkpoint"),
    "hardware": ("GET", "/v2/provider/", None, None),
    "new repository": ("POST", "/api/repos/create", None, f"create {KEY}"),
    "copy": ("POST", "/lfs-files/duplicate", None, f"upload to {KEY}"),
    "commit": ("POST", "/commit/", None, f"upload to {KEY}"),
    "new endpoint": ("POST", f"^/v2/endpoint/{NAMESPACE}$", None, f"create the endpoint {NAME}"),
    "wait": ("GET", f"^/v2/endpoint/{KEY}$", True, None),
    "encode": ("POST", f"{LIVE}/encode", None, None),
    "decode": ("POST", f"{LIVE}/decode", None, None),
}
"""Method and path of a request, whether the endpoint must exist already, and the task in the Hub's error message."""
CHANGING = ("new repository", "copy", "commit", "new endpoint")
"""Requests whose work may be complete when the response is lost."""
CASES = [
    *((name, False, fault) for name in REQUESTS for fault in (500, "Ctrl-C")),
    *((name, after, "cut") for name in CHANGING for after in (False, True)),
    *((name, True, "Ctrl-C") for name in CHANGING),
    *((name, False, status) for name in ("token", "commit", "new endpoint", "encode") for status in (401, 403)),
    ("encode", False, 504),  # which is retried, as long as the endpoint starts
]


@pytest.mark.parametrize(("request_name", "after", "fault"), CASES)
def test_a_fault_tells_what_remains_and_the_same_command_continues(
    hub: Hub, deploy: Runner, request_name: str, after: bool, fault: str | int
) -> None:
    """Test each fault. `after` does not apply to a read, because a lost response is then the same as a lost request."""
    method, path, endpoint_exists, task = REQUESTS[request_name]
    hub.script = ["pending", "running"]
    if fault == "cut":
        hub.drop(method, path, after=after, endpoint_exists=endpoint_exists)
    elif fault == "Ctrl-C":
        hub.interrupt(method, path, after=after, endpoint_exists=endpoint_exists)
    else:
        hub.fail(method, path, fault, "a fault", after=after, endpoint_exists=endpoint_exists)

    result = deploy(*FLUX, "--timeout", "3")

    last = result.lines[-1] if result.lines else ""
    if result.status == 0:
        assert "$0.80 an hour" in result.out
    elif fault == "Ctrl-C":
        assert result.status == 130
        assert last.startswith("stopped: ")
        assert "run the same command again to continue" in last
    else:
        assert result.status == 1
        assert last.startswith(f"error: could not {task}: " if task else "error: ")
    if result.status and KEY in hub.endpoints:
        if hub.endpoints[KEY]["status"]["state"] == "paused":
            assert f"the endpoint {NAME} is paused and costs nothing; `make resume MODEL=flux` starts it" in last
        else:
            assert f"the endpoint {NAME} MAY BE RUNNING, at $0.80 an hour: `make pause MODEL=flux` stops it" in last
    else:
        assert "MAY BE RUNNING" not in last

    hub.faults.clear()
    again = deploy(*FLUX)
    assert (again.status, again.lines) == (0, [])
    assert list(hub.endpoints) == [KEY]
    assert hub.endpoints[KEY]["status"]["state"] == "running"
    assert hub.endpoints[KEY]["model"]["revision"] == hub.repos[KEY].commits[-1][0]
    assert "vae/diffusion_pytorch_model.safetensors" in hub.repos[KEY].files
