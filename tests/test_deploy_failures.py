"""Tests of failures of `scripts/deploy.py`: one clear line, a status that is not 0, a second run that succeeds."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from handlers import MODELS
from tests.support.deploy_runner import NAMESPACE, TOKEN, Result, Runner, deploy, hub
from tests.support.hub_server import Hub, Repo, identity

__all__ = ["deploy", "hub"]  # fixtures

FLUX = ("deploy", "--model", "flux")
NAME = "remote-vae-flux"
KEY = f"{NAMESPACE}/{NAME}"
CHECKPOINT = MODELS["flux"].checkpoint
TOKENS = "https://huggingface.co/settings/tokens"
HF = os.path.relpath(Path(sys.executable).with_name("hf"))
MAY_IT = f"; the token may be expired or lack a permission, see {TOKENS}"
PAUSED = f"; the endpoint {NAME} is paused and costs nothing; `make resume MODEL=flux` starts it"
RUNS = f"the endpoint {NAME} is running and costs $0.80 an hour for each replica; `make pause MODEL=flux` stops it"
NOTHING = f"; there is no endpoint {NAME}, and nothing that costs"


def check(result: Result, message: str, status: int = 1) -> None:
    """Check that the last line on standard error is the message, without a traceback."""
    assert result.status == status
    assert result.lines[-1] == message
    assert "Traceback" not in result.err


def check_untouched(hub: Hub) -> None:
    assert hub.changes() == []


def check_rerun(hub: Hub, deploy: Runner, *arguments: str) -> None:
    """Check that the same command now succeeds, with one endpoint at the newest commit."""
    hub.faults.clear()
    result = deploy(*(arguments or FLUX))
    assert (result.status, result.lines) == (0, [])
    (endpoint,) = hub.endpoints.values()
    repo = hub.repos[endpoint["model"]["repository"]]
    assert endpoint["model"]["revision"] == repo.commits[-1][0]
    assert endpoint["status"]["state"] == "running"
    assert {"handler.py", "vae/diffusion_pytorch_model.safetensors"} < repo.files.keys()
    assert TOKEN not in deploy.outputs


def test_no_token(hub: Hub, deploy: Runner) -> None:
    check(
        deploy(*FLUX, token=None),
        f"error: no Hugging Face token: set HF_TOKEN to one from {TOKENS}, or run `{HF} auth login`",
    )
    assert hub.requests == []
    check_rerun(hub, deploy)


def test_no_token_for_the_other_commands(deploy: Runner) -> None:
    for target in ("deploy --all", "endpoints", "pause --all", "smoke", "pause", "resume", "undeploy"):
        model = ("--model", "flux") if target not in ("deploy --all", "endpoints", "pause --all") else ()
        result = deploy(*target.split(), *model, token=None)
        assert result.status == 1
        notes = result.lines[:-1]
        assert all("cannot" in line for line in notes) if target == "deploy --all" else not notes
        assert result.lines[-1].startswith("error: no Hugging Face token: ")


def test_an_unknown_token(hub: Hub, deploy: Runner) -> None:
    unknown = "Invalid credentials in Authorization header"
    check(
        deploy(*FLUX, token="hf_old"), f"error: could not check the token: Hugging Face answered 401: {unknown}{MAY_IT}"
    )
    check_untouched(hub)
    check_rerun(hub, deploy)


def test_a_read_only_token(hub: Hub, deploy: Runner) -> None:
    hub.tokens["hf_read"] = identity(NAMESPACE, role="read")
    check(
        deploy(*FLUX, token="hf_read"),
        f"error: this token may only read: deploying needs one with write access, see {TOKENS}",
    )
    check_untouched(hub)
    check_rerun(hub, deploy)


WRITE = "write repositories (repo.write)"
MANAGE = "manage your Inference Endpoints (inference.endpoints.write)"
CALL = "make calls to your Inference Endpoints (inference.endpoints.infer.write)"


@pytest.mark.parametrize(
    ("permissions", "missing"),
    [
        (["repo.content.read"], f"{WRITE} and not {MANAGE} and not {CALL}"),
        (["repo.write", "inference.endpoints.infer.write"], MANAGE),
        (["inference.endpoints.write", "inference.endpoints.infer.write"], WRITE),
        (["repo.write", "inference.endpoints.write"], CALL),
    ],
)
def test_a_fine_grained_token_without_a_permission(
    hub: Hub, deploy: Runner, permissions: list[str], missing: str
) -> None:
    every = ["repo.write", "inference.endpoints.write", "inference.endpoints.infer.write"]
    elsewhere = {"entity": {"type": "org", "name": "lab"}, "permissions": every}
    here = {"entity": {"type": "user", "name": NAMESPACE}, "permissions": permissions}
    hub.tokens["hf_fine"] = identity(NAMESPACE, role="fineGrained", scoped=[here, elsewhere])
    check(deploy(*FLUX, token="hf_fine"), f"error: this token may not {missing} in {NAMESPACE}; see {TOKENS}")
    check_untouched(hub)

    here["permissions"] = every
    assert deploy(*FLUX, token="hf_fine").status == 0


@pytest.mark.parametrize(
    ("model", "error"),
    [("fluks", "there is no model 'fluks' (did you mean flux?)"), (None, "no model was named")],
)
def test_an_unknown_model(hub: Hub, deploy: Runner, model: str | None, error: str) -> None:
    check(
        deploy("deploy", *(("--model", model) if model else ())),
        f"error: {error}; the models are: {', '.join(MODELS)}",
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "Flux_1"], "NAME=Flux_1 is not valid: use 1 to 32 of a-z, 0-9 and -, with no - at either end"),
        (["--name", "a" * 33], f"NAME={'a' * 33} is not valid: use 1 to 32 of a-z, 0-9 and -, with no - at either end"),
        (["--access", "open"], "ACCESS=open is not valid: choose one of authenticated, private, public"),
        (["--min-replica", "3"], "MIN_REPLICA=3 MAX_REPLICA=1 is not valid: 0 <= MIN <= MAX, and MAX >= 1"),
        (["--scale-to-zero", "0"], "SCALE_TO_ZERO is in minutes, 1 or more; MIN_REPLICA=1 never scales to zero"),
        (["--weights", "/nowhere"], "WEIGHTS=/nowhere has no config.json and no diffusion_pytorch_model.safetensors"),
    ],
)
def test_an_invalid_option(hub: Hub, deploy: Runner, arguments: list[str], message: str) -> None:
    check(deploy(*FLUX, *arguments), f"error: {message}")
    assert hub.requests == []


def test_weights_for_another_class(deploy: Runner, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    check(
        deploy(*FLUX, "--weights", str(tmp_path)),
        f"error: WEIGHTS={tmp_path} is an AutoencoderTiny, and flux needs an AutoencoderKL",
    )


@pytest.mark.parametrize(
    ("namespace", "message"),
    [
        ("acme", "NAMESPACE=acme is not yours: this token's are ana, lab, museum"),
        ("museum", "NAMESPACE=museum: you may only read there; ask an admin for the role write"),
    ],
)
def test_a_namespace_without_rights(hub: Hub, deploy: Runner, namespace: str, message: str) -> None:
    check(deploy(*FLUX, "--namespace", namespace), f"error: {message}")
    check_untouched(hub)
    check_rerun(hub, deploy, *FLUX, "--namespace", "lab")


@pytest.mark.parametrize(
    ("status", "error", "advice"),
    [
        (
            402,
            "A payment method is required",
            "credits and payment methods are at https://huggingface.co/settings/billing",
        ),
        (400, "No credits left", "credits and payment methods are at https://huggingface.co/settings/billing"),
        (
            403,
            "Quota exceeded for nvidia-l4",
            "ask for more at https://endpoints.huggingface.co/contact, or choose another INSTANCE=...",
        ),
    ],
)
def test_no_payment_method_or_quota(hub: Hub, deploy: Runner, status: int, error: str, advice: str) -> None:
    hub.fail("POST", "^/v2/endpoint/ana$", status, error)
    message = f"Hugging Face answered {status}: {error}; {advice}"
    check(deploy(*FLUX), f"error: could not create the endpoint {NAME}: {message}{NOTHING}")
    assert hub.endpoints == {}
    copies = len(hub.sent("duplicate"))

    check_rerun(hub, deploy)
    assert len(hub.sent("duplicate")) == copies


def test_a_token_that_may_not_manage_endpoints(hub: Hub, deploy: Runner) -> None:
    hub.fail("GET", "^/v2/endpoint", 403, "Forbidden")
    check(
        deploy(*FLUX),
        f"error: could not look up the endpoint {NAME}: Hugging Face answered 403: Forbidden{MAY_IT}",
    )
    check_untouched(hub)
    check_rerun(hub, deploy)


def test_a_gated_checkpoint(hub: Hub, deploy: Runner) -> None:
    hub.repos[CHECKPOINT].gated = True
    check(
        deploy(*FLUX),
        f"error: {CHECKPOINT} is gated: accept its conditions on https://huggingface.co/{CHECKPOINT}, then try again",
    )
    check_untouched(hub)

    hub.tokens[TOKEN]["accepted"] = True
    check_rerun(hub, deploy)


def test_a_gated_checkpoint_that_the_token_may_not_open(hub: Hub, deploy: Runner) -> None:
    """Accept the conditions of the checkpoint, so that the token is the cause."""
    hub.repos[CHECKPOINT].gated = True
    refusal = "Please enable access to public gated repositories in your fine-grained token settings"
    hub.fail("GET", "auth-check", 403, refusal)
    check(deploy(*FLUX), f"error: could not open the checkpoint: Hugging Face answered 403: {refusal}{MAY_IT}")
    check_untouched(hub)


@pytest.mark.parametrize("model", ["flux,", " flux ,,"])
def test_a_comma_too_many(hub: Hub, deploy: Runner, model: str) -> None:
    assert deploy("deploy", "--model", model).status == 0
    assert list(hub.endpoints) == [KEY]


@pytest.mark.parametrize("url", ["http://a..b", "http://localhost:abc", "localhost:8000", "ftp://localhost"])
def test_smoke_with_an_invalid_url(deploy: Runner, url: str) -> None:
    result = deploy("smoke", "--url", url)
    assert (result.status, len(result.lines)) == (1, 1)
    assert result.lines[0].startswith("error: ")


def test_pausing_all_takes_no_model(hub: Hub, deploy: Runner) -> None:
    check(
        deploy("pause", "--all", "--model", "flux"),
        "error: --all pauses every endpoint of this project: name no model and no endpoint",
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.bin": b"1"}, "was not made by this script"),
        ({"endpoint.json": b'{"other": 1}'}, "was not made by this script"),
        ({"endpoint.json": b'{"model": "sdxl", "checkpoint": "x", "version": "0"}'}, "is a deployment of sdxl"),
    ],
)
def test_a_foreign_repository(hub: Hub, deploy: Runner, files: dict[str, bytes], message: str) -> None:
    hub.repos[KEY] = Repo(private=True)
    hub.repos[KEY].commit(files)
    for command in (FLUX, ("undeploy", "--model", "flux", "--delete-repo", "--yes")):
        check(deploy(*command), f"error: {hub.url}/{KEY} {message}: choose another NAME=...")
    check_untouched(hub)


def test_another_name_avoids_a_foreign_repository(hub: Hub, deploy: Runner) -> None:
    hub.repos[KEY] = Repo(private=True)
    hub.repos[KEY].commit({"model.bin": b"1"})
    check_rerun(hub, deploy, *FLUX, "--name", "mine")
    assert hub.repos[KEY].files == {"model.bin": b"1"}


def test_a_foreign_endpoint(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    foreign = f"https://endpoints.huggingface.co/{NAMESPACE}/endpoints/{NAME} was not made by this script"
    for tags, message in (
        (["production"], foreign),
        (["remote-vae", "sdxl"], f"the endpoint {NAME} is a deployment of sdxl"),
    ):
        hub.endpoints[KEY]["tags"] = tags
        hub.requests.clear()
        for command in ("deploy", "pause", "resume", "undeploy"):
            yes = ("--yes",) if command == "undeploy" else ()
            check(deploy(command, "--model", "flux", *yes), f"error: {message}: choose another NAME=...")
        check_untouched(hub)


def test_immutable_settings(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    hub.requests.clear()
    for option, old, new, *more in (
        ("access", "authenticated", "public"),
        ("region", "us-east-1", "eu-west-1"),
        ("vendor", "aws", "gcp", "--region", "us-east4"),
    ):
        check(
            deploy(*FLUX, f"--{option}", new, *more),
            f"error: {option.upper()}={new} was requested and the endpoint {NAME} has {old}, which never changes: "
            f"choose another NAME=..., or `make undeploy` it first. Nothing was sent to it; {RUNS}",
        )
    check_untouched(hub)


@pytest.mark.parametrize(
    ("method", "path", "task", "status"),
    [
        ("GET", "whoami", "check the token", 429),
        ("GET", "/resolve/", f"upload to {KEY}", 429),
        ("POST", "/commit/", f"upload to {KEY}", 503),
        ("POST", "^/v2/endpoint/ana$", f"create the endpoint {NAME}", 500),
    ],
)
def test_transient_errors(hub: Hub, deploy: Runner, method: str, path: str, task: str, status: int) -> None:
    """Test that a request is tried five times. The next run needs two attempts.

    `tests/test_deploy_faults.py` has the other requests.
    """
    hub.fail(method, path, status, "busy")
    result = deploy(*FLUX)
    message = f"Hugging Face answered {status}: busy"
    again = "run the same command again later, it continues where it stopped"
    check(result, f"error: could not {task}: {message}; {again}" + NOTHING * (method == "POST" and "v2" in path))
    waits = [f"  {message}; trying again in {seconds} s" for seconds in (2, 4, 8, 16)]
    assert [line for line in result.lines[:-1] if "prices" not in line] == waits

    hub.faults.clear()
    hub.fail(method, path, status, "busy", times=2)
    assert deploy(*FLUX).status == 0
    assert hub.faults[0].times == 0
    assert list(hub.endpoints) == [KEY]


def test_the_wait_grows_after_each_refusal_without_a_hint(hub: Hub, deploy: Runner) -> None:
    hub.fail("GET", "whoami", 500)
    result = deploy(*FLUX)
    assert re.findall(r"in (\d+) s", result.err) == ["2", "4", "8", "16"]


def test_the_connection_is_lost_in_an_upload(hub: Hub, deploy: Runner) -> None:
    hub.drop("POST", "/commit/")
    result = deploy(*FLUX)
    assert result.status == 1
    assert re.fullmatch(
        rf"error: could not upload to {KEY}: the connection to Hugging Face was lost \(\w+\); "
        "run the same command again later, it continues where it stopped",
        result.lines[-1],
    )
    assert hub.repos[KEY].files == {}
    check_rerun(hub, deploy)


def test_no_connection_at_all(hub: Hub, deploy: Runner) -> None:
    result = deploy(*FLUX, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.status == 1
    assert result.lines[-1].startswith("error: could not check the token: the connection to Hugging Face was lost")
    check_rerun(hub, deploy)


@pytest.mark.parametrize("state", ["failed", "updateFailed"])
def test_a_failed_endpoint(hub: Hub, deploy: Runner, state: str) -> None:
    hub.script = ["pending", "initializing", (state, "CUDA out of memory")]
    result = deploy(*FLUX, "--keep")
    check(
        result,
        f"error: the endpoint {NAME} failed: CUDA out of memory; "
        f"its logs: https://endpoints.huggingface.co/{KEY.replace('/', '/endpoints/')}/logs; the endpoint {NAME} is "
        f"{state} and costs $0.80 an hour for each replica; `make pause MODEL=flux` stops it",
    )
    assert re.search(rf"^  0:00:\d\d  {state} +CUDA out of memory", result.out, re.MULTILINE)
    assert deploy("smoke", "--model", "flux").status == 1

    hub.script = [(state, "CUDA out of memory"), (state, "CUDA out of memory"), "pending", "running"]
    check_rerun(hub, deploy)  # the old failure is visible a little longer


def test_the_wait_times_out(hub: Hub, deploy: Runner) -> None:
    hub.script = ["pending", "initializing"]
    result = deploy(*FLUX, "--timeout", "0.01")
    check(
        result,
        f"error: the endpoint {NAME} is still initializing after 0:00:05 (TIMEOUT=0.01){PAUSED}",
    )

    hub.script = ["running"]
    check_rerun(hub, deploy)


def test_ctrl_c_while_uploading(hub: Hub, deploy: Runner) -> None:
    hub.interrupt("POST", "/commit/")
    check(
        deploy(*FLUX),
        f"stopped: the repository {KEY} stays, it may be incomplete and costs nothing; "
        "run the same command again to continue",
        status=130,
    )
    check_rerun(hub, deploy)


def test_ctrl_c_while_waiting(hub: Hub, deploy: Runner) -> None:
    """Press Ctrl-C as a user does in a terminal."""
    hub.script = ["pending"]
    check(
        deploy.interrupt(*FLUX),
        f"stopped: {PAUSED[2:]}; run the same command again to continue",
        status=130,
    )
    hub.script = ["running"]
    check_rerun(hub, deploy)


def test_ctrl_c_in_deploy_all_still_prints_the_table(hub: Hub, deploy: Runner) -> None:
    hub.interrupt("POST", "^/v2/endpoint", after=True)
    result = deploy("deploy", "--all")
    assert result.status == 130
    assert re.search(r"^sd-v1 +stopped +the endpoint remote-vae-sd-v1 is paused", result.out, re.MULTILINE)
    assert re.search(r"^flux +not reached", result.out, re.MULTILINE)


def test_ctrl_c_before_anything(hub: Hub, deploy: Runner) -> None:
    hub.interrupt("GET", f"/api/models/{CHECKPOINT}")
    check(
        deploy(*FLUX),
        "stopped: nothing was changed; run the same command again to continue",
        status=130,
    )
    check_untouched(hub)
    check_rerun(hub, deploy)


def test_a_live_endpoint_with_a_wrong_response(hub: Hub, deploy: Runner) -> None:
    hub.fail("POST", "/live/.*/encode", 500, "out of memory")
    check(
        deploy(*FLUX),
        f"error: {hub.url}/live/{KEY}/encode: 500 out of memory{PAUSED}",
    )
    check_rerun(hub, deploy)


def test_the_smoke_test_waits_for_the_proxy(hub: Hub, deploy: Runner) -> None:
    hub.fail("POST", "/live/.*/encode", 503, "no replica", times=2)
    result = deploy(*FLUX)
    assert result.status == 0
    assert result.lines == [f"  {hub.url}/live/{KEY}/encode: 503 no replica; retrying, 0 s of at most 600 s so far"]


def test_a_missing_endpoint(deploy: Runner) -> None:
    for command in ("smoke", "pause", "resume"):
        check(
            deploy(command, "--model", "flux"),
            f"error: there is no endpoint {NAME} in {NAMESPACE}; `make endpoints` lists yours, "
            "`make deploy MODEL=flux` creates it",
        )


def test_a_missing_checkpoint(hub: Hub, deploy: Runner) -> None:
    repo = hub.repos.pop(CHECKPOINT)
    check(
        deploy(*FLUX),
        f"error: {CHECKPOINT} is not on the Hub, or this token may not see it: https://huggingface.co/{CHECKPOINT}",
    )
    hub.repos[CHECKPOINT] = Repo()
    sha = hub.repos[CHECKPOINT].commit({"vae/config.json": b"{}"})
    check(
        deploy(*FLUX),
        f"error: {CHECKPOINT} has no vae/diffusion_pytorch_model.safetensors at commit {sha[:8]}",
    )
    check_untouched(hub)
    hub.repos[CHECKPOINT] = repo
    check_rerun(hub, deploy)
