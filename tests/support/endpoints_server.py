"""A local server with the API of Inference Endpoints for the tests: the control plane, and the proxy of each endpoint.

It behaves as the real platform was observed or documented. Comments name the sources:

documentation  huggingface/hf-endpoints-documentation, as of 2026-08
huggingface_hub  version 2.4.0, the mock responses of its tests, and its issues by number
measured  public notes of people who ran the real platform in 2026
"""

from __future__ import annotations

import json
import os
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
from scripts.deployment.plan import model_tag
from scripts.local_server import ROOT, free_port
from tests.support import forked

TOOLKIT = Path(__file__).parent / "toolkit"
Script = list[str | tuple[str, str]]
COUNTED = ("pending", "initializing", "updating", "running", "scaledToZero", "updateFailed")
"""States that count against the quota. Paused endpoints do not count (documentation, guides/foundations)."""


@dataclass
class Hardware:
    """A row of `GET /v2/provider/NAMESPACE`, as in huggingface_hub's own mock response."""

    region: str
    instance: str
    size: str
    price: float
    memory: int
    """GB of all accelerators, or of the computer if it has none."""
    accelerators: int = 1
    status: str = "available"
    quota: int = 40
    vendor: str = "aws"

    def describe(self, used: int) -> dict[str, Any]:
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


def default_hardware() -> list[Hardware]:
    """Return hardware that differs by region: us-west-2 has no T4, no region has the A100, eu-west-1 costs more."""
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
    """The container of an endpoint, with the repository's files in a clean folder.

    It is the stand-in toolkit, which has no other files of the project, or the command of the project's own image.
    """

    def __init__(self, files: dict[str, bytes], folder: Path, image: dict[str, Any] | None) -> None:
        self.files, self.image = files, image
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder.with_suffix(".log")
        environment = {
            "HF_MODEL_DIR": str(folder),
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VAE_FAST": "0",  # its check takes long
        }
        app = ["webservice_starlette:app", "--app-dir", str(TOOLKIT), "--port", str(port)]
        command, cwd = ["-m", "uvicorn", *app], folder
        if image:  # the repository is at /repository, and the port is the image's own
            environment |= {"VAE_REPOSITORY": str(folder), "HOST": "127.0.0.1", "PORT": str(port)}
            command, cwd = ["-m", "scripts.serve"], ROOT
        self.process = forked.Process(command, environment, self.log, self.log, cwd)

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
        self.process.wait(timeout=30)


@dataclass
class Platform(ABC):
    """The state of Inference Endpoints. Tests read and change it directly."""

    folder: Path
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    hardware: list[Hardware] = field(default_factory=default_hardware)
    serves: bool = False
    """True if the container runs the real files in the toolkit. A stub returns the image that it was sent."""
    script: Script = field(default_factory=lambda: ["pending", "initializing", "running"])
    """The states of an endpoint, one for each poll. The last state stays."""
    deletion: int = 2
    """Polls for which a deleted endpoint still exists."""
    never_sleeps_by: Literal["null", "zero", "nothing"] = "null"
    """The value for "no scale to zero" in an update; no public source has it."""
    forced_type: str | None = None
    """The type of every new endpoint, instead of the requested one."""
    url: str = ""
    pending: dict[str, Script] = field(default_factory=dict)
    deleting: dict[str, int] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    images: dict[str, bytes] = field(default_factory=dict)
    stub_result: bytes | None = None
    """The result of the stub's decode, instead of the image that it was sent."""

    # Methods of the Hub, which is a subclass

    @abstractmethod
    def who(self, request: Request) -> dict[str, Any] | None: ...

    @abstractmethod
    def member(self, request: Request, namespace: str, write: bool) -> bool: ...

    @abstractmethod
    def files(self, raw: dict[str, Any]) -> dict[str, bytes]: ...

    def serve_files(self) -> None:
        """Set `serves`, once the process that is forked has its imports. A request would wait for them."""
        forked.run("-c", "")
        self.serves = True

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()

    # The control plane

    async def provider(self, request: Request) -> Response:
        """List regions with prices, status and quota (huggingface_hub, `list_inference_endpoints_hardware`)."""
        namespace = request.path_params["namespace"]
        if not self.member(request, namespace, write=False):
            return JSONResponse({"error": "Forbidden"}, 403)
        vendors: dict[str, dict[str, list]] = {}
        for hardware in self.hardware:
            computes = vendors.setdefault(hardware.vendor, {}).setdefault(hardware.region, [])
            computes.append(hardware.describe(self.used(namespace, hardware)))
        described = [
            {"name": vendor, "regions": [{"name": name, "computes": computes} for name, computes in regions.items()]}
            for vendor, regions in vendors.items()
        ]
        return JSONResponse({"vendors": described})

    def used(self, namespace: str, hardware: Hardware) -> int:
        """Count the accelerators against the quota. Endpoints that have scaled to zero count too (documentation)."""
        return sum(
            hardware.accelerators * raw["compute"]["scaling"]["maxReplica"]
            for key, raw in self.endpoints.items()
            if key.startswith(f"{namespace}/")
            and raw["compute"]["instanceType"] == hardware.instance
            and raw["provider"] == {"vendor": hardware.vendor, "region": hardware.region}
            and raw["status"]["state"] in COUNTED
        )

    async def namespace_endpoints(self, request: Request) -> Response:
        """List or create endpoints. A second POST of a name is 409, even if the first response was lost."""
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
        if self.forced_type:
            body["type"] = self.forced_type
        by = {"id": "6273f303f6d63a28483fde12", "name": namespace}
        status = {"createdAt": now(), "createdBy": by, "updatedBy": by, "private": None, "targetReplica": 0}
        # A null field is left out, as in the mock responses of huggingface_hub's tests.
        self.endpoints[key] = {**without_nulls(body), "healthRoute": "/health", "status": status}
        self.start(key)
        return JSONResponse(self.public(key))

    def refusal(self, namespace: str, raw: dict[str, Any]) -> Response | None:
        """Return the response to settings that exclude each other, or to hardware that is unavailable or over quota."""
        compute, provider = raw["compute"], raw["provider"]
        scaling = compute["scaling"]
        if scaling["minReplica"] and scaling.get("scaleToZeroTimeout") is not None:
            # huggingface_hub #3062 and huggingface/trending-deploy #8 mention this refusal without its text.
            return JSONResponse({"error": "minReplica must be 0 when scaleToZeroTimeout is set"}, 400)
        wanted = (provider["vendor"], provider["region"], compute["instanceType"], compute["instanceSize"])
        offers = {(each.vendor, each.region, each.instance, each.size): each for each in self.hardware}
        hardware = offers.get(wanted)
        if hardware is None or hardware.status not in ("available", "low_availability"):
            return JSONResponse({"error": f"Compute {'-'.join(wanted)} is not available"}, 400)
        if self.used(namespace, hardware) + hardware.accelerators > hardware.quota:
            return JSONResponse({"error": f"Quota exceeded for {hardware.instance}"}, 403)
        return None

    async def endpoint(self, request: Request) -> Response:
        namespace = request.path_params["namespace"]
        key = f"{namespace}/{request.path_params['name']}"
        if not self.member(request, namespace, write=request.method != "GET"):
            return JSONResponse({"error": "Forbidden"}, 403)
        self.advance_deletion(key)
        if key not in self.endpoints:
            return JSONResponse({"error": "Endpoint not found"}, 404)
        if request.method == "GET":
            await run_in_threadpool(self.advance, key)
        elif request.method == "DELETE":
            # 200 without a body (huggingface_hub reads none). The endpoint exists a little longer.
            self.deleting.setdefault(key, self.deletion)
            self.pending[key] = []
            self.halt(key)
            self.advance_deletion(key)
            return Response(status_code=200)
        else:
            return self.update(key, await request.json())
        return JSONResponse(self.public(key))

    def update(self, key: str, changes: dict[str, Any]) -> Response:
        """Update the named fields. huggingface_hub's update sends no null, so it cannot unset a field."""
        updated = json.loads(json.dumps(self.endpoints[key]))
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
        self.endpoints[key] = updated
        if updated["status"]["state"] != "paused":
            self.start(key, "updating")  # about 50 s of 503s at the proxy (measured)
        return JSONResponse(self.public(key))

    def advance_deletion(self, key: str) -> None:
        """Count one poll of a deleted endpoint."""
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
            # huggingface_hub takes exactly this as success (`resume_inference_endpoint`, #2335)
            return JSONResponse({"error": "Endpoint is already running"}, 400)
        else:
            self.start(key)
        return JSONResponse(self.public(key))

    def public(self, key: str) -> dict[str, Any]:
        """Return the API's description of an endpoint."""
        return json.loads(json.dumps(self.endpoints[key]))

    def start(self, key: str, *first: str) -> None:
        """Start a deployment of the endpoint's pinned revision. A process that already runs it is kept, for speed."""
        raw = self.endpoints[key]
        self.pending[key] = [*first, *self.script]
        if self.serves:
            container = (self.files(raw), raw["model"]["image"].get("custom"))
            if key not in self.processes or (self.processes[key].files, self.processes[key].image) != container:
                self.halt(key)
                folder = Path(self.folder, uuid.uuid4().hex)
                self.processes[key] = Process(container[0], folder, container[1])
        raw["status"] |= {"url": f"{self.url}/live/{key}", "updatedAt": now()}
        self.advance(key)

    def advance(self, key: str) -> None:
        """Move the endpoint to its next state."""
        status, states = self.endpoints[key]["status"], self.pending.get(key)
        if states:
            following = states.pop(0)
            state, message = (following, "") if isinstance(following, str) else following
            if state == "running" and key in self.processes:
                state, message = self.processes[key].state
                if state == "initializing":
                    states.insert(0, following)
            status |= {"state": state, "message": message, "readyReplica": int(state == "running")}

    def halt(self, key: str) -> None:
        if process := self.processes.pop(key, None):
            process.stop()

    # The proxy

    def refuse_caller(self, request: Request, raw: dict[str, Any], namespace: str) -> Response | None:
        """Return the proxy's response to a caller without access, in its own words (measured).

        No token, an empty one and an unknown one are 401; a token without the permission to call endpoints is 403.
        Sources differ on whether a `private` endpoint is reachable. Here a member's token reaches it.
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
        """Check the access, wake the endpoint, and call its container. During an update the response is 503."""
        namespace = request.path_params["namespace"]
        key = f"{namespace}/{request.path_params['name']}"
        raw = self.endpoints.get(key)
        if raw is None or key in self.deleting:
            return PlainTextResponse("", 404)
        if refusal := self.refuse_caller(request, raw, namespace):
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
        response = requests.request(request.method, url, data=body, headers=headers, timeout=60)
        skipped = ("content-length", "content-encoding", "transfer-encoding", "connection", "server", "date")
        headers = {name: value for name, value in response.headers.items() if name.lower() not in skipped}
        return Response(response.content, response.status_code, headers)

    def stub(self, key: str, request: Request, body: bytes) -> Response:
        tags = self.endpoints[key]["tags"]
        *folder, action = request.path_params.get("path", "").split("/")
        tag = folder[0] if folder else next(tag for tag in tags if tag != "remote-vae")
        is_video = any(model.kind == "video" for name, model in MODELS.items() if model_tag(name) == tag)
        if action != "decode":
            self.images[key] = body
            shape = [1, 4, 1, 4, 4] if is_video else [1, 4, 4, 4]
            headers = {"shape": json.dumps(shape), "dtype": "float16"}
            return Response(bytes(128), media_type="tensor/binary", headers=headers)
        if is_video:
            return Response(b"\x00\x00\x00\x18ftypisom....moov", media_type="video/mp4")
        return Response(self.stub_result or self.images[key], media_type="image/png")

    def endpoint_routes(self) -> list[Route]:
        endpoint = "/v2/endpoint/{namespace}/{name}"
        return [
            Route("/v2/provider/{namespace}", self.provider),
            Route("/v2/endpoint/{namespace}", self.namespace_endpoints, methods=["GET", "POST"]),
            Route(endpoint, self.endpoint, methods=["GET", "PUT", "DELETE"]),
            Route(f"{endpoint}/{{action}}", self.action, methods=["POST"]),
            Route("/live/{namespace}/{name}/{path:path}", self.live, methods=["GET", "POST"]),
            Route("/live/{namespace}/{name}", self.live, methods=["GET", "POST"]),
        ]


def now() -> str:
    """Return the time with nanoseconds, as in the API."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}078Z"


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
