"""The endpoint's repository on the Hub, and what goes into it: exactly that, and nothing else of the working tree."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils.sha import git_hash
from rich.filesize import decimal

from handlers import MODELS, __version__
from scripts.console import DeployError, if_stopped, note, say
from scripts.deployment.account import Account
from scripts.deployment.calls import HubError, call, passes
from scripts.deployment.plan import WEIGHT_FILES, Plan
from scripts.deployment.texts import model_card, origin

PROJECT = Path(__file__).parents[2]
STORAGE_ANSWERS = 20
"""Seconds in which the storage has to answer at all; an upload to one that does not would be silent for minutes."""


def small_files(plan: Plan, revisions: dict[str, str]) -> dict[str, bytes]:
    """The code; `endpoint.json`, which tells it what it serves; the model card. `revisions` are the checkpoints'."""
    found = (PROJECT / "handlers").rglob("[!.]*")
    kinds = {".py", ".html", ".json"}
    modules = sorted(one for one in found if one.suffix in kinds and one.parent.name != "__pycache__")
    code = [PROJECT / "handler.py", *modules, PROJECT / "requirements.txt"]
    pinned = {key: {"revision": revision} for key, revision in revisions.items()}
    records = [{"model": key, "checkpoint": origin(plan, key), **pinned.get(key, {})} for key in plan.models]
    record = (records[0] if len(records) == 1 else {"models": records}) | {"version": __version__}
    return {path.relative_to(PROJECT).as_posix(): path.read_bytes() for path in code} | {
        "endpoint.json": f"{json.dumps(record, indent=2)}\n".encode(),
        "README.md": model_card(plan, revisions).encode(),
    }


def weight_paths(plan: Plan, model: str) -> list[str]:
    """Where the repository has the model's `WEIGHT_FILES`; nowhere where the endpoint fetches them itself."""
    folder = "vae" if len(plan.models) == 1 else f"vae/{model}"
    return [f"{folder}/{name}" for name in WEIGHT_FILES] if plan.weights != "hub" else []


def describe_files(plan: Plan) -> dict[str, int | None]:
    """Bytes of all of it, by path, without a network: of weights on the Hub the published sizes, rounded."""
    commits = {key: "0" * 40 for key in plan.models if key not in plan.folders}  # in place of the Hub's
    sizes: dict[str, int | None] = {}
    for path, data in small_files(plan, commits).items():
        name = "handlers/" if path.startswith("handlers/") else path
        sizes[name] = (sizes.get(name) or 0) + len(data)
    for key in plan.models:
        known = [1_000, MODELS[key].weights_mb and MODELS[key].weights_mb * 1_000_000]
        if folder := plan.folders.get(key):
            known = [(folder / name).stat().st_size for name in WEIGHT_FILES]
        sizes |= zip(weight_paths(plan, key), known, strict=False)
    return sizes


class Repository:
    """A model repository, which may not exist yet. `files` are those at its newest commit."""

    def __init__(self, account: Account, name: str, models: tuple[str, ...]) -> None:
        """Raises `DeployError` where it is something else than a deployment of these models.

        An empty one is no obstacle: that is what an upload leaves that was cut off.
        """
        self.api, self.account, self.id = account.api, account, f"{account.namespace}/{name}"
        self.page = f"{self.api.endpoint}/{self.id}"
        self.record: dict[str, dict[str, Any]] = {}
        """What `endpoint.json` has of each model; nothing where the repository is not ours."""
        info = call("look up the repository", self.api.model_info, self.id, files_metadata=True, missing=(401, 404))
        self.commit: str | None = info and info.sha
        self.files = {file.rfilename: file for file in (info.siblings if info else ())}
        self.files.pop(".gitattributes", None)  # the Hub's own
        if "endpoint.json" in self.files:
            path = call("read endpoint.json", self.api.hf_hub_download, self.id, "endpoint.json", revision=self.commit)
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                record = json.loads(Path(path).read_text())
                self.record = {one["model"]: one for one in record.get("models", [record]) if "checkpoint" in one}
        if self.files and set(self.record) != set(models):
            what = f"is a deployment of {','.join(self.record)}" if self.record else "was not made by this script"
            raise DeployError(f"{self.page} {what}: choose another NAME=...")

    def __str__(self) -> str:
        return f"the repository {self.id}"

    def find_weights(self, plan: Plan) -> dict[str, ModelInfo]:
        """Of each model whose weights are on the Hub its checkpoint, with `WEIGHT_FILES` alone as its `siblings`."""
        return {key: self._find_checkpoint(key, plan.revision) for key in plan.models if key not in plan.folders}

    def _find_checkpoint(self, model: str, revision: str | None) -> ModelInfo:
        """At the commit that is deployed already, so that what changes upstream is no reason for an update, unless
        REVISION asks for it; else at the newest.
        """
        name, deployed = MODELS[model].checkpoint, self.record.get(model, {})
        page = f"https://huggingface.co/{name}"
        if deployed.get("checkpoint") == name:
            revision = revision or deployed.get("revision")
        about = {"revision": revision, "files_metadata": True}
        try:
            info = call("look up the checkpoint", self.api.model_info, name, missing=(401, 404), **about)
            if info and info.gated:
                call("open the checkpoint", self.api.auth_check, name)
        except HubError as error:
            if not isinstance(error.__cause__, GatedRepoError):
                raise
            raise DeployError(f"{name} is gated: accept its conditions on {page}, then try again") from None
        if not info:
            at = f" at REVISION={revision}" if revision else ""
            raise DeployError(f"{name}{at} is not on the Hub, or this token may not see it: {page}")
        found = {file.rfilename: file for file in info.siblings}
        wanted = ["/".join(filter(None, (MODELS[model].subfolder, file))) for file in WEIGHT_FILES]
        if missing := [path for path in wanted if path not in found]:
            raise DeployError(f"{name} has no {' and no '.join(missing)} at commit {info.sha[:8]}")
        info.siblings = [found[path] for path in wanted]
        say(f"Weights of {model}: {name} at commit {info.sha[:8]}" + (", pinned" if revision else ""))
        return info

    def upload(self, plan: Plan, weights: dict[str, ModelInfo]) -> str:
        """One commit that makes the repository hold exactly this; none where it does. Returns the newest commit.

        Where there is no repository a private one is made. Weights on the Hub are copied there, from repository to
        repository; where that cannot be, they go through here.
        """
        local: dict[str, bytes | Path] = {}
        local |= small_files(plan, {model: info.sha for model, info in weights.items()})
        copied: dict[str, tuple[ModelInfo, RepoSibling]] = {}
        unneeded = self.files.keys() - local.keys()
        for key in plan.models:
            unneeded -= set(weight_paths(plan, key))
            for number, path in enumerate(weight_paths(plan, key)):
                there = self.files.get(path)
                if folder := plan.folders.get(key):
                    if not is_same(folder / WEIGHT_FILES[number], there):
                        local[path] = folder / WEIGHT_FILES[number]
                elif not there or there.blob_id != weights[key].siblings[number].blob_id:
                    copied[path] = (weights[key], weights[key].siblings[number])

        def commit() -> str:  # of new operations each time: they remember what they were answered
            operations = [CommitOperationAdd(path, content) for path, content in local.items()]
            operations += [CommitOperationDelete(path) for path in sorted(unneeded)]
            for path, (info, file) in copied.items():
                operations.append(CommitOperationCopy(file.rfilename, path, info.sha, info.id, "model"))
            message = f"Deploy {plan.model} with remote-vae {__version__}"
            return self.api.create_commit(self.id, operations, commit_message=message).oid

        with if_stopped(f"{self} stays, it may be incomplete and costs nothing"):
            if not self.commit:
                call(f"create {self.id}", self.api.create_repo, self.id, private=True, exist_ok=True)
            self._check_storage(local)
            if copied:
                say(f"  copying {decimal(sum(file.size for _, file in copied.values()))} of weights from Hub to Hub")
            try:
                newest = call(f"upload to {self.id}", commit)
            except HubError as error:
                # A file without Xet hash, or of another storage region: huggingface_hub says so before it commits.
                if not copied or passes(error.status) or error.status == 401:
                    raise
                note(f"  {error}; downloading and uploading the weights instead")
                for path, (info, file) in copied.items():
                    download, name = self.api.hf_hub_download, file.rfilename
                    local[path] = Path(call(f"download {name}", download, info.id, name, revision=info.sha))
                copied.clear()
                self._check_storage(local)
                newest = call(f"upload to {self.id}", commit)
        unchanged = newest == self.commit
        say(f"  {'unchanged' if unchanged else 'now'} at commit {newest[:8]}" + (": nothing to upload" * unchanged))
        return newest

    def _check_storage(self, local: dict[str, bytes | Path]) -> None:
        """Asks for leave to upload weights, and whether the storage answers; the upload would not say why it cannot."""
        size = sum(path.stat().st_size for path in local.values() if isinstance(path, Path))
        if not size:
            return
        say(f"  uploading {decimal(size)} of weights")
        url = f"{self.api.endpoint}/api/models/{self.id}/xet-write-token/main"
        storage = call(f"upload to {self.id}", self.account.request, "GET", url).headers.get("X-Xet-Cas-Url")
        try:
            httpx2.get(storage, timeout=STORAGE_ANSWERS)
        except httpx2.HTTPError as error:
            what = f"the Hub's storage {httpx2.URL(storage).netloc.decode()} does not answer ({type(error).__name__})"
            raise DeployError(f"{what}: is it blocked by a proxy? The same command again goes on from here") from None

    def delete(self) -> None:
        call(f"delete {self.id}", self.api.delete_repo, self.id, missing_ok=True)


def is_same(file: Path, there: RepoSibling | None) -> bool:
    """Whether the repository has just this."""
    if there is None or there.lfs is None:
        return there is not None and there.blob_id == git_hash(file.read_bytes())
    with file.open("rb") as opened:
        return there.lfs.sha256 == hashlib.file_digest(opened, "sha256").hexdigest()
