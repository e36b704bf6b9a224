"""A local Hub for the tests, with the API that deploying needs. `endpoints_server.py` has Inference Endpoints.

It keeps repositories with commits, and endpoints. `fail`, `drop` and `interrupt` inject faults, before or after the
work of a request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from huggingface_hub.utils.sha import git_hash
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests.support import forked
from tests.support.endpoints_server import Platform

NO_REPOSITORY = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}


def identity(name: str, role: str = "write", orgs: dict[str, str] | None = None, **fine_grained: Any) -> dict[str, Any]:
    """Return the whoami of a token. `orgs` are names and roles; `fine_grained` are its rules."""
    token = {"displayName": "test", "role": role, **({"fineGrained": fine_grained} if fine_grained else {})}
    members = [{"type": "org", "name": org, "roleInOrg": rank} for org, rank in (orgs or {}).items()]
    return {"type": "user", "name": name, "orgs": members, "auth": {"type": "access_token", "accessToken": token}}


@dataclass
class Repo:
    """A model repository: its commits, the newest last. Each is a map of path to content."""

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
    """A fault for the requests that match."""

    method: str
    path: str
    times: int
    response: Response | None
    """None drops the connection."""
    after: bool = False
    """True if the work of the request is done before the fault."""
    endpoint_exists: bool | None = None
    """True if an endpoint must exist, False if it must not; None for either."""
    interrupts: bool = False
    """True to press Ctrl-C in this process and drop the connection."""


@dataclass
class Hub(Platform):
    """The server's state. Tests read and change it directly."""

    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    full: str = ""
    """The Hub's message for a namespace without free storage; "" for one with storage."""
    storage: str = ""
    """Address of the Xet storage server; default: this one."""
    elsewhere: set[str] = field(default_factory=set)
    """Repositories in another storage region, whose files cannot be copied."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def fail(
        self,
        method: str,
        path: str,
        status: int,
        error: str = "",
        times: int = 1000,
        headers: dict[str, str] | None = None,
        **when: bool,
    ) -> None:
        """Let the next `times` requests that match get this response. `when` are fields of `Fault`."""
        self.faults.append(Fault(method, path, times, JSONResponse({"error": error}, status, headers), **when))

    def drop(self, method: str, path: str, times: int = 1000, **when: bool) -> None:
        self.faults.append(Fault(method, path, times, None, **when))

    def interrupt(self, method: str, path: str, **when: bool) -> None:
        """Press Ctrl-C in this process once, at the next request that matches."""
        self.faults.append(Fault(method, path, 1, None, **when, interrupts=True))

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            applies = fault.times and fault.endpoint_exists in (None, bool(self.endpoints))
            if applies and fault.method == method and re.search(fault.path, path):
                return fault
        return None

    def sent(self, pattern: str) -> list[str]:
        """Return the matching requests so far, as "METHOD path"."""
        lines = [f"{method} {path}" for method, path in self.requests]
        return [line for line in lines if re.search(pattern, line)]

    def changes(self) -> list[str]:
        """Return the requests so far that can change something."""
        reads = re.compile(r"^(GET|HEAD)|validate-yaml|preupload|paths-info|/live/")
        return [f"{method} {path}" for method, path in self.requests if not reads.search(f"{method} {path}")]

    # The Hub

    def member(self, request: Request, namespace: str, write: bool) -> bool:
        """Return whether the request's token may read, or write, in this namespace."""
        who = self.who(request)
        if who is None:
            return False
        roles = {who["name"]: "admin"} | {org["name"]: org["roleInOrg"] for org in who["orgs"] or []}
        # With OAuth (`hf auth login`), `auth` has no access token and no scopes.
        token = (who.get("auth") or {}).get("accessToken") or {}
        return namespace in roles and not (write and "read" in (roles[namespace], token.get("role")))

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

    async def paths_info(self, request: Request) -> Response:
        """Describe files, with the hash in Xet storage of each file in LFS."""
        repo = self.readable(request)
        if repo is None:
            return JSONResponse({"error": "Repository not found"}, 404, NO_REPOSITORY)
        if not self.may_open(request, repo):
            return gated()
        _, files = repo.at(request.path_params["revision"])
        described = []
        for path in (await request.form()).getlist("paths"):
            if path in files:
                file = describe_file(path, files[path])
                described.append({"type": "file", "path": path, "oid": file["blobId"], "size": file["size"]})
                if lfs := file.get("lfs"):
                    described[-1] |= {"lfs": {**lfs, "oid": lfs["sha256"]}, "xetHash": lfs["sha256"]}
        return JSONResponse(described)

    async def duplicate(self, request: Request) -> Response:
        """Copy files in LFS between repositories of one storage region (huggingface_hub)."""
        name, body = request.path_params["repo"], await request.json()
        if not self.member(request, body["target"]["name"].split("/")[0], write=True):
            return JSONResponse({"error": "Forbidden"}, 403)
        if name in self.elsewhere:
            return JSONResponse({"error": "Cannot duplicate files across storage regions"}, 400)
        for _, files in self.repos[name].commits:
            self.lfs |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return JSONResponse({"success": True, "processed": len(body["files"]), "failed": []})

    async def xet_token(self, request: Request) -> Response:
        """Return the address and the token for uploads, or 403 for a namespace without storage."""
        if not self.member(request, request.path_params["repo"].split("/")[0], write=True):
            return JSONResponse({"error": "Forbidden"}, 403)
        if self.full:
            return JSONResponse({"error": self.full}, 403)
        url, expires = self.storage or f"{self.url}/cas", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)

    async def xorb(self, request: Request) -> Response:
        """Store a block of chunks, which is one file, or several small ones.

        Each chunk has a head of eight bytes: version, length, compression (0: none), length.
        """
        body, chunks, start = await request.body(), [], 0
        while start < len(body) and body[start] == 0:
            size = int.from_bytes(body[start + 1 : start + 4], "little")
            assert body[start + 4] == 0, "HF_XET_DATA_XORB_COMPRESSION_POLICY=none"
            chunks.append(body[start + 8 : start + 8 + size])
            start += 8 + size
        self.lfs |= {hashlib.sha256(content).hexdigest(): content for content in (b"".join(chunks), *chunks)}
        return JSONResponse({"was_inserted": True})

    async def shard(self, request: Request) -> Response:
        return JSONResponse({"result": 1})

    async def unknown_chunk(self, request: Request) -> Response:
        return PlainTextResponse("", 404)

    def files(self, raw: dict[str, Any]) -> dict[str, bytes]:
        return self.repos[raw["model"]["repository"]].at(raw["model"]["revision"])[1]

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
        if (commit := repo.at(request.path_params["revision"])) is None:
            return JSONResponse({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        sha, files = commit
        content = files.get(request.path_params["path"])
        if content is None:
            return JSONResponse({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha}
        return Response(content, media_type="application/octet-stream", headers=headers)

    def app(self) -> Starlette:
        repo = "{repo:path}"
        return Starlette(
            routes=[
                Route("/api/whoami-v2", self.whoami),
                Route("/api/repos/create", self.create_repo, methods=["POST"]),
                Route("/api/repos/delete", self.delete_repo, methods=["DELETE"]),
                Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
                Route(f"/api/models/{repo}/auth-check", self.auth_check),
                Route(f"/api/models/{repo}/preupload/{{revision}}", self.preupload, methods=["POST"]),
                Route(f"/api/models/{repo}/paths-info/{{revision}}", self.paths_info, methods=["POST"]),
                Route(f"/api/models/{repo}/lfs-files/duplicate", self.duplicate, methods=["POST"]),
                Route(f"/api/models/{repo}/xet-write-token/{{revision}}", self.xet_token),
                Route(f"/api/models/{repo}/commit/{{revision}}", self.commit, methods=["POST"]),
                Route(f"/api/models/{repo}/revision/{{revision}}", self.repo_info),
                Route(f"/api/models/{repo}", self.repo_info),
                Route("/cas/v1/chunks/{path:path}", self.unknown_chunk),
                Route("/cas/v1/xorbs/{path:path}", self.xorb, methods=["POST"]),
                Route("/cas/v1/shards", self.shard, methods=["POST"]),
                *self.endpoint_routes(),
                Route(f"/{repo}/resolve/{{revision}}/{{path:path}}", self.resolve),
            ]
        )

    def with_faults(self, app: Starlette) -> Callable[..., Awaitable[None]]:
        """Return the app with a record of its requests and the injected faults."""

        async def run(scope: dict[str, Any], receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            method, path = scope["method"], scope["path"]
            self.requests.append((method, path))
            fault = self.fault(method, path)
            if fault is None:
                return await app(scope, receive, send)
            fault.times -= 1
            if fault.after:
                await app(scope, receive, discard)
            if fault.interrupts:
                os.kill(os.getpid(), signal.SIGINT)
            if fault.response is None:
                if not fault.after:
                    await receive()
                send.__self__.transport.abort()
                return None
            return await fault.response(scope, receive, send)

        return run


async def discard(message: dict[str, Any]) -> None:
    """Lose a response."""


def describe_file(path: str, content: bytes) -> dict[str, Any]:
    """Return the Hub's description of a file."""
    described = {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
    if is_lfs(path):
        described["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return described


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def gated() -> Response:
    return JSONResponse({"error": "Access to this model is restricted"}, 403, {"X-Error-Code": "GatedRepo"})


ANEW = """
import json, os, sys, warnings

os.environ.update(json.loads(sys.argv.pop(1)))
for name in list(sys.modules):
    if name.partition(".")[0] in ("handlers", "huggingface_hub", "prometheus_client", "remote_vae", "scripts"):
        del sys.modules[name]
warnings.simplefilter("error")
"""


def run_with_hub(url: str, cache: Path, code: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run code with the Hub at `url`. Return the status, standard output and standard error.

    huggingface_hub reads its environment when it is imported, so the forked process imports it anew.
    """
    environment |= {"HF_HOME": str(cache), "HF_ENDPOINT": url}
    return forked.run("-c", ANEW + code, json.dumps(environment), *arguments)


@contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    """Run a hub at `hub.url`. At the end its thread takes 0.2 s to stop, for which nobody waits."""
    hub = Hub(folder=folder)
    app = hub.with_faults(hub.app())
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", http="httptools")
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, daemon=True).start()
    try:
        while not server.started:
            time.sleep(0.01)
        hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield hub
    finally:
        hub.stop()
        server.should_exit = True
