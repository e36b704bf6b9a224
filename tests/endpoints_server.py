"""Inference Endpoints for the tests: the control plane, and the proxy before each endpoint.

What it does is what the real one was seen to do, or says of itself; the source of each is where it is done:

documentation  huggingface/hf-endpoints-documentation, as of 2026-08
huggingface_hub  its 2.4.0, the mock answers of its tests, and its threads by number
measured  public notes of people who ran the real one in 2026, with times of day
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import requests
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from handlers import MODELS
from scripts.deployment.plan import tag_of

TOOLKIT = Path(__file__).parent / "toolkit"
Script = list[str | tuple[str, str]]
COUNTED = ("pending", "initializing", "updating", "running", "scaledToZero", "updateFailed")
"""States in which an endpoint takes from the quota; paused ones do not (documentation, guides/foundations)."""


@dataclass
class Hardware:
    """A row of `GET /v2/provider/NAMESPACE`, in the form of huggingface_hub's own mock answer."""

    region: str
    instance: str
    size: str
    price: float
    memory: int
    """GB, of all its accelerators together, or of the machine where it has none."""
    accelerators: int = 1
    status: str = "available"
    quota: int = 40
    vendor: str = "aws"

    def described(self, used: int) -> dict[str, Any]:
        gpu = self.instance.startswith("nvidia")
        return {
            "id": f"{self.vendor}-{self.region}-{self.instance}-{self.size}",
            "accelerator": "gpu" if gpu else "cpu",
            "numAccelerators": self.accelerators,
            "numCpus": 7,
            "memoryGb": 30.0 if gpu else float(self.memory),
            "gpuMemoryGb": self.memory if gpu else None,
            "instanceType": self.instance,
            "instanceSize": self.size,
            "architecture": self.instance.title(),
            "status": self.status,
            "pricePerHour": self.price,
            "quota": {"maxAccelerators": self.quota, "usedAccelerators": used},
        }


def offered() -> list[Hardware]:
    """What differs by region: us-west-2 has no T4, the A100 is gone everywhere, eu-west-1 costs more."""
    return [
        Hardware("us-east-1", "intel-spr", "x1", 0.033, 2, quota=60),
        Hardware("us-east-1", "nvidia-t4", "x1", 0.5, 14),
        Hardware("us-east-1", "nvidia-l4", "x1", 0.8, 24),
        Hardware("us-east-1", "nvidia-l4", "x4", 3.8, 96, accelerators=4),
        Hardware("us-east-1", "nvidia-l40s", "x1", 1.8, 48),
        Hardware("us-east-1", "nvidia-a100", "x1", 2.5, 80, status="deprecated"),
        Hardware("eu-west-1", "intel-spr", "x1", 0.04, 2, quota=60),
        Hardware("eu-west-1", "nvidia-l4", "x1", 0.95, 24),
        Hardware("us-west-2", "nvidia-l4", "x1", 0.8, 24, status="not_available"),
        Hardware("us-west-2", "nvidia-h200", "x1", 5.0, 141),
    ]


class Process:
    """The stand-in toolkit over a repository's files in a clean folder, with nothing of the project around it."""

    def __init__(self, files: dict[str, bytes], folder: Path) -> None:
        self.files = files
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder.with_suffix(".log")
        environment = {
            "HF_MODEL_DIR": str(folder),
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
        }
        app = ["webservice_starlette:app", "--app-dir", str(TOOLKIT), "--port", str(port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", *app], cwd=folder, env=environment, stdout=log, stderr=log
            )

    @property
    def state(self) -> tuple[str, str]:
        if self.process.poll() is not None:
            return "failed", self.log.read_text().strip().splitlines()[-1]
        try:
            requests.get(f"{self.url}/health", timeout=2).raise_for_status()
        except requests.RequestException:
            return "initializing", "the container starts"
        return "running", ""

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@dataclass
class Platform(ABC):
    """The state of Inference Endpoints. Tests read and change it directly."""

    folder: Path
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    hardware: list[Hardware] = field(default_factory=offered)
    serve: Literal["stub", "process"] = "stub"
    """An endpoint's container: one that gives back the picture it was sent, or the real files in the toolkit."""
    script: Script = field(default_factory=lambda: ["pending", "initializing", "running"])
    """The states that an endpoint goes through, a look each; the last one stays."""
    deletion: int = 2
    """Looks for which a deleted endpoint is still there."""
    never_sleeps_by: Literal["null", "zero", "nothing"] = "null"
    """What an update takes for "no scale to zero"; no public source tells which."""
    merges_secrets: bool = True
    """Whether secrets that an update does not name stay; no public source tells that either."""
    given_type: str | None = None
    """The type that a new endpoint gets, whatever was asked for."""
    url: str = ""
    pending: dict[str, Script] = field(default_factory=dict)
    deleting: dict[str, int] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    stub_answer: bytes | None = None
    """What the stub decodes to instead of the picture it was sent."""

    # Of the Hub, which is a subclass.

    @abstractmethod
    def who(self, request: Request) -> dict[str, Any] | None: ...

    @abstractmethod
    def member(self, request: Request, namespace: str, write: bool) -> bool: ...

    @abstractmethod
    def files(self, raw: dict[str, Any]) -> dict[str, bytes]: ...

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()

    # The control plane

    async def provider(self, request: Request) -> Response:
        """Regions with prices, status and quota (huggingface_hub, `list_inference_endpoints_hardware`)."""
        namespace = request.path_params["namespace"]
        if not self.member(request, namespace, write=False):
            return JSONResponse({"error": "Forbidden"}, 403)
        vendors: dict[str, dict[str, list]] = {}
        for one in self.hardware:
            computes = vendors.setdefault(one.vendor, {}).setdefault(one.region, [])
            computes.append(one.described(self.used(namespace, one)))
        described = [
            {"name": vendor, "regions": [{"name": name, "computes": computes} for name, computes in regions.items()]}
            for vendor, regions in vendors.items()
        ]
        return JSONResponse({"vendors": described})

    def used(self, namespace: str, hardware: Hardware) -> int:
        """Accelerators that count against the quota: one that has scaled to zero still does (documentation)."""
        return sum(
            hardware.accelerators * raw["compute"]["scaling"]["maxReplica"]
            for key, raw in self.endpoints.items()
            if key.startswith(f"{namespace}/")
            and raw["compute"]["instanceType"] == hardware.instance
            and raw["provider"] == {"vendor": hardware.vendor, "region": hardware.region}
            and raw["status"]["state"] in COUNTED
        )

    async def endpoints_of(self, request: Request) -> Response:
        """Creating one is not idempotent: the second POST of a name is 409, be the first one's answer lost or not."""
        namespace = request.path_params["namespace"]
        if not self.member(request, namespace, write=request.method == "POST"):
            return JSONResponse({"error": "Forbidden"}, 403)
        if request.method == "GET":
            return JSONResponse(
                {"items": [self.public(key) for key in self.endpoints if key.startswith(f"{namespace}/")]}
            )
        body = await request.json()
        key = f"{namespace}/{body['name']}"
        if key in self.endpoints:
            return JSONResponse({"error": "Endpoint name already in use"}, 409)
        if refusal := self.refusal(namespace, body):
            return refusal
        if self.given_type:
            body["type"] = self.given_type
        self.secrets[key] = body["model"].pop("secrets", {})
        by = {"id": "6273f303f6d63a28483fde12", "name": namespace}
        status = {"createdAt": now(), "createdBy": by, "updatedBy": by, "private": None, "targetReplica": 0}
        # A field that was sent as null is left out, as the mock answers of huggingface_hub's tests have it.
        self.endpoints[key] = {**without_nulls(body), "healthRoute": "/health", "status": status}
        self.start(key)
        return JSONResponse(self.public(key))

    def refusal(self, namespace: str, raw: dict[str, Any]) -> Response | None:
        """What does not go together, and an instance that is not there or above the quota."""
        compute, provider = raw["compute"], raw["provider"]
        scaling = compute["scaling"]
        if scaling["minReplica"] and scaling.get("scaleToZeroTimeout") is not None:
            # huggingface_hub #3062 and huggingface/trending-deploy #8 tell of this refusal, not of its words.
            return JSONResponse({"error": "minReplica must be 0 when scaleToZeroTimeout is set"}, 400)
        wanted = (provider["vendor"], provider["region"], compute["instanceType"], compute["instanceSize"])
        found = next((one for one in self.hardware if wanted == (one.vendor, one.region, one.instance, one.size)), None)
        if found is None or found.status not in ("available", "low_availability"):
            return JSONResponse({"error": f"Compute {'-'.join(wanted)} is not available"}, 400)
        if self.used(namespace, found) + found.accelerators > found.quota:
            return JSONResponse({"error": f"Quota exceeded for {found.instance}"}, 403)
        return None

    async def endpoint(self, request: Request) -> Response:
        namespace = request.path_params["namespace"]
        key = f"{namespace}/{request.path_params['name']}"
        if not self.member(request, namespace, write=request.method != "GET"):
            return JSONResponse({"error": "Forbidden"}, 403)
        self.forget(key)
        if key not in self.endpoints:
            return JSONResponse({"error": "Endpoint not found"}, 404)
        if request.method == "GET":
            await run_in_threadpool(self.look, key)
        elif request.method == "DELETE":
            # 200 with no body (huggingface_hub reads none); the endpoint is there for a while yet.
            self.deleting.setdefault(key, self.deletion)
            self.pending[key] = []
            self.halt(key)
            self.forget(key)
            return Response(status_code=200)
        else:
            return self.update(key, await request.json())
        return JSONResponse(self.public(key))

    def update(self, key: str, changes: dict[str, Any]) -> Response:
        """Fields that are not named stay, which is why huggingface_hub's update, sending no null, cannot unset one."""
        updated = json.loads(json.dumps(self.endpoints[key]))
        secrets = changes.get("model", {}).pop("secrets", None)
        scaling = changes.get("compute", {}).get("scaling", {})
        never = {"null": None, "zero": 0}
        if (
            "scaleToZeroTimeout" in scaling
            and self.never_sleeps_by in never
            and scaling["scaleToZeroTimeout"] == never[self.never_sleeps_by]
        ):
            del scaling["scaleToZeroTimeout"]
            updated["compute"]["scaling"].pop("scaleToZeroTimeout", None)
        if scaling.get("scaleToZeroTimeout") == 0:
            return JSONResponse({"error": "scaleToZeroTimeout must be at least 1"}, 400)
        merge(updated, without_nulls(changes))
        scaling = updated["compute"]["scaling"]
        if scaling["minReplica"] and scaling.get("scaleToZeroTimeout") is not None:
            return JSONResponse({"error": "minReplica must be 0 when scaleToZeroTimeout is set"}, 400)
        if secrets is not None:
            kept = self.secrets[key] if self.merges_secrets else {}
            self.secrets[key] = {name: value for name, value in {**kept, **secrets}.items() if value is not None}
        self.endpoints[key] = updated
        if updated["status"]["state"] != "paused":
            self.start(key, "updating")  # about 50 s of 503s at the proxy (measured)
        return JSONResponse(self.public(key))

    def forget(self, key: str) -> None:
        """One look less at an endpoint that was deleted."""
        if key in self.deleting:
            self.deleting[key] -= 1
            if self.deleting[key] < 0:
                del self.deleting[key], self.endpoints[key]

    async def action(self, request: Request) -> Response:
        namespace = request.path_params["namespace"]
        key = f"{namespace}/{request.path_params['name']}"
        if not self.member(request, namespace, write=True):
            return JSONResponse({"error": "Forbidden"}, 403)
        if key not in self.endpoints:
            return JSONResponse({"error": "Endpoint not found"}, 404)
        status = self.endpoints[key]["status"]
        if request.path_params["action"] == "pause":
            self.pending.pop(key, None)
            status |= {"state": "paused", "message": "", "readyReplica": 0, "updatedAt": now()}
        elif status["state"] == "running":
            # huggingface_hub takes exactly this for success (its `resume_inference_endpoint`, and #2335)
            return JSONResponse({"error": "Endpoint is already running"}, 400)
        else:
            self.start(key)
        return JSONResponse(self.public(key))

    def public(self, key: str) -> dict[str, Any]:
        """The API's description of an endpoint: of secrets the names alone."""
        raw = json.loads(json.dumps(self.endpoints[key]))
        if self.secrets.get(key):
            raw["model"]["secrets"] = dict.fromkeys(self.secrets[key], "")
        return raw

    def start(self, key: str, *first: str) -> None:
        """Begins a deployment of the endpoint's pinned revision. A process that runs it already is kept, for speed."""
        raw = self.endpoints[key]
        self.pending[key] = [*first, *self.script]
        if self.serve == "process" and (key not in self.processes or self.processes[key].files != self.files(raw)):
            self.halt(key)
            self.processes[key] = Process(self.files(raw), Path(self.folder, uuid.uuid4().hex))
        raw["status"] |= {"url": f"{self.url}/live/{key}", "updatedAt": now()}
        self.look(key)

    def look(self, key: str) -> None:
        """One step on in the endpoint's states."""
        status, steps = self.endpoints[key]["status"], self.pending.get(key)
        if steps:
            step = steps.pop(0)
            state, message = (step, "") if isinstance(step, str) else step
            if state == "running" and key in self.processes:
                state, message = self.processes[key].state
                if state == "initializing":
                    steps.insert(0, step)
            status |= {"state": state, "message": message, "readyReplica": int(state == "running")}

    def halt(self, key: str) -> None:
        if process := self.processes.pop(key, None):
            process.stop()

    # The proxy

    def stranger(self, request: Request, raw: dict[str, Any], namespace: str) -> Response | None:
        """The proxy's answers to who may not call, in its own words (measured).

        No token, an empty one and an unknown one are 401; a token without the permission to call endpoints is 403.
        Whether a `private` endpoint is reached at all differs between sources; here it is, with a member's token.
        """
        if raw["type"] == "public":
            return None
        who = self.who(request)
        if who is None:
            return JSONResponse({"error": "UNAUTHORIZED"}, 401)
        token = ((who.get("auth") or {}).get("accessToken")) or {}
        rules = (token.get("fineGrained") or {}).get("scoped", [])
        granted = [name for rule in rules if rule["entity"]["name"] == namespace for name in rule["permissions"]]
        if token.get("role") == "fineGrained" and "inference.endpoints.infer.write" not in granted:
            return JSONResponse({"error": "missing permissions: inference.endpoints.infer.write"}, 403)
        if raw["type"] == "private" and not self.member(request, namespace, write=False):
            return JSONResponse({"error": "FORBIDDEN"}, 403)
        return None

    async def live(self, request: Request) -> Response:
        """Access, replicas that sleep, and the container behind. While an update rolls out it answers 503."""
        namespace = request.path_params["namespace"]
        key = f"{namespace}/{request.path_params['name']}"
        raw = self.endpoints.get(key)
        if raw is None or key in self.deleting:
            return PlainTextResponse("", 404)
        if refusal := self.stranger(request, raw, namespace):
            return refusal
        status = raw["status"]
        if status["state"] == "paused":
            return JSONResponse({"error": "Bad Request: Invalid state: endpoint is paused"}, 400)
        if status["state"] == "scaledToZero" and "x-scale-up-timeout" in request.headers:
            status |= {"state": "running", "readyReplica": 1}
        if status["state"] != "running":
            return JSONResponse({"error": "503 Service Unavailable"}, 503)
        body = await request.body()
        if key in self.processes:
            return await run_in_threadpool(self.forward, key, request, body)
        return self.stub(key, request, body)

    def forward(self, key: str, request: Request, body: bytes) -> Response:
        url = f"{self.processes[key].url}/{request.path_params.get('path', '')}?{request.url.query}"
        headers = {name: request.headers[name] for name in ("content-type", "accept") if name in request.headers}
        answer = requests.request(request.method, url, data=body, headers=headers, timeout=60)
        skipped = ("content-length", "content-encoding", "transfer-encoding", "connection", "server", "date")
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in skipped}
        return Response(answer.content, answer.status_code, kept)

    def stub(self, key: str, request: Request, body: bytes) -> Response:
        tags = self.endpoints[key]["tags"]
        *folder, action = request.path_params.get("path", "").split("/")
        tag = folder[0] if folder else next(tag for tag in tags if tag != "remote-vae")
        video = any(model.kind == "video" for name, model in MODELS.items() if tag_of(name) == tag)
        if action != "decode":
            self.pictures[key] = body
            shape = [1, 4, 1, 4, 4] if video else [1, 4, 4, 4]
            headers = {"shape": json.dumps(shape), "dtype": "float16"}
            return Response(bytes(128), media_type="tensor/binary", headers=headers)
        if video:
            return Response(b"\x00\x00\x00\x18ftypisom....moov", media_type="video/mp4")
        return Response(self.stub_answer or self.pictures[key], media_type="image/png")

    def endpoint_routes(self) -> list[Route]:
        endpoint = "/v2/endpoint/{namespace}/{name}"
        return [
            Route("/v2/provider/{namespace}", self.provider),
            Route("/v2/endpoint/{namespace}", self.endpoints_of, methods=["GET", "POST"]),
            Route(endpoint, self.endpoint, methods=["GET", "PUT", "DELETE"]),
            Route(f"{endpoint}/{{action}}", self.action, methods=["POST"]),
            Route("/live/{namespace}/{name}/{path:path}", self.live, methods=["GET", "POST"]),
            Route("/live/{namespace}/{name}", self.live, methods=["GET", "POST"]),
        ]


def now() -> str:
    """With nanoseconds, as the API has it."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}078Z"


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return value


def merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
