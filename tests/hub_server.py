"""A Hugging Face of its own for the tests: the routes of the Hub and of Inference Endpoints that deploying needs.

It keeps state: repositories with commits, endpoints whose state progresses at each look. Where `serve` is "process", an
endpoint is the real thing: the stand-in toolkit runs the repository's `handler.py` from a clean folder. Else a stub
gives back the picture that it was sent. Faults are injected with `fail` and `drop`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import requests
import uvicorn
from huggingface_hub.utils.sha import git_hash
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from handlers import MODELS
from scripts.deployment.plan import tag_of

TOOLKIT = Path(__file__).parent / "toolkit"
NOW = "2026-11-21T06:00:00.000Z"
NO_REPOSITORY = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
Script = list[str | tuple[str, str]]


def identity(name: str, role: str = "write", orgs: dict[str, str] | None = None, **fine_grained: Any) -> dict[str, Any]:
    """What whoami says of a token. `orgs` are names and roles; `fine_grained` are its rules."""
    token = {"displayName": "test", "role": role, **({"fineGrained": fine_grained} if fine_grained else {})}
    members = [{"type": "org", "name": org, "roleInOrg": rank} for org, rank in (orgs or {}).items()]
    return {"type": "user", "name": name, "orgs": members, "auth": {"type": "access_token", "accessToken": token}}


@dataclass
class Repo:
    """A model repository: its commits, newest last, each a map of path to content."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        return {path: content for path, content in self.commits[-1][1].items() if path != ".gitattributes"}


@dataclass
class Fault:
    method: str
    path: str
    times: int
    answer: Response | None
    """None drops the connection in the middle of the request's body."""


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
class Hub:
    """The server's state. Tests read and change it directly."""

    folder: Path
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    serve: Literal["stub", "process"] = "stub"
    script: Script = field(default_factory=lambda: ["pending", "initializing", "running"])
    """The states that an endpoint goes through, a look each; the last one stays."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    url: str = ""
    pending: dict[str, Script] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    stub_answer: bytes | None = None
    """What the stub decodes to instead of the picture it was sent."""

    def fail(
        self,
        method: str,
        path: str,
        status: int,
        error: str = "",
        times: int = 1000,
        headers: dict[str, str] | None = None,
    ) -> None:
        """The next `times` requests that match get this answer. A `Retry-After` keeps the tests fast."""
        answer = JSONResponse({"error": error}, status, {"Retry-After": "0", **(headers or {})})
        self.faults.append(Fault(method, path, times, answer))

    def drop(self, method: str, path: str, times: int = 1000) -> None:
        self.faults.append(Fault(method, path, times, None))

    def sent(self, pattern: str) -> list[str]:
        """The requests so far, as "METHOD path", that match."""
        lines = [f"{method} {path}" for method, path in self.requests]
        return [line for line in lines if re.search(pattern, line)]

    def changes(self) -> list[str]:
        """The requests so far that could change something."""
        reads = re.compile(r"^(GET|HEAD)|validate-yaml|/live/")
        return [f"{method} {path}" for method, path in self.requests if not reads.search(f"{method} {path}")]

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()

    # The Hub

    def member(self, request: Request, namespace: str, write: bool) -> bool:
        """Whether the request's token may read, or write, private things of this namespace."""
        who = self.who(request)
        if who is None:
            return False
        roles = {who["name"]: "admin"} | {org["name"]: org["roleInOrg"] for org in who["orgs"]}
        token = who["auth"]["accessToken"]
        return namespace in roles and not (write and (roles[namespace] == "read" or token["role"] == "read"))

    def who(self, request: Request) -> dict[str, Any] | None:
        return self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))

    async def whoami(self, request: Request) -> Response:
        who = self.who(request)
        if who is None:
            return JSONResponse({"error": "Invalid credentials in Authorization header"}, 401)
        return JSONResponse(who)

    def readable(self, request: Request) -> Repo | None:
        repo = self.repos.get(request.path_params["repo"])
        if repo and repo.private and not self.member(request, request.path_params["repo"].split("/")[0], write=False):
            return None
        return repo

    def may_open(self, request: Request, repo: Repo) -> bool:
        return not repo.gated or bool((self.who(request) or {}).get("accepted"))

    async def repo_info(self, request: Request) -> Response:
        repo = self.readable(request)
        if repo is None:
            return JSONResponse({"error": "Repository not found"}, 404, NO_REPOSITORY)
        sha, files = repo.at(request.path_params.get("revision", "main"))
        siblings = [describe_file(path, content) for path, content in files.items()]
        return JSONResponse(
            {
                "_id": "1",
                "id": request.path_params["repo"],
                "modelId": request.path_params["repo"],
                "sha": sha,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "tags": [],
                "siblings": siblings,
            }
        )

    async def auth_check(self, request: Request) -> Response:
        repo = self.readable(request)
        if repo is None:
            return JSONResponse({"error": "Repository not found"}, 404, NO_REPOSITORY)
        return PlainTextResponse("OK") if self.may_open(request, repo) else gated()

    async def create_repo(self, request: Request) -> Response:
        body = await request.json()
        namespace = body.get("organization") or self.who(request)["name"]
        repo = f"{namespace}/{body['name']}"
        if not self.member(request, namespace, write=True):
            return JSONResponse({"error": f"You don't have the rights to create a model under {namespace}"}, 403)
        if repo in self.repos:
            return JSONResponse({"error": "You already created this model repo", "url": f"{self.url}/{repo}"}, 409)
        self.repos[repo] = Repo(private=body.get("private") is True or body.get("visibility") == "private")
        self.repos[repo].commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return JSONResponse({"url": f"{self.url}/{repo}"})

    async def delete_repo(self, request: Request) -> Response:
        body = await request.json()
        namespace = body.get("organization") or self.who(request)["name"]
        if not self.member(request, namespace, write=True):
            return JSONResponse({"error": "Forbidden"}, 403)
        del self.repos[f"{namespace}/{body['name']}"]
        return PlainTextResponse("OK")

    async def validate_yaml(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request: Request) -> Response:
        files = self.repos[request.path_params["repo"]].commits[-1][1]

        def describe(path: str) -> dict[str, Any]:
            described = describe_file(path, files[path]) if path in files else {}
            oid = described.get("lfs", {}).get("sha256") or described.get("blobId")
            mode = "lfs" if is_lfs(path) else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return JSONResponse({"files": [describe(file["path"]) for file in (await request.json())["files"]]})

    async def lfs_batch(self, request: Request) -> Response:
        def describe(oid: str, size: int) -> dict[str, Any]:
            upload = {"upload": {"href": f"{self.url}/lfs/{oid}", "header": {}}}
            return {"oid": oid, "size": size, **({} if oid in self.lfs else {"actions": upload})}

        objects = (await request.json())["objects"]
        return JSONResponse({"transfer": "basic", "objects": [describe(one["oid"], one["size"]) for one in objects]})

    async def lfs_upload(self, request: Request) -> Response:
        body = await request.body()
        assert hashlib.sha256(body).hexdigest() == request.path_params["oid"]
        self.lfs[request.path_params["oid"]] = body
        return PlainTextResponse("OK")

    async def commit(self, request: Request) -> Response:
        name = request.path_params["repo"]
        repo = self.repos.get(name)
        if repo is None or not self.member(request, name.split("/")[0], write=True):
            return JSONResponse({"error": "Forbidden"}, 403)
        files = dict(repo.commits[-1][1])
        for line in (await request.body()).splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        return JSONResponse({"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha})

    async def resolve(self, request: Request) -> Response:
        repo = self.readable(request)
        if repo is None:
            return JSONResponse({"error": "Repository not found"}, 404, NO_REPOSITORY)
        if not self.may_open(request, repo):
            return gated()
        sha, files = repo.at(request.path_params["revision"])
        content = files.get(request.path_params["path"])
        if content is None:
            return JSONResponse({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha}
        return Response(content, media_type="application/octet-stream", headers=headers)

    # Inference Endpoints

    async def endpoints_of(self, request: Request) -> Response:
        namespace = request.path_params["namespace"]
        if not self.member(request, namespace, write=request.method == "POST"):
            return JSONResponse({"error": "Forbidden"}, 403)
        if request.method == "GET":
            return JSONResponse(
                {"items": [raw for key, raw in self.endpoints.items() if key.startswith(f"{namespace}/")]}
            )
        body = await request.json()
        key = f"{namespace}/{body['name']}"
        if key in self.endpoints:
            return JSONResponse({"error": "Endpoint name already in use"}, 409)
        self.endpoints[key] = {**body, "healthRoute": "/health", "status": {"createdAt": NOW, "updatedAt": NOW}}
        self.start(key)
        return JSONResponse(self.public(key))

    async def endpoint(self, request: Request) -> Response:
        namespace, key = (
            request.path_params["namespace"],
            f"{request.path_params['namespace']}/{request.path_params['name']}",
        )
        if not self.member(request, namespace, write=request.method != "GET"):
            return JSONResponse({"error": "Forbidden"}, 403)
        if key not in self.endpoints:
            return JSONResponse({"error": "Endpoint not found"}, 404)
        if request.method == "GET":
            await run_in_threadpool(self.look, key)
        elif request.method == "DELETE":
            self.halt(key)
            del self.endpoints[key]
            return Response(status_code=202)
        else:
            merge(self.endpoints[key], await request.json())
            if self.endpoints[key]["status"]["state"] != "paused":
                self.start(key)
        return JSONResponse(self.public(key))

    async def action(self, request: Request) -> Response:
        key = f"{request.path_params['namespace']}/{request.path_params['name']}"
        if request.path_params["action"] == "pause":
            self.pending.pop(key, None)
            self.endpoints[key]["status"] |= {"state": "paused", "message": "", "readyReplica": 0}
        else:
            self.start(key)
        return JSONResponse(self.public(key))

    def public(self, key: str) -> dict[str, Any]:
        """The API's description of an endpoint: secrets by name alone."""
        raw = json.loads(json.dumps(self.endpoints[key]))
        if "secrets" in raw["model"]:
            raw["model"]["secrets"] = dict.fromkeys(raw["model"]["secrets"], "")
        return raw

    def start(self, key: str) -> None:
        """Begins a deployment of the endpoint's pinned revision. A process that runs it already is kept, for speed."""
        raw = self.endpoints[key]
        self.pending[key] = list(self.script)
        if self.serve == "process" and (key not in self.processes or self.processes[key].files != self.files(raw)):
            self.halt(key)
            self.processes[key] = Process(self.files(raw), Path(self.folder, uuid.uuid4().hex))
        raw["status"] |= {"url": f"{self.url}/live/{key}", "updatedAt": f"2026-11-21T{time.strftime('%H:%M:%S')}.000Z"}
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

    def files(self, raw: dict[str, Any]) -> dict[str, bytes]:
        return self.repos[raw["model"]["repository"]].at(raw["model"]["revision"])[1]

    def halt(self, key: str) -> None:
        if process := self.processes.pop(key, None):
            process.stop()

    async def live(self, request: Request) -> Response:
        """The platform's proxy before an endpoint: access, replicas that sleep, and the container behind."""
        key = f"{request.path_params['namespace']}/{request.path_params['name']}"
        raw = self.endpoints.get(key)
        if raw is None:
            return PlainTextResponse("", 404)
        if raw["type"] != "public" and self.who(request) is None:
            return JSONResponse({"error": "Unauthorized"}, 401)
        if raw["status"]["state"] == "scaledToZero" and "x-scale-up-timeout" in request.headers:
            raw["status"] |= {"state": "running", "readyReplica": 1}
        if raw["status"]["state"] != "running":
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
        tag = self.endpoints[key]["tags"][1]
        video = any(model.kind == "video" for name, model in MODELS.items() if tag_of(name) == tag)
        if request.path_params.get("path") != "decode":
            self.pictures[key] = body
            shape = [1, 4, 1, 4, 4] if video else [1, 4, 4, 4]
            headers = {"shape": json.dumps(shape), "dtype": "float16"}
            return Response(bytes(128), media_type="tensor/binary", headers=headers)
        if video:
            return Response(b"\x00\x00\x00\x18ftypisom", media_type="video/mp4")
        return Response(self.stub_answer or self.pictures[key], media_type="image/png")

    def app(self) -> Starlette:
        repo, endpoint = "{repo:path}", "/v2/endpoint/{namespace}/{name}"
        return Starlette(
            routes=[
                Route("/api/whoami-v2", self.whoami),
                Route("/api/repos/create", self.create_repo, methods=["POST"]),
                Route("/api/repos/delete", self.delete_repo, methods=["DELETE"]),
                Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
                Route(f"/api/models/{repo}/auth-check", self.auth_check),
                Route(f"/api/models/{repo}/preupload/{{revision}}", self.preupload, methods=["POST"]),
                Route(f"/api/models/{repo}/commit/{{revision}}", self.commit, methods=["POST"]),
                Route(f"/api/models/{repo}/revision/{{revision}}", self.repo_info),
                Route(f"/api/models/{repo}", self.repo_info),
                Route(f"/{repo}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]),
                Route("/lfs/{oid}", self.lfs_upload, methods=["PUT"]),
                Route(f"/{repo}/resolve/{{revision}}/{{path:path}}", self.resolve),
                Route("/v2/endpoint/{namespace}", self.endpoints_of, methods=["GET", "POST"]),
                Route(endpoint, self.endpoint, methods=["GET", "PUT", "DELETE"]),
                Route(f"{endpoint}/{{action}}", self.action, methods=["POST"]),
                Route("/live/{namespace}/{name}/{path:path}", self.live, methods=["GET", "POST"]),
                Route("/live/{namespace}/{name}", self.live, methods=["GET", "POST"]),
            ]
        )

    def with_faults(self, app: Starlette) -> Callable[..., Awaitable[None]]:
        """The app behind a record of its requests and the injected faults."""

        async def run(scope: dict[str, Any], receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            method, path = scope["method"], scope["path"]
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    if fault.answer is None:
                        await receive()
                        send.__self__.transport.abort()
                        return None
                    return await fault.answer(scope, receive, send)
            return await app(scope, receive, send)

        return run


def describe_file(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub's API describes it."""
    described = {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
    if is_lfs(path):
        described["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return described


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def gated() -> Response:
    return JSONResponse({"error": "Access to this model is restricted"}, 403, {"X-Error-Code": "GatedRepo"})


def merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


@contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    """A hub that answers at `hub.url`."""
    hub = Hub(folder)
    app = hub.with_faults(hub.app())
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", http="h11")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield hub
    finally:
        hub.stop()
        server.should_exit = True
        thread.join()
