"""The endpoint's repository on the Hub, and what goes into it: exactly that, and nothing else of the working tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from huggingface_hub.utils.sha import sha_fileobj

from handlers import __version__
from scripts.deployment.account import Account
from scripts.deployment.calls import HubError, call, passes
from scripts.deployment.card import model_card
from scripts.deployment.console import DeployError, megabytes, note, say
from scripts.deployment.plan import WEIGHT_FILES, Plan, Source

PROJECT = Path(__file__).parents[2]
KEPT = ".gitattributes"
"""The Hub's own file in every repository."""
UNKNOWN = "0" * 40
"""Stands for a checkpoint's commit in a dry run, which does not ask the Hub for it."""
STORAGE_ANSWERS = 20
"""Seconds in which the storage has to answer at all; an upload to one that does not would be silent for minutes."""

Weights = dict[str, ModelInfo]
"""Of each model whose weights are on the Hub, its checkpoint at a commit."""


def code_files() -> list[Path]:
    """`handler.py`, `handlers/` and `requirements.txt`."""
    modules = (PROJECT / "handlers").rglob("*")
    code = sorted(path for path in modules if path.suffix in (".py", ".html") and not path.name.startswith("."))
    return [PROJECT / "handler.py", *code, PROJECT / "requirements.txt"]


def small_files(plan: Plan, revisions: dict[str, str]) -> dict[str, bytes]:
    """The code; `endpoint.json`, which tells it what it serves; the model card. `revisions` are the checkpoints'."""
    described = [
        {"model": one.model, "checkpoint": one.origin}
        | ({"revision": revisions[one.model]} if one.model in revisions else {})
        for one in plan.sources
    ]
    record = described[0] if len(described) == 1 else {"models": described}
    files = {path.relative_to(PROJECT).as_posix(): path.read_bytes() for path in code_files()}
    files["endpoint.json"] = (json.dumps(record | {"version": __version__}, indent=2) + "\n").encode()
    files["README.md"] = model_card(plan, revisions).encode()
    return files


def weights_folder(plan: Plan, source: Source) -> str:
    """`vae` of a single model, `vae/KEY` of each of several."""
    return "vae" if len(plan.sources) == 1 else f"vae/{source.model}"


def describe_files(plan: Plan) -> list[tuple[str, int | None]]:
    """All of it without a network, as (path, bytes): of weights on the Hub the published sizes, rounded."""
    unknown = {one.model: UNKNOWN for one in plan.sources if one.kind != "folder"}
    listed: list[tuple[str, int | None]] = [(path, len(data)) for path, data in small_files(plan, unknown).items()]
    for one in plan.sources:
        published = (1_000, one.handler.weights_mb and one.handler.weights_mb * 1_000_000)
        for name, size in zip(WEIGHT_FILES, published, strict=True):
            if one.kind == "folder":
                size = (one.folder / name).stat().st_size
            if one.kind != "hub":
                listed.append((f"{weights_folder(plan, one)}/{name}", size))
    return listed


class Repository:
    """A model repository, which may not exist yet. `files` are those at its newest commit."""

    def __init__(self, account: Account, name: str) -> None:
        self.account = account
        self.id = f"{account.namespace}/{name}"
        self.page = f"{account.api.endpoint}/{self.id}"
        self.commit: str | None = None
        self.files: dict[str, RepoSibling] = {}
        self.record: dict[str, dict[str, Any]] = {}
        """What `endpoint.json` has of each model; nothing where the repository is not ours."""
        try:
            info = call("look up the repository", account.api.model_info, self.id, files_metadata=True)
        except HubError as error:
            if error.status not in (401, 404):
                raise
            return
        self.commit = info.sha
        self.files = {file.rfilename: file for file in info.siblings if file.rfilename != KEPT}
        if "endpoint.json" in self.files:
            self.record = self._read_record()

    @property
    def exists(self) -> bool:
        return self.commit is not None

    def _read_record(self) -> dict[str, dict[str, Any]]:
        download = self.account.api.hf_hub_download
        path = call("read endpoint.json", download, self.id, "endpoint.json", revision=self.commit)
        try:
            record = json.loads(Path(path).read_text())
            return {one["model"]: one for one in record.get("models", [record]) if "checkpoint" in one}
        except (ValueError, TypeError, KeyError, AttributeError):
            return {}

    def check_ours(self, models: tuple[str, ...]) -> None:
        """Raises `DeployError` where the repository is something else than a deployment of these models.

        An empty one is no obstacle: that is what an upload leaves that was cut off.
        """
        if self.files and not self.record:
            raise DeployError(f"{self.page} was not made by this script: choose another NAME=...")
        if self.files and set(self.record) != set(models):
            raise DeployError(f"{self.page} is a deployment of {','.join(self.record)}: choose another NAME=...")

    def find_weights(self, plan: Plan) -> Weights:
        """The checkpoints, which the token may read: at the commit that is deployed already, else at the newest.

        So what changes upstream is no reason for an update, unless REVISION asks for it.
        """
        return {one.model: self._find_checkpoint(one, plan) for one in plan.sources if one.kind != "folder"}

    def _find_checkpoint(self, source: Source, plan: Plan) -> ModelInfo:
        name, page = source.origin, f"https://huggingface.co/{source.origin}"
        deployed = self.record.get(source.model, {})
        revision = plan.revision or (deployed.get("revision") if deployed.get("checkpoint") == name else None)
        api = self.account.api
        try:
            info = call("look up the checkpoint", api.model_info, name, revision=revision, files_metadata=True)
            if info.gated:
                call("open the checkpoint", api.auth_check, name)
        except HubError as error:
            if error.gated:
                raise DeployError(f"{name} is gated: accept its conditions on {page}, then try again") from None
            if error.status in (401, 404):
                at = f" at REVISION={revision}" if revision else ""
                raise DeployError(f"{name}{at} is not on the Hub, or this token may not see it: {page}") from None
            raise
        folder = f"{source.handler.subfolder}/" if source.handler.subfolder else ""
        found = {file.rfilename: file for file in info.siblings}
        if missing := [folder + file for file in WEIGHT_FILES if folder + file not in found]:
            raise DeployError(f"{name} has no {' and no '.join(missing)} at commit {info.sha[:8]}")
        info.siblings = [found[folder + file] for file in WEIGHT_FILES]
        say(f"Weights of {source.model}: {name} at commit {info.sha[:8]}" + (", pinned" if revision else ""))
        return info

    def create(self) -> None:
        """Makes it, private, where it does not exist."""
        if self.exists:
            return
        try:
            call(f"create {self.id}", self.account.api.create_repo, self.id, private=True, exist_ok=True)
        except HubError as error:
            if error.status not in (401, 403):
                raise
            raise DeployError(
                f"this token may not create repositories in {self.account.namespace}: {error.reason}"
            ) from None

    def upload(self, plan: Plan, weights: Weights) -> str:
        """One commit that makes the repository hold exactly this; none where it does. Returns the newest commit.

        Weights on the Hub are copied there, from repository to repository; where that cannot be, they go through here.
        """
        small = small_files(plan, {model: info.sha for model, info in weights.items()})
        wanted, copies, local = set(small), {}, {}
        for source in plan.sources:
            for name in WEIGHT_FILES if source.kind != "hub" else ():
                path = f"{weights_folder(plan, source)}/{name}"
                wanted.add(path)
                if source.kind == "folder":
                    if not _is_same(source.folder / name, self.files.get(path)):
                        local[path] = source.folder / name
                else:
                    file = next(file for file in weights[source.model].siblings if file.rfilename.endswith(name))
                    if path not in self.files or _digest(file) != _digest(self.files[path]):
                        copies[path] = (weights[source.model], file)
        deletions = [CommitOperationDelete(path) for path in sorted(self.files.keys() - wanted)]

        def commit() -> str:
            additions = [CommitOperationAdd(path, content) for path, content in {**small, **local}.items()]
            copied = [
                CommitOperationCopy(file.rfilename, path, info.sha, info.id, "model")
                for path, (info, file) in copies.items()
            ]
            message = f"Deploy {plan.model} with remote-vae {__version__}"
            return self.account.api.create_commit(
                self.id, [*additions, *copied, *deletions], commit_message=message
            ).oid

        if local:
            self._check_storage(sum(path.stat().st_size for path in local.values()))
        if copies:
            size = megabytes(sum(file.size for _, file in copies.values()))
            say(f"  copying {size} of weights from Hub to Hub")
        try:
            newest = call(f"upload to {self.id}", commit)
        except DeployError as error:
            # A file without Xet hash, or of another storage region: huggingface_hub says so before it commits anything.
            if not copies or (isinstance(error, HubError) and (passes(error.status) or error.status == 401)):
                raise
            note(f"  {error}; downloading and uploading the weights instead")
            download = self.account.api.hf_hub_download
            for path, (info, file) in copies.items():
                task = f"download {file.rfilename}"
                local[path] = Path(call(task, download, info.id, file.rfilename, revision=info.sha))
            self._check_storage(sum(file.size for _, file in copies.values()))
            copies.clear()
            newest = call(f"upload to {self.id}", commit)
        unchanged = newest == self.commit
        say(f"  {'unchanged' if unchanged else 'now'} at commit {newest[:8]}" + (": nothing to upload" * unchanged))
        return newest

    def _check_storage(self, size: int) -> None:
        """Asks for leave to upload, and whether the storage answers; the upload itself would not say why it cannot.

        Raises:
            DeployError: no; with the Hub's reason, as a quota that is full.
        """
        say(f"  uploading {megabytes(size)} of weights")
        url = f"{self.account.api.endpoint}/api/models/{self.id}/xet-write-token/main"

        def ask() -> str | None:
            answer = get_session().get(url, headers=build_hf_headers(token=self.account.token))
            hf_raise_for_status(answer)
            return answer.headers.get("X-Xet-Cas-Url")

        try:
            storage = call("upload", ask)
        except HubError as error:
            if error.status != 403:
                raise
            raise DeployError(
                f"the Hub takes no files for {self.id}: {error.reason}; see https://huggingface.co/settings/billing"
            ) from None
        try:
            httpx2.get(storage, timeout=STORAGE_ANSWERS)
        except httpx2.HTTPError as error:
            host = httpx2.URL(storage).netloc.decode()
            raise DeployError(
                f"the Hub's storage {host} does not answer ({type(error).__name__}): is it blocked by a proxy? "
                "The same command again goes on from here"
            ) from None

    def delete(self) -> None:
        call(f"delete {self.id}", self.account.api.delete_repo, self.id, missing_ok=True)


def _digest(file: RepoSibling) -> str | None:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _is_same(path: Path, remote: RepoSibling | None) -> bool:
    """Whether it is in the repository's storage already. Small files are left to huggingface_hub to compare."""
    if remote is None or remote.lfs is None:
        return False
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == remote.lfs.sha256
