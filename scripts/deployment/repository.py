"""The endpoint's repository on the Hub, and its files: exactly those, and nothing else of the working tree."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils.sha import git_hash
from rich.filesize import decimal

from handlers import MODELS, __version__
from handlers.serving.vae import hub
from scripts.console import DeployError, if_stopped, note, say
from scripts.deployment.account import Account
from scripts.deployment.calls import HubError, call, is_transient
from scripts.deployment.plan import Plan
from scripts.deployment.texts import describe_origin, model_card
from scripts.deployment.weights import check_config, file_names, one_file

PROJECT = Path(__file__).parents[2]
STORAGE_TIMEOUT = 20
"""Seconds in which the storage must respond. An upload to a silent storage would say nothing for minutes."""

SHARD = re.compile(r"diffusion_pytorch_model-\d+-of-\d+\.safetensors")
"""Names of the files of a checkpoint in several files, beside `hub.INDEX`."""


@dataclass(frozen=True)
class Checkpoint:
    """Files of a repository on the Hub at a commit, by their names in the endpoint's repository."""

    id: str
    sha: str
    files: dict[str, RepoSibling]


def small_files(plan: Plan, revisions: dict[str, str]) -> dict[str, bytes]:
    """Return the code, `endpoint.json` and the model card. `revisions` are commits of checkpoints, by model.

    A container image has the code and its packages.
    """
    paths = (PROJECT / "handlers").rglob("[!.]*")
    kinds = {".py", ".html", ".json"}
    modules = sorted(path for path in paths if path.suffix in kinds and path.parent.name != "__pycache__")
    code = [] if plan.image else [PROJECT / "handler.py", *modules, PROJECT / "requirements.txt"]
    pinned = {key: {"revision": revision} for key, revision in revisions.items()}
    records = [{"model": key, "checkpoint": describe_origin(plan, key), **pinned.get(key, {})} for key in plan.models]
    record = (records[0] if len(records) == 1 else {"models": records}) | {"version": __version__}
    return {path.relative_to(PROJECT).as_posix(): path.read_bytes() for path in code} | {
        "endpoint.json": f"{json.dumps(record, indent=2)}\n".encode(),
        "README.md": model_card(plan, revisions).encode(),
    }


def weight_path(plan: Plan, model: str, name: str) -> str:
    """Return the path of a model's file of weights in the repository."""
    return f"vae/{name}" if len(plan.models) == 1 else f"vae/{model}/{name}"


def describe_files(plan: Plan) -> dict[str, int | None]:
    """Return the bytes of each file without a network. Weights on the Hub have their published size, rounded."""
    commits = dict.fromkeys(plan.checkpoints, "0" * 40)  # in place of the Hub's
    sizes: dict[str, int | None] = {}
    for path, data in small_files(plan, commits).items():
        name = "handlers/" if path.startswith("handlers/") else path
        sizes[name] = (sizes.get(name) or 0) + len(data)
    for key in plan.models:
        published = None if plan.weights else MODELS[key].weights_mb
        names = [one_file(key)] if hub.names_file(plan.sources[key]) else file_names(key)
        weights = dict(zip(names, [1_000, published and published * 1_000_000][-len(names) :], strict=True))
        if files := plan.uploads.get(key):
            weights = {name: file.stat().st_size for name, file in files.items()}
        sizes |= {weight_path(plan, key, name): size for name, size in weights.items()}
    return sizes


@dataclass
class Changes:
    """The changes of one commit, by path in the repository."""

    added: dict[str, bytes | Path]
    copied: dict[str, tuple[Checkpoint, RepoSibling]] = field(default_factory=dict)
    """Files of checkpoints, which are copied on the Hub."""
    deleted: set[str] = field(default_factory=set)

    @property
    def uploaded_weights(self) -> int:
        """Bytes of weights that are uploaded from here."""
        return sum(path.stat().st_size for path in self.added.values() if isinstance(path, Path))

    @property
    def copied_weights(self) -> int:
        """Bytes of weights that are copied on the Hub."""
        return sum(file.size for _, file in self.copied.values())

    def operations(self) -> list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy]:
        """Return new operations for each attempt, because huggingface_hub keeps the Hub's responses in them."""
        return [
            *(CommitOperationAdd(path, content) for path, content in self.added.items()),
            *(CommitOperationDelete(path) for path in sorted(self.deleted)),
            *(
                CommitOperationCopy(file.rfilename, path, checkpoint.sha, checkpoint.id, "model")
                for path, (checkpoint, file) in self.copied.items()
            ),
        ]


class Repository:
    """A model repository, which may not exist yet. `files` are those at its newest commit."""

    def __init__(self, account: Account, name: str, models: tuple[str, ...]) -> None:
        """Look it up. Raise `DeployError` when its files are not a deployment of these models.

        A repository without files is accepted: an interrupted upload leaves one.
        """
        self.api, self.account, self.id = account.api, account, f"{account.namespace}/{name}"
        self.page = f"{self.api.endpoint}/{self.id}"
        self.records: dict[str, dict[str, Any]] = {}
        """The entry of each model in `endpoint.json`; empty for a repository that is not ours."""
        info = call("look up the repository", self.api.model_info, self.id, files_metadata=True, missing=(401, 404))
        self.commit: str | None = info and info.sha
        self.files = {file.rfilename: file for file in (info.siblings if info else ())}
        self.files.pop(".gitattributes", None)  # the Hub's own
        if "endpoint.json" in self.files:
            path = call("read endpoint.json", self.api.hf_hub_download, self.id, "endpoint.json", revision=self.commit)
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                record = json.loads(Path(path).read_text())
                records = record.get("models", [record])
                self.records = {record["model"]: record for record in records if "checkpoint" in record}
        if self.files and set(self.records) != set(models):
            what = f"is a deployment of {','.join(self.records)}" if self.records else "was not made by this script"
            raise DeployError(f"{self.page} {what}: choose another NAME=...")

    def __str__(self) -> str:
        return f"the repository {self.id}"

    def find_checkpoints(self, plan: Plan) -> dict[str, Checkpoint]:
        """Return the checkpoint of each model whose weights are on the Hub.

        The deployed commit is kept, so a change upstream causes no update, unless REVISION asks for another commit.
        """
        checkpoints = {}
        for model, source in plan.checkpoints.items():
            deployed = self.records.get(model, {})
            pinned = deployed.get("revision") if deployed.get("checkpoint") == describe_origin(plan, model) else None
            source = source._replace(revision=plan.revision or source.revision or pinned)
            checkpoints[model] = self._find_checkpoint(model, source, is_own=plan.weights is not None)
        return checkpoints

    def _find_checkpoint(self, model: str, source: hub.Repository, is_own: bool) -> Checkpoint:
        """Return the files of a checkpoint at a commit, or at the newest one. A user's own is checked."""
        info = self._look_up_checkpoint(source.name, source.revision)
        files = {file.rfilename: file for file in info.siblings}
        if hub.names_file(source):
            paths = {one_file(model): source.subfolder}
        else:
            folder = f"{source.subfolder}/" if source.subfolder else ""
            names: Iterable[str] = file_names(model)
            if f"{folder}{hub.INDEX}" in files and f"{folder}{hub.FILES[1]}" not in files:
                shards = (path.removeprefix(folder) for path in files if path.startswith(folder))
                names = (hub.FILES[0], hub.INDEX, *filter(SHARD.fullmatch, shards))
            paths = {name: f"{folder}{name}" for name in names}
        if missing := [path for path in paths.values() if path not in files]:
            raise DeployError(f"{source.name} has no {' and no '.join(missing)} at commit {info.sha[:8]}")
        if is_own and (config := paths.get(hub.FILES[0])):
            download = self.api.hf_hub_download
            file = call(f"download {config}", download, source.name, config, revision=info.sha)
            check_config(model, Path(file), f"{source.name}/{config}")
        say(f"Weights of {model}: {source.name} at commit {info.sha[:8]}" + (", pinned" if source.revision else ""))
        return Checkpoint(info.id, info.sha, {name: files[path] for name, path in paths.items()})

    def _look_up_checkpoint(self, name: str, revision: str | None) -> ModelInfo:
        page, options = f"https://huggingface.co/{name}", {"revision": revision, "files_metadata": True}
        try:
            info = call("look up the checkpoint", self.api.model_info, name, missing=(401, 404), **options)
            if info and info.gated:
                call("open the checkpoint", self.api.auth_check, name)
        except HubError as error:
            if not isinstance(error.__cause__, GatedRepoError):
                raise
            raise DeployError(f"{name} is gated: accept its conditions on {page}, then try again") from None
        if not info:
            at = f" at REVISION={revision}" if revision else ""
            raise DeployError(f"{name}{at} is not on the Hub, or this token may not see it: {page}")
        return info

    def upload(self, plan: Plan, checkpoints: dict[str, Checkpoint]) -> str:
        """Make the repository hold exactly the plan's files, in one commit or none. Return the newest commit.

        A new repository is private. Weights on the Hub are copied there. Where that fails, they are downloaded and
        uploaded.
        """
        changes = self._compare(plan, checkpoints)
        message = f"Deploy {plan.model} with remote-vae {__version__}"
        with if_stopped(f"{self} stays, it may be incomplete and costs nothing"):
            if not self.commit:
                call(f"create {self.id}", self.api.create_repo, self.id, private=True, exist_ok=True)
            newest = self._commit(changes, message)
        is_unchanged = newest == self.commit
        say(
            f"  unchanged at commit {newest[:8]}: nothing to upload"
            if is_unchanged
            else f"  now at commit {newest[:8]}"
        )
        return newest

    def _compare(self, plan: Plan, checkpoints: dict[str, Checkpoint]) -> Changes:
        """Return the changes that make the repository hold the plan's files."""
        changes = Changes(dict(small_files(plan, {model: info.sha for model, info in checkpoints.items()})))
        changes.deleted = self.files.keys() - changes.added.keys()
        for key in plan.models:
            for name, file in (plan.uploads.get(key) or checkpoints[key].files).items():
                path = weight_path(plan, key, name)
                changes.deleted.discard(path)
                deployed = self.files.get(path)
                if isinstance(file, Path):
                    if not is_same(file, deployed):
                        changes.added[path] = file
                elif not deployed or deployed.blob_id != file.blob_id:
                    changes.copied[path] = checkpoints[key], file
        return changes

    def _commit(self, changes: Changes, message: str) -> str:
        """Commit the changes, and return the newest commit."""

        def commit() -> str:
            return self.api.create_commit(self.id, changes.operations(), commit_message=message).oid

        self._check_storage(changes.uploaded_weights)
        if changes.copied:
            say(f"  copying {decimal(changes.copied_weights)} of weights from Hub to Hub")
        try:
            return call(f"upload to {self.id}", commit)
        except HubError as error:
            # huggingface_hub refuses to copy a file without a Xet hash, or from another storage region.
            if not changes.copied or is_transient(error.status) or error.status == 401:
                raise
            note(f"  {error}; downloading and uploading the weights instead")
        for path, (checkpoint, file) in changes.copied.items():
            download, name = self.api.hf_hub_download, file.rfilename
            downloaded = call(f"download {name}", download, checkpoint.id, name, revision=checkpoint.sha)
            changes.added[path] = Path(downloaded)
        changes.copied.clear()
        self._check_storage(changes.uploaded_weights)
        return call(f"upload to {self.id}", commit)

    def _check_storage(self, size: int) -> None:
        """Check that the token may upload `size` bytes of weights and that the storage responds.

        The upload itself does not say why it fails.
        """
        if not size:
            return
        say(f"  uploading {decimal(size)} of weights")
        url = f"{self.api.endpoint}/api/models/{self.id}/xet-write-token/main"
        storage = call(f"upload to {self.id}", self.account.request, "GET", url).headers.get("X-Xet-Cas-Url")
        try:
            httpx2.get(storage, timeout=STORAGE_TIMEOUT)
        except httpx2.HTTPError as error:
            what = f"the Hub's storage {httpx2.URL(storage).netloc.decode()} does not respond ({type(error).__name__})"
            raise DeployError(f"{what}: is it blocked by a proxy? Run the same command again to continue") from None

    def delete(self) -> None:
        call(f"delete {self.id}", self.api.delete_repo, self.id, missing_ok=True)


def is_same(file: Path, deployed: RepoSibling | None) -> bool:
    """Return whether the repository's file has the content of `file`."""
    if deployed is None or deployed.lfs is None:
        return deployed is not None and deployed.blob_id == git_hash(file.read_bytes())
    with file.open("rb") as opened:
        return deployed.lfs.sha256 == hashlib.file_digest(opened, "sha256").hexdigest()
