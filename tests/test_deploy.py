"""Tests of `scripts/deploy.py` from the first command to the last, against the local Hub."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from rich.filesize import decimal

from handlers import MODELS
from handlers.serving.settings import Settings
from handlers.serving.vae.vae import VAE
from scripts.deployment.plan import default_name
from scripts.deployment.weights import file_names
from scripts.local_server import ROOT
from scripts.models import license_link
from tests.support.deploy_runner import (
    NAMESPACE,
    PUBLISHED,
    TOKEN,
    Result,
    Runner,
    deploy,
    hub,
    publish,
)
from tests.support.hub_server import Hub
from tests.support.project_copy import copy_project

__all__ = ["deploy", "hub"]  # fixtures


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a computer without torch, diffusers and numpy."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for module in ("torch", "diffusers", "numpy"):
        (folder / f"{module}.py").write_text(f"raise ImportError('this machine has no {module}')\n")
    return {"PYTHONPATH": str(folder)}


def listed_files(plan: str) -> dict[str, str]:
    """Return the size of each file in a printed plan, by path. The folder of the code is one entry."""
    return dict(re.findall(r"^   (\S+) +([\d.]+ (?:bytes|[kMG]B)|\?)$", plan, re.MULTILINE))


def listing(files: dict[str, bytes]) -> dict[str, str]:
    """Return the list of a plan that uploads these files."""
    sizes = Counter()
    for path, content in files.items():
        sizes["handlers/" if path.startswith("handlers/") else path] += len(content)
    return {path: decimal(size) for path, size in sizes.items()}


def repository(hub: Hub, name: str) -> dict[str, bytes]:
    return hub.repos[f"{NAMESPACE}/{name}"].files


def printed_code(result: Result) -> list[str]:
    """Return the printed Python code."""
    return re.findall(r"^```python\n(.*?)^```", result.out, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("model", ["tiny", "flux"])
def test_dry_run_prints_the_plan_with_no_torch_no_token_and_no_network(
    deploy: Runner, hub: Hub, bare: dict[str, str], model: str
) -> None:
    result = deploy.process("deploy", "--model", model, "--dry-run", token=None, **bare)

    assert (result.status, result.err) == (0, "")
    assert hub.requests == []
    check_plan(result.out, model)


def check_plan(plan: str, model: str) -> None:
    """Check the parts of a printed plan that differ between models."""
    for text in (
        f"https://huggingface.co/<your account>/{default_name(model)}",
        MODELS[model].instance,
        "scale to zero",
        "an hour",
    ):
        assert text in plan
    files = listed_files(plan)
    assert {"handler.py", "handlers/", "requirements.txt", "endpoint.json", "README.md"} < files.keys()
    assert {f"vae/{name}" for name in file_names(model)} < files.keys()


def test_dry_run_shows_the_options(deploy: Runner) -> None:
    result = deploy(
        *(
            "deploy",
            "--model",
            "flux",
            "--dry-run",
            "--namespace",
            "lab",
            "--name",
            "mine",
            "--instance",
            "nvidia-l40s",
        ),
        *("--size", "x4", "--region", "eu-west-1", "--access", "public", "--min-replica", "1", "--max-replica", "3"),
    )

    assert result.status == 0
    for text in (
        "https://huggingface.co/lab/mine",
        "nvidia-l40s x4, aws eu-west-1",
        "public: anyone, without a token",
        "1 to 3",
        "$8.30 an hour",
        "at most $24.90 an hour, with 3 replicas",
        "it never scales to zero: $199.20 a day",
        "by the list of 2026-08-20",
        "make pause MODEL=flux NAMESPACE=lab NAME=mine",
    ):
        assert text in result.out


def test_a_model_that_declares_nothing_about_deploying_can_be_deployed(
    deploy: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("instance", "license", "license_link", "weights_mb"):
        monkeypatch.delattr(MODELS["sdxl"], name)

    result = deploy("deploy", "--model", "sdxl", "--dry-run")

    assert (result.status, result.err) == (0, "")
    assert "nvidia-l4" in result.out
    assert re.search(r"^   vae/diffusion_pytorch_model.safetensors +\?", result.out, re.MULTILINE)


def test_an_unknown_price_is_shown(deploy: Runner) -> None:
    result = deploy("deploy", "--model", "flux", "--dry-run", "--vendor", "gcp", "--region", "us-east4")

    assert "price unknown here, see https://huggingface.co/pricing" in result.out


def test_an_endpoint_from_creation_to_deletion(
    hub: Hub, deploy: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deploy a copy of the project with many other files to a real server, which has only the uploaded files."""
    hub.serve_files()
    project = copy_project(tmp_path)
    monkeypatch.setattr("scripts.deployment.repository.PROJECT", project)
    monkeypatch.setattr("scripts.snippets.SIZE", 96)
    name, key = "remote-vae-tiny", f"{NAMESPACE}/remote-vae-tiny"
    public = ("deploy", "--model", "tiny", "--access", "public")

    plan = deploy(*public, "--dry-run")
    first = deploy(*public)
    assert (first.status, first.lines) == (0, [])

    uploaded = repository(hub, name)
    assert listed_files(plan.out) == listing(uploaded)
    modules = [file for kind in ("py", "html", "json") for file in (ROOT / "handlers").rglob(f"*.{kind}")]
    code = {path.relative_to(ROOT).as_posix() for path in modules}
    assert {path for path in uploaded if path.startswith("handlers/")} == code
    assert b"not for upload" not in uploaded.values()
    assert hub.repos[key].private
    record = json.loads(uploaded["endpoint.json"])
    assert record.keys() == {"model", "checkpoint", "version"}
    assert (record["model"], record["checkpoint"]) == ("tiny", "models/tiny")
    card = uploaded["README.md"].decode()
    assert "license: apache-2.0" in card
    assert "remote_decode" in card

    raw = hub.endpoints[key]
    assert raw["model"]["revision"] == hub.repos[key].commits[-1][0]
    assert (raw["model"]["repository"], raw["model"]["task"], raw["model"]["framework"]) == (key, "custom", "pytorch")
    assert raw["model"]["image"] == {"huggingface": {}}
    assert raw["compute"]["accelerator"] == "cpu"
    assert (raw["compute"]["instanceType"], raw["compute"]["instanceSize"]) == ("intel-spr", "x1")
    scaling = raw["compute"]["scaling"]
    assert (scaling["minReplica"], scaling["maxReplica"], scaling["scaleToZeroTimeout"]) == (0, 1, 15)
    assert scaling.get("measure") in (None, {"pendingRequests": 1.5})
    assert raw["tags"] == ["remote-vae", "tiny"]
    assert "secrets" not in raw["model"]
    assert "env" not in raw["model"]

    states = re.findall(r"^ +\d:\d\d:\d\d  (\w+)", first.out, re.MULTILINE)
    assert (states[0], states[-1]) == ("pending", "running")
    assert re.search(r"encode \d+\.\d\d s, decode \d+\.\d\d s: .* these became the image, at \d\d\.\d dB", first.out)
    assert f"{hub.url}/live/{key}" in first.out
    assert "$0.033 an hour" in first.out
    monkeypatch.chdir(tmp_path)
    _, with_diffusers = printed_code(first)
    exec(with_diffusers, {})
    with Image.open("decoded.jpg") as image:
        assert image.size == (96, 96)

    hub.requests.clear()
    again = deploy(*public)
    assert (again.status, hub.changes()) == (0, [])
    assert "nothing to upload" in again.out
    assert "nothing to update" in again.out

    hub.requests.clear()
    hub.serves = False  # the same container goes on, because a new one takes long to start
    with (project / "handlers" / "flux.py").open("a") as file:
        file.write("# a change\n")
    changed = deploy(*public, "--max-replica", "2")
    assert changed.status == 0
    assert re.search(r"now at commit \w{8}$", changed.out, re.MULTILINE)
    assert "max_replica 1 -> 2" in changed.out
    assert repository(hub, name)["handlers/flux.py"].endswith(b"# a change\n")
    assert hub.endpoints[key]["model"]["revision"] == hub.repos[key].commits[-1][0]
    assert list(hub.endpoints) == [key]
    assert not hub.sent("POST /cas")

    listed = deploy("endpoints")
    for text in (
        name,
        "tiny",
        "running",
        f"{hub.url}/live/{key}",
        "intel-spr x1",
        "1 of 0-2",
        "public",
        "$0.033/h",
        ", $0.0",
    ):
        assert text in listed.out

    paused = deploy("pause", "--model", "tiny")
    assert paused.status == 0
    assert hub.endpoints[key]["status"]["state"] == "paused"
    assert deploy("smoke", "--model", "tiny").lines == [
        f"error: the endpoint {name} is paused and does not respond: `make deploy MODEL=tiny` starts it "
        f"(https://endpoints.huggingface.co/{NAMESPACE}/endpoints/{name})"
    ]

    resumed = deploy("resume", "--model", "tiny")
    assert resumed.status == 0
    assert "running" in resumed.out
    assert deploy("smoke", "--model", "tiny").status == 0
    assert deploy("smoke", "--url", hub.processes[key].url).status == 0

    hub.endpoints[key]["status"]["state"] = "scaledToZero"
    asleep = deploy("smoke", "--model", "tiny")
    assert asleep.status == 0

    refused = deploy("undeploy", "--model", "tiny", stdin="n\n")
    assert (refused.status, key in hub.endpoints) == (1, True)
    assert refused.lines[-1].endswith("error: nothing was deleted; YES=1 deletes without asking")
    silent = deploy("undeploy", "--model", "tiny")
    assert (silent.status, silent.lines[-1]) == (1, "error: nothing was deleted; YES=1 deletes without asking")
    removed = deploy("undeploy", "--model", "tiny", stdin="y\n")
    assert (removed.status, hub.endpoints, key in hub.repos) == (0, {}, True)
    assert deploy("undeploy", "--model", "tiny", "--delete-repo", "--yes").status == 0
    assert key not in hub.repos
    assert "nothing to delete" in deploy("undeploy", "--model", "tiny", "--delete-repo", "--yes").out

    assert TOKEN not in deploy.outputs


def test_an_endpoint_with_a_token_prints_code_that_sends_it(
    hub: Hub, deploy: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = deploy("deploy", "--model", "sd-v1")

    assert result.status == 0
    assert "Its `remote_decode` sends no token, so it needs an endpoint with ACCESS=public" in result.out
    with_token, with_diffusers = printed_code(result)
    assert "remote_decode(" in with_diffusers
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    hub.images[f"{NAMESPACE}/remote-vae-sd-v1"] = b"decoded"
    exec(with_token.replace('-sd-v1"', '-sd-v1/decode"'), {})
    assert Path("decoded.png").read_bytes() == b"decoded"


def check_upload(hub: Hub, model: str, plan: str, output: str) -> None:
    """Check that the endpoint's repository has the files of the plan, and no other file of the checkpoint."""
    uploaded = repository(hub, default_name(model))
    assert listing(uploaded).keys() == listed_files(plan).keys()
    checkpoint = hub.repos[MODELS[model].checkpoint]
    folder = f"{MODELS[model].subfolder}/" if MODELS[model].subfolder else ""
    for name in file_names(model):
        assert uploaded[f"vae/{name}"] == checkpoint.files[folder + name]
    record = json.loads(uploaded["endpoint.json"])
    assert record["revision"] == checkpoint.commits[-1][0]
    assert record["checkpoint"] == MODELS[model].checkpoint
    card = uploaded["README.md"].decode()
    assert MODELS[model].license in card
    assert license_link(model) in card
    assert hub.endpoints[f"{NAMESPACE}/{default_name(model)}"]["compute"]["accelerator"] == "gpu"
    assert ("these became an MP4 video" in output) == (MODELS[model].kind == "video")
    assert f"{MODELS[model].license}, {license_link(model)}" in plan


def test_weights_can_come_from_a_folder(hub: Hub, deploy: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    config = json.dumps({"_class_name": "AutoencoderKL"})
    (folder / "config.json").write_text(config)
    (folder / "diffusion_pytorch_model.safetensors").write_text("weights")

    assert deploy("deploy", "--model", "flux", "--weights", str(folder)).status == 0
    uploaded = repository(hub, "remote-vae-flux")
    assert uploaded["vae/config.json"] == config.encode()
    assert json.loads(uploaded["endpoint.json"])["checkpoint"] == "a local folder"
    assert str(folder) not in uploaded["README.md"].decode() + uploaded["endpoint.json"].decode()


def test_no_file_contains_a_token(hub: Hub, deploy: Runner) -> None:
    for model in ("flux", "tiny"):
        assert deploy("deploy", "--model", model).status == 0
        assert not [
            path for path, content in repository(hub, f"remote-vae-{model}").items() if TOKEN.encode() in content
        ]
    assert TOKEN not in deploy.outputs


def test_deploy_all_uploads_each_vae_and_ends_with_a_table(
    hub: Hub, deploy: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub.repos[MODELS["sdxl"].checkpoint]

    planned = deploy("deploy", "--all", "--dry-run", token=None)
    assert hub.requests == []
    result = deploy("deploy", "--all")

    plans = by_model(planned.out, "Plan for MODEL=")
    assert list(plans) == PUBLISHED
    assert re.search(rf"^{len(PUBLISHED)} endpoints: \$\d+\.\d\d an hour while", planned.out, re.MULTILINE)
    outputs = by_model(result.out, "Deploying ")
    assert list(outputs) == PUBLISHED
    for model in PUBLISHED:
        check_plan(plans[model], model)
        if model != "sdxl":
            check_upload(hub, model, plans[model], outputs[model])

    assert result.status == 1
    assert sorted(hub.endpoints) == sorted(f"{NAMESPACE}/{default_name(key)}" for key in PUBLISHED if key != "sdxl")
    table = result.out[result.out.index("URL or error") :]
    assert re.search(r"^flux +running +\$0.80/h +http\S+/remote-vae-flux", table, re.MULTILINE)
    assert re.search(r"^sdxl +failed +madebyollin/sdxl-vae-fp16-fix is not on the Hub", table, re.MULTILINE)
    assert result.lines[-1] == (f"error: 1 of {len(PUBLISHED)} models failed; run `make deploy-all` again to continue")

    publish(hub, MODELS["sdxl"].checkpoint)
    monkeypatch.setattr("scripts.deploy.published_models", lambda image: ["sd-v1", "sdxl"])
    assert deploy("deploy", "--all").status == 0
    assert len(hub.endpoints) == len(PUBLISHED)


def by_model(output: str, heading: str) -> dict[str, str]:
    """Return the part of the output for each model, which begins with the heading and the model's key."""
    _, *parts = re.split(rf"^{heading}(?=\S)", output, flags=re.MULTILINE)
    return {re.match(r"[^\s;]+", part)[0]: part for part in parts}


def test_the_plan_names_the_clients_without_a_token(deploy: Runner) -> None:
    private, public = (
        deploy("deploy", "--model", "flux", "--access", access, "--dry-run").out for access in ("private", "public")
    )
    assert "SD.Next and kijai's ComfyUI node send no token: use ACCESS=public" in private
    assert "`remote-vae proxy`" in private
    assert "send no token" not in public


def test_an_organization_can_own_an_endpoint(hub: Hub, deploy: Runner) -> None:
    assert deploy("deploy", "--model", "flux", "--namespace", "lab", "--name", "shared").status == 0
    assert list(hub.endpoints) == ["lab/shared"]
    assert "lab/shared" in hub.repos
    assert "shared" in deploy("endpoints", "--namespace", "lab").out
    assert "has no endpoint of this project" in deploy("endpoints").out
    assert deploy("pause", "--model", "flux", "--namespace", "lab", "--name", "shared").status == 0


def test_a_paused_endpoint_is_resumed_by_deploying_it(hub: Hub, deploy: Runner) -> None:
    deploy("deploy", "--model", "flux")
    deploy("pause", "--model", "flux")

    result = deploy("deploy", "--model", "flux")

    assert result.status == 0
    assert "it was paused: resuming it" in result.out
    assert hub.endpoints[f"{NAMESPACE}/remote-vae-flux"]["status"]["state"] == "running"


def test_foreign_endpoints_are_not_listed(hub: Hub, deploy: Runner) -> None:
    deploy("deploy", "--model", "flux")
    foreign = json.loads(json.dumps(hub.endpoints[f"{NAMESPACE}/remote-vae-flux"]))
    hub.endpoints[f"{NAMESPACE}/other"] = {**foreign, "name": "other", "tags": []}

    assert "other" not in deploy("endpoints").out


def test_smoke_sends_no_token_to_foreign_urls(hub: Hub, deploy: Runner) -> None:
    deploy("deploy", "--model", "flux")

    result = deploy("smoke", "--url", f"{hub.url}/live/{NAMESPACE}/remote-vae-flux")

    assert result.status == 1
    assert "/encode: 401 UNAUTHORIZED; pass a token" in result.lines[-1]


def test_smoke_rejects_a_wrong_image(hub: Hub, deploy: Runner) -> None:
    deploy("deploy", "--model", "flux", "--access", "public")
    black = io.BytesIO()
    Image.new("RGB", (256, 256)).save(black, "PNG")
    hub.stub_result = black.getvalue()

    result = deploy("smoke", "--model", "flux")

    assert result.status == 1
    assert re.search(r"the decoded image differs from the original: \d\.\d dB, expected 15 dB", result.lines[-1])


def test_a_class_too_new_for_an_endpoint_is_refused(deploy: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the deployment. A server refuses it too, with an older diffusers."""
    monkeypatch.setattr(MODELS["sdxl"], "vae_class", "AutoencoderOfTomorrow")
    monkeypatch.setattr(MODELS["sdxl"], "diffusers", "9.1")
    message = (
        "sdxl cannot run in the stock Inference Toolkit: its AutoencoderOfTomorrow needs diffusers 9.1 or later, and "
        "the toolkit has one before 0.38; IMAGE=... deploys a container image of this project instead, and "
        "`make serve MODEL=sdxl` runs it on a machine of your own"
    )

    for dry_run in ((), ("--dry-run",)):
        refused = deploy("deploy", "--model", "sdxl", *dry_run)
        assert (refused.status, refused.out, refused.lines) == (1, "", [f"error: {message}"])
    others = deploy("deploy", "--all", "--dry-run")
    assert others.status == 0
    assert message in others.lines
    assert "MODEL=sdxl;" not in others.out
    in_image = deploy("deploy", "--all", "--dry-run", "--image", "ghcr.io/ana/remote-vae:0.1.0-cuda")
    assert in_image.status == 0
    assert all("its weights are not on the Hub" in line for line in in_image.lines)
    assert "MODEL=sdxl;" in in_image.out

    with pytest.raises(ValueError, match=r"^sdxl needs diffusers 9\.1 or later, and this is \S+; `pip install"):
        VAE.load(MODELS["sdxl"], "", Settings(model="sdxl", weights="random"), "cpu")
