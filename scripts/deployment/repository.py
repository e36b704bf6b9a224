"""The endpoint's repository on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_download
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from handlers import __version__
from scripts.deployment.account import Account
from scripts.deployment.calls import DeployError, HubError, call
from scripts.deployment.console import megabytes, say
from scripts.deployment.files import RepoFile
from scripts.deployment.plan import Plan

KEPT = ".gitattributes"
"""The Hub's own file in every repository."""


def find_checkpoint(account: Account, plan: Plan) -> ModelInfo | None:
    """The checkpoint at its newest commit, which the token may read; None where the weights are on this machine."""
    if isinstance(plan.weights, Path):
        return None
    page = f"https://huggingface.co/{plan.checkpoint}"
    try:
        checkpoint = call("look up the checkpoint", account.api.model_info, plan.checkpoint, files_metadata=True)
        if checkpoint.gated:
            call("open the checkpoint", account.api.auth_check, plan.checkpoint)
    except HubError as error:
        if error.gated:
            raise DeployError(f"{plan.checkpoint} is gated: accept its conditions on {page}, then try again") from None
        if error.status in (401, 404):
            raise DeployError(f"{plan.checkpoint} is not on the Hub, or this token may not see it: {page}") from None
        raise
    return checkpoint


class Repository:
    """A model repository, which may not exist yet."""

    def __init__(self, account: Account, name: str) -> None:
        self.account = account
        self.id = f"{account.namespace}/{name}"
        self.page = f"{account.api.endpoint}/{self.id}"
        self.commit: str | None = None
        self.files: dict[str, RepoSibling] = {}
        try:
            info = call("look up the repository", account.api.model_info, self.id, files_metadata=True)
        except HubError as error:
            if error.status not in (401, 404):
                raise
            return
        self.commit = info.sha
        self.files = {file.rfilename: file for file in info.siblings if file.rfilename != KEPT}

    @property
    def exists(self) -> bool:
        return self.commit is not None

    def check_ours(self, model: str) -> None:
        """Raises `DeployError` where the repository is something else than a deployment of this model.

        An empty one is no obstacle: that is what an upload leaves that was cut off.
        """
        if not self.files:
            return
        record = self._read_record()
        if record is None:
            raise DeployError(f"{self.page} was not made by this script: choose another NAME=...")
        if record["model"] != model:
            raise DeployError(f"{self.page} is a deployment of {record['model']}: choose another NAME=...")

    def _read_record(self) -> dict | None:
        if "endpoint.json" not in self.files:
            return None
        token, name = self.account.token, "endpoint.json"
        path = call("read endpoint.json", hf_hub_download, self.id, name, revision=self.commit, token=token)
        try:
            record = json.loads(Path(path).read_text())
        except ValueError:
            return None
        return record if isinstance(record, dict) and {"model", "checkpoint", "version"} <= record.keys() else None

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

    def upload(self, plan: Plan, files: list[RepoFile], checkpoint: ModelInfo | None) -> str:
        """One commit that makes the repository hold exactly `files`; none where it does. Returns the newest commit."""
        changed = [file for file in files if not file.is_same(self.files.get(file.path))]
        stale = sorted(self.files.keys() - {file.path for file in files})
        if self.commit and not changed and not stale:
            say(f"  unchanged at commit {self.commit[:8]}: nothing to upload")
            return self.commit
        if any(isinstance(file.content, RepoSibling) for file in changed):
            say(f"  fetching the weights from {plan.checkpoint}")
        sources = {file.path: self._source(file, checkpoint) for file in changed}
        size = megabytes(sum(file.size for file in changed))
        say(f"  uploading {len(changed)} of {len(files)} files, {size}" + (f"; deleting {len(stale)}" if stale else ""))

        def commit() -> str:
            operations = [CommitOperationAdd(path, source) for path, source in sources.items()]
            operations += [CommitOperationDelete(path) for path in stale]
            message = f"Deploy {plan.model} with remote-vae {__version__}"
            return self.account.api.create_commit(self.id, operations, commit_message=message).oid

        return call(f"upload to {self.id}", commit)

    def _source(self, file: RepoFile, checkpoint: ModelInfo | None) -> bytes | Path:
        """The file's content, fetched from the checkpoint first where it lies there."""
        if not isinstance(file.content, RepoSibling):
            return file.content
        token = self.account.token
        name, revision = file.content.rfilename, checkpoint.sha
        return Path(call(f"download {name}", hf_hub_download, checkpoint.id, name, revision=revision, token=token))

    def delete(self) -> None:
        call(f"delete {self.id}", self.account.api.delete_repo, self.id, missing_ok=True)
