"""Tests of surprises of the real platform, each with a local platform that behaves the same (`endpoints_server.py`)."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from handlers import MODELS
from tests.support.deploy_runner import NAMESPACE, TOKEN, Runner, deploy, hub, storage_client
from tests.support.endpoints_server import Hardware
from tests.support.hub_server import Hub, identity

__all__ = ["deploy", "hub", "storage_client"]  # fixtures

FLUX = ("deploy", "--model", "flux")
TINY = ("deploy", "--model", "tiny")
NAME = "remote-vae-flux"
KEY = f"{NAMESPACE}/{NAME}"


# 1. Permissions


def test_the_permission_to_call_is_checked_before_any_change(hub: Hub, deploy: Runner) -> None:
    granted = ["repo.write", "inference.endpoints.write"]
    rule = {"entity": {"type": "user", "name": NAMESPACE}, "permissions": granted}
    hub.tokens[TOKEN] = identity(NAMESPACE, role="fineGrained", scoped=[rule])

    refused = deploy(*FLUX)
    assert (refused.status, hub.changes()) == (1, [])
    assert "make calls to your Inference Endpoints (inference.endpoints.infer.write)" in refused.lines[-1]

    assert deploy(*FLUX, "--access", "public").status == 0  # anyone may call it
    assert deploy("pause", "--model", "flux").status == 0  # pausing needs no permission to call


def test_a_refused_call_shows_the_platforms_message(hub: Hub, deploy: Runner) -> None:
    """Test the proxy's refusal. It is the only one for a login whose permissions are not in whoami."""
    hub.fail("POST", "/live/", 403, "missing permissions: inference.endpoints.infer.write")
    result = deploy(*FLUX)
    assert result.status == 1
    assert (
        "/encode: 403 missing permissions: inference.endpoints.infer.write; the token is not accepted"
        in result.lines[-1]
    )


# 2. An update that removes the scale to zero


@pytest.mark.parametrize("accepted", ["null", "zero"])
def test_scale_to_zero_can_be_switched_off(hub: Hub, deploy: Runner, accepted: str) -> None:
    assert deploy(*FLUX).status == 0
    hub.never_sleeps_by = accepted

    result = deploy(*FLUX, "--min-replica", "1", "--max-replica", "2")

    assert result.status == 0
    scaling = hub.endpoints[KEY]["compute"]["scaling"]
    assert (scaling["minReplica"], scaling["maxReplica"], "scaleToZeroTimeout" in scaling) == (1, 2, False)
    hub.requests.clear()
    assert deploy(*FLUX, "--min-replica", "1", "--max-replica", "2").status == 0
    assert hub.changes() == []

    assert deploy(*FLUX).status == 0
    scaling = hub.endpoints[KEY]["compute"]["scaling"]
    assert (scaling["minReplica"], scaling["scaleToZeroTimeout"]) == (0, 15)


def test_an_api_without_never_is_reported(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    hub.never_sleeps_by = "nothing"
    result = deploy(*FLUX, "--min-replica", "1")
    assert result.status == 1
    assert "choose Never under Settings, Autoscaling on https://endpoints.huggingface.co/" in result.lines[-1]
    assert "is running and costs $0.80 an hour" in result.lines[-1]  # unchanged
    assert hub.endpoints[KEY]["compute"]["scaling"]["minReplica"] == 0


# 3. Creating is not idempotent


@pytest.mark.parametrize("status", [500, 504, None])
def test_an_endpoint_is_adopted_after_a_lost_response(hub: Hub, deploy: Runner, status: int | None) -> None:
    path = f"^/v2/endpoint/{NAMESPACE}$"
    if status:
        hub.fail("POST", path, status, "upstream", times=1, after=True)
    else:
        hub.drop("POST", path, times=1, after=True)

    result = deploy(*FLUX)

    assert result.status == 0
    assert "it exists already: the response to its creation was lost" in result.out
    assert list(hub.endpoints) == [KEY]
    assert hub.endpoints[KEY]["status"]["state"] == "running"


# 4. Deletion takes time


def test_undeploy_waits_until_a_new_deployment_is_possible(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    hub.deletion = 5
    assert deploy("undeploy", "--model", "flux", "--yes").status == 0
    assert hub.endpoints == {}
    assert deploy(*FLUX).status == 0


def test_an_endless_deletion_is_reported(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    hub.deletion = 10_000
    result = deploy("undeploy", "--model", "flux", "--yes")
    assert result.status == 1
    assert re.search(r"was deleted 300 s ago and is still running: https", result.lines[-1])


# 5. Rate limits


def test_a_rate_limit_is_obeyed_and_shown(hub: Hub, deploy: Runner) -> None:
    limit = {"RateLimit": '"api";r=0;t=240', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    hub.fail("GET", "^/v2/endpoint", 429, "too many", times=1, headers=limit)
    result = deploy(*FLUX)
    assert result.status == 0
    assert result.lines == ["  Hugging Face answered 429: too many; trying again in 241 s"]
    assert 241 in deploy.waits


def test_a_rate_limit_in_huggingface_hub_is_shown(hub: Hub, deploy: Runner) -> None:
    hub.fail("POST", "/preupload/", 429, times=1, headers={"RateLimit": '"api";r=0;t=55'})
    result = deploy(*FLUX)
    assert result.status == 0
    assert any("Waiting 56.0s before retry" in line for line in result.lines)
    assert 56 in deploy.waits


# 6. Xet


def test_weights_are_uploaded_by_xet_once(hub: Hub, deploy: Runner) -> None:
    assert deploy(*TINY).status == 0
    assert len(hub.sent("POST /cas/v1/xorbs")) == 1
    hub.requests.clear()
    assert deploy(*TINY).status == 0
    assert hub.sent("/cas/") == []


def test_weights_on_the_hub_are_copied_or_downloaded(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    assert (len(hub.sent("POST .*/duplicate")), hub.sent("/cas/")) == (1, [])
    copied = hub.repos[KEY].files["vae/diffusion_pytorch_model.safetensors"]

    del hub.repos[KEY], hub.endpoints[KEY]
    hub.elsewhere.add(MODELS["flux"].checkpoint)
    hub.lfs.clear()
    result = deploy(*FLUX)
    assert result.status == 0
    assert "Cannot duplicate files across storage regions; downloading and uploading" in result.err
    assert hub.repos[KEY].files["vae/diffusion_pytorch_model.safetensors"] == copied


def test_a_namespace_without_storage(hub: Hub, deploy: Runner) -> None:
    hub.full = "Private repository storage limit reached"
    result = deploy(*TINY)
    assert result.lines[-1] == (
        "error: could not upload to ana/remote-vae-tiny: Hugging Face answered 403: Private repository storage limit "
        "reached; credits and payment methods are at https://huggingface.co/settings/billing"
    )
    hub.full = ""
    assert deploy(*TINY).status == 0


def test_a_storage_refusal_downloads_nothing(hub: Hub, deploy: Runner) -> None:
    hub.full = "Private repository storage limit reached"
    result = deploy("deploy", "--model", "tiny,flux")
    assert result.lines[-1].startswith("error: could not upload to ana/remote-vae-tiny-flux: Hugging Face answered 403")
    assert "downloading" not in result.err
    assert not hub.sent("/resolve/")


def test_no_permission_to_upload(hub: Hub, deploy: Runner) -> None:
    hub.fail("GET", "xet-write-token", 500, "storage is down")
    result = deploy(*TINY)
    assert result.lines[-1].startswith(
        "error: could not upload to ana/remote-vae-tiny: Hugging Face answered 500: storage is down; run"
    )
    assert sum(deploy.waits) <= 60


@pytest.fixture
def silent() -> Iterator[str]:
    """Yield the URL of a server that takes connections and never responds."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("storage", ["silent", "closed"])
def test_a_storage_server_without_a_response(
    hub: Hub, deploy: Runner, silent: str, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    from scripts.deployment import repository

    assert repository.STORAGE_TIMEOUT <= 30
    monkeypatch.setattr(repository, "STORAGE_TIMEOUT", 0.2)
    hub.storage = silent if storage == "silent" else "http://127.0.0.1:9"
    result = deploy(*TINY)
    assert re.fullmatch(
        r"error: the Hub's storage 127.0.0.1:\d+ does not respond \(\w+\): is it blocked by a proxy\? "
        "Run the same command again to continue",
        result.lines[-1],
    )
    hub.storage = ""
    assert deploy(*TINY).status == 0


def test_a_storage_server_that_fails_during_an_upload(hub: Hub, deploy: Runner) -> None:
    hub.fail("POST", "/cas/v1/xorbs", 500)
    result = deploy(*TINY)
    assert result.status == 1
    assert "the storage of Hugging Face did not take it" in result.lines[-1]
    assert "500 Internal Server Error" in result.lines[-1]


# 7. A login through the browser


@pytest.mark.parametrize("auth", [None, {}, {"type": "oauth", "accessToken": None}, {"type": "oauth"}])
def test_a_login_by_oauth_has_no_permissions(hub: Hub, deploy: Runner, auth: dict | None) -> None:
    hub.tokens[TOKEN]["auth"] = auth
    if auth is None:
        del hub.tokens[TOKEN]["auth"]
    hub.tokens[TOKEN]["orgs"] = None
    assert deploy(*FLUX).status == 0


# 8. The type in the response


@pytest.mark.parametrize("actual", ["public", "private"])
def test_an_endpoint_of_another_type_than_requested(hub: Hub, deploy: Runner, actual: str) -> None:
    hub.forced_type = actual
    result = deploy(*FLUX)
    assert result.status == 1
    assert f"ATTENTION: ACCESS=authenticated was requested and the endpoint {NAME} has {actual}" in result.lines[-1]
    assert hub.sent("/live/") == []
    assert hub.sent("DELETE") == []
    assert hub.endpoints[KEY]["status"]["state"] == "paused"


def test_protected_is_the_older_name_of_authenticated(hub: Hub, deploy: Runner) -> None:
    hub.forced_type = "protected"
    assert deploy(*FLUX).status == 0


# 9. Hardware, regions and prices


def test_the_price_comes_from_the_platform(hub: Hub, deploy: Runner) -> None:
    result = deploy(*FLUX, "--region", "eu-west-1")
    assert result.status == 0
    assert "nvidia-l4 x1 in aws eu-west-1: $0.95 an hour" in result.out


def test_a_region_without_the_hardware_names_the_others(hub: Hub, deploy: Runner) -> None:
    result = deploy(*FLUX, "--region", "us-west-2")
    assert (result.status, hub.changes()) == (1, [])
    assert re.search(
        r"REGION=us-west-2 for aws nvidia-l4 x1 is not available \(not_available\): "
        r"choose from us-east-1, eu-west-1, or auto$",
        result.lines[-1],
    )


def test_an_existing_endpoint_is_not_told_to_move(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX, "--region", "us-west-2", "--instance", "nvidia-h200").status == 0
    before = len(hub.changes())
    result = deploy(*FLUX, "--region", "auto")
    assert (result.status, len(hub.changes())) == (1, before)
    assert re.search(
        r"REGION=us-west-2 for aws nvidia-l4 x1 is not available \(not_available\): choose from \S+, \S+, "
        r"for another NAME=..., as an endpoint never moves; the endpoint remote-vae-flux is running",
        result.lines[-1],
    )


@pytest.mark.parametrize(("quota", "region"), [(1, "us-east-1"), (0, "eu-west-1")])
def test_auto_selects_a_region_with_quota(hub: Hub, deploy: Runner, quota: int, region: str) -> None:
    hub.hardware.reverse()  # the order of the platform does not matter for the default region
    for hardware in hub.hardware:
        if hardware.region == "us-east-1":
            hardware.quota = quota
    assert deploy(*FLUX, "--region", "auto").status == 0
    assert hub.endpoints[KEY]["provider"] == {"vendor": "aws", "region": region}
    assert deploy(*FLUX, "--region", "auto").status == 0  # the endpoint stays in its region


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--instance", "nvidia-a100"], r"INSTANCE=nvidia-a100 for aws is not available \(deprecated\): choose from "),
        (
            ["--instance", "nvidia-b300"],
            r"INSTANCE=nvidia-b300 for aws is not available \(not listed\): choose from "
            "(?=.*intel-spr)(?=.*nvidia-h200)(?=.*nvidia-l4)",
        ),
        (["--vendor", "gcp", "--region", "us-east4"], r"VENDOR=gcp is not available \(not listed\): choose from aws$"),
        (
            ["--instance", "nvidia-t4", "--size", "x4"],
            r"SIZE=x4 for aws nvidia-t4 is not available \(not listed\): choose from x1$",
        ),
    ],
)
def test_unavailable_hardware(hub: Hub, deploy: Runner, arguments: list[str], message: str) -> None:
    result = deploy(*FLUX, *arguments)
    assert (result.status, hub.changes()) == (1, [])
    assert re.search(message, result.lines[-1])


def test_a_platform_without_prices(hub: Hub, deploy: Runner) -> None:
    hub.fail("GET", "/v2/provider", 404)
    result = deploy(*FLUX)
    assert result.status == 0
    assert "prices are those of the table in this project, and no quota is checked" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "x9"], "SIZE=x9 is not valid: nvidia-l4 has x1, x4"),
        (["--instance", "intel-spr"], "INSTANCE=intel-spr SIZE=x1 has 2 GB, and this needs 2.1: choose a larger SIZE"),
    ],
)
def test_too_small_hardware_is_refused_without_a_network(deploy: Runner, arguments: list[str], message: str) -> None:
    result = deploy(*FLUX, *arguments, "--dry-run", token=None)
    assert result.status == 1
    assert message in result.lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--region", "mars"], "REGION=mars is not valid: a region of aws looks like us-east-1; auto takes one"),
        (["--vendor", "gcp"], "REGION=us-east-1 is not valid: a region of gcp looks like us-east4; auto takes one"),
        (["--vendor", "asure"], "VENDOR=asure is not valid: choose one of aws, azure, gcp (did you mean azure?)"),
    ],
)
def test_an_invalid_region_is_refused_without_a_network(deploy: Runner, arguments: list[str], message: str) -> None:
    result = deploy(*FLUX, *arguments, "--dry-run", token=None)
    assert result.status == 1
    assert message in result.lines[-1]


def test_a_plan_mentions_that_the_platform_was_not_queried(deploy: Runner) -> None:
    """Test the plan without the platform, because a list in this project does not know tomorrow's hardware."""
    told = "not checked: deploying first asks the platform whether it has this instance"
    listed = deploy(*FLUX, "--region", "ap-south-1", "--dry-run", token=None)
    assert f"nvidia-l4 x1, aws ap-south-1\n                  {told}\n" in listed.out
    newer = deploy(*FLUX, "--instance", "nvidia-l44", "--dry-run", token=None)
    assert f"{told}; nvidia-l44 is not in the list of 2026-08-20 (did you mean nvidia-l4?)" in newer.out


def test_too_small_hardware_that_is_not_in_the_table(hub: Hub, deploy: Runner) -> None:
    hub.hardware.append(Hardware("us-east-1", "intel-tiny", "x1", 0.01, 1))
    result = deploy(*TINY, "--instance", "intel-tiny")
    assert (result.status, hub.changes()) == (1, [])
    assert "has 1 GB, and this needs 1.1" in result.lines[-1] or "has 2 GB" in result.lines[-1]


# 10. The quota, and scale to zero


def test_scaled_to_zero_endpoints_count_against_the_quota(hub: Hub, deploy: Runner) -> None:
    for hardware in hub.hardware:
        hardware.quota = 1
    assert deploy("deploy", "--model", "flux").status == 0
    hub.endpoints[KEY]["status"]["state"] = "scaledToZero"
    hub.requests.clear()

    refused = deploy("deploy", "--model", "flux2")
    assert (refused.status, hub.changes()) == (1, [])
    assert re.search(
        r"quota for nvidia-l4 in us-east-1 is used up: 1 of 1, endpoints that have scaled to zero included; ",
        refused.err,
    )
    assert deploy(*FLUX).status == 0  # it counts itself

    assert deploy("pause", "--model", "flux").status == 0
    assert deploy("deploy", "--model", "flux2").status == 0


def test_a_quota_below_max_replica_is_reported(hub: Hub, deploy: Runner) -> None:
    for hardware in hub.hardware:
        hardware.quota = 2
    result = deploy(*FLUX, "--max-replica", "4")
    assert result.status == 0
    assert "the quota in us-east-1 has 2 left: MAX_REPLICA=4 may not be reached" in result.err


def test_the_cost_note_has_the_idle_time(deploy: Runner) -> None:
    for result in (deploy(*FLUX, "--dry-run", token=None), deploy(*FLUX)):
        assert "15 minutes after the last request or later (44 were measured once where 15 were set)" in result.out
        assert "counts against the quota meanwhile" in result.out
        assert "costs that hour and 15 idle minutes after it: $1.00 a day" in result.out


# No hidden cost


def test_a_failed_new_endpoint_is_paused_or_kept(hub: Hub, deploy: Runner) -> None:
    hub.fail("POST", "/live/", 500, "out of memory")
    assert "is paused and costs nothing; `make resume MODEL=flux` starts it" in deploy(*FLUX).lines[-1]
    assert hub.endpoints[KEY]["status"]["state"] == "paused"
    kept = deploy(*FLUX, "--keep")
    assert "is running and costs $0.80 an hour for each replica; `make pause MODEL=flux` stops it" in kept.lines[-1]
    assert hub.endpoints[KEY]["status"]["state"] == "running"


def test_an_untouched_endpoint_continues_and_is_reported(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    hub.fail("POST", "/commit/", 403, "no")
    hub.repos[KEY].commits[-1][1]["handler.py"] = b"older"
    result = deploy(*FLUX)
    assert "is running and costs $0.80 an hour" in result.lines[-1]
    assert hub.endpoints[KEY]["status"]["state"] == "running"


def test_a_failed_pause_is_reported_in_capitals(hub: Hub, deploy: Runner) -> None:
    hub.fail("POST", "/live/", 500, "out of memory")
    hub.fail("POST", "/pause", 503)
    result = deploy(*FLUX)
    assert f"the endpoint {NAME} MAY BE RUNNING, at $0.80 an hour: `make pause MODEL=flux` stops it" in result.lines[-1]


def test_a_wait_survives_a_lost_network_until_its_timeout(hub: Hub, deploy: Runner) -> None:
    polled = f"^/v2/endpoint/{KEY}$"
    hub.script = ["pending", "running"]

    def lose(times: int) -> None:
        hub.faults.clear()
        hub.drop("GET", polled, times=times)

    assert deploy(*FLUX).status == 0
    hub.endpoints.clear()
    hub.fail("GET", polled, 404, times=1)  # the first poll, before the endpoint exists
    hub.drop("GET", polled, times=50)
    result = deploy(*FLUX)
    assert result.status == 0
    assert len([line for line in result.lines if "the endpoint continues to start, still waiting" in line]) == 1

    hub.endpoints.clear()
    hub.faults.clear()
    hub.fail("GET", polled, 404, times=1)
    hub.drop("GET", polled)
    result = deploy(*FLUX, "--timeout", "10")
    assert result.status == 1
    assert "is still pending after 0:10:0" in result.lines[-1]
    assert "MAY BE RUNNING, at $0.80 an hour" in result.lines[-1]


def test_endpoints_shows_time_and_cost(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    since = datetime.now(UTC) - timedelta(hours=2.5)
    hub.endpoints[KEY]["status"]["updatedAt"] = f"{since:%Y-%m-%dT%H:%M:%S}.000000078Z"
    assert re.search(rf"^{NAME} .* 2:30:\d\d, \$2\.00 ", deploy("endpoints").out, re.MULTILINE)
    hub.endpoints[KEY]["status"]["state"] = "scaledToZero"
    assert re.search(rf"^{NAME} .* - +http", deploy("endpoints").out, re.MULTILINE)


def test_pause_all_ignores_other_tags(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    assert deploy("deploy", "--model", "sd-v1").status == 0
    hub.endpoints[f"{NAMESPACE}/other"] = json.loads(json.dumps(hub.endpoints[KEY])) | {"name": "other", "tags": []}
    hub.endpoints[KEY]["tags"] = ["team-a", "remote-vae", "production", "flux"]
    assert re.search(rf"^{NAME} +flux +running", deploy("endpoints").out, re.MULTILINE)

    hub.fail("POST", "remote-vae-sd-v1/pause", 500)
    failed = deploy("pause", "--all")
    assert failed.status == 1
    assert "MAY BE RUNNING, and cost: remote-vae-sd-v1 (https://" in failed.lines[-1]
    assert hub.endpoints[KEY]["status"]["state"] == "paused"

    hub.faults.clear()
    assert deploy("pause", "--all").status == 0
    assert {key: raw["status"]["state"] for key, raw in hub.endpoints.items()} == {
        KEY: "paused",
        f"{NAMESPACE}/remote-vae-sd-v1": "paused",
        f"{NAMESPACE}/other": "running",
    }
    assert deploy("undeploy", "--model", "flux", "--yes").status == 0


def test_a_change_upstream_causes_no_update(hub: Hub, deploy: Runner) -> None:
    checkpoint = hub.repos[MODELS["flux"].checkpoint]
    assert deploy(*FLUX).status == 0
    first = checkpoint.commits[-1][0]
    checkpoint.commit({**checkpoint.commits[-1][1], "README.md": b"edited"})
    hub.requests.clear()

    result = deploy(*FLUX)
    assert (result.status, hub.changes()) == (0, [])
    assert f"at commit {first[:8]}, pinned" in result.out

    assert deploy(*FLUX, "--revision", "main").status == 0
    record = json.loads(hub.repos[KEY].files["endpoint.json"])
    assert record["revision"] == checkpoint.commits[-1][0]


# One endpoint for several models


def test_several_models_in_one_endpoint(hub: Hub, deploy: Runner) -> None:
    several = ("deploy", "--model", "sd-v1,sdxl,flux", "--access", "public")
    plan = deploy(*several, "--dry-run", token=None)
    assert plan.status == 0
    assert "vae/sdxl/diffusion_pytorch_model.safetensors" in plan.out
    result = deploy(*several)
    assert result.status == 0
    (key,) = hub.endpoints
    assert key == f"{NAMESPACE}/remote-vae-sd-v1-sdxl-flux"
    raw = hub.endpoints[key]
    assert raw["tags"] == ["remote-vae", "sd-v1", "sdxl", "flux"]
    assert raw["compute"]["instanceType"] == "nvidia-l4"
    record = json.loads(hub.repos[key].files["endpoint.json"])
    assert [model["model"] for model in record["models"]] == ["sd-v1", "sdxl", "flux"]
    assert len(hub.sent("POST /live/.*/(sd-v1|sdxl|flux)/encode")) == 3
    card = hub.repos[key].files["README.md"].decode()
    for model in ("sd-v1", "sdxl", "flux"):
        assert f'"{hub.url}/live/{key}/{model}"' in result.out
        assert f'"https://YOUR-ENDPOINT.endpoints.huggingface.cloud/{model}"' in card

    hub.requests.clear()
    assert (deploy(*several).status, hub.changes()) == (0, [])
    assert re.search(r"^remote-vae-sd-v1-sdxl-flux +sd-v1,sdxl,flux +running", deploy("endpoints").out, re.MULTILINE)
    assert deploy("smoke", "--model", "sd-v1,sdxl,flux").status == 0
    assert deploy("undeploy", "--model", "sd-v1,sdxl,flux", "--yes").status == 0


def test_a_model_named_twice(deploy: Runner) -> None:
    assert deploy("deploy", "--model", "flux,flux").lines == ["error: flux is named twice"]
