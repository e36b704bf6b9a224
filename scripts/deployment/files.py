"""What goes into the endpoint's repository: exactly this, and nothing else of the working tree."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from handlers import __version__
from scripts.deployment.calls import DeployError
from scripts.deployment.card import model_card
from scripts.deployment.plan import WEIGHT_FILES, Plan

PROJECT = Path(__file__).parents[2]
UNKNOWN_COMMIT = "0" * 40
"""Stands for the checkpoint's commit in a dry run, which does not ask the Hub for it."""


@dataclass(frozen=True)
class RepoFile:
    """A file of the repository: its content, a file on this machine, or one of a checkpoint on the Hub."""

    path: str
    content: bytes | Path | RepoSibling

    @property
    def size(self) -> int:
        """In bytes."""
        if isinstance(self.content, RepoSibling):
            return self.content.size
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def is_same(self, remote: RepoSibling | None) -> bool:
        """Whether the repository has it with this content already. Files in LFS compare by SHA-256, others by git's."""
        if remote is None:
            return False
        if isinstance(self.content, RepoSibling):
            return _digest(self.content) == _digest(remote)
        if remote.lfs is None:
            return (
                git_hash(self.content if isinstance(self.content, bytes) else self.content.read_bytes())
                == remote.blob_id
            )
        if isinstance(self.content, bytes):
            return False
        with self.content.open("rb") as file:
            return sha_fileobj(file).hex() == remote.lfs.sha256


def _digest(file: RepoSibling) -> str | None:
    return file.lfs.sha256 if file.lfs else file.blob_id


def code_files() -> list[RepoFile]:
    """`handler.py`, `handlers/` and `requirements.txt`."""
    modules = sorted(
        path
        for path in (PROJECT / "handlers").rglob("*")
        if path.is_file() and path.suffix in (".py", ".html") and not path.name.startswith(".")
    )
    paths = [PROJECT / "handler.py", *modules, PROJECT / "requirements.txt"]
    return [RepoFile(path.relative_to(PROJECT).as_posix(), path) for path in paths]


def generated_files(plan: Plan, revision: str | None) -> list[RepoFile]:
    """`endpoint.json`, which tells `handler.py` what it serves, and the model card."""
    record = {"model": plan.model, "checkpoint": plan.checkpoint, "revision": revision, "version": __version__}
    if revision is None:
        del record["revision"]
    return [
        RepoFile("endpoint.json", (json.dumps(record, indent=2) + "\n").encode()),
        RepoFile("README.md", model_card(plan, revision).encode()),
    ]


def local_weights(plan: Plan) -> list[RepoFile]:
    """The weights of a folder on this machine."""
    return [RepoFile(f"vae/{name}", plan.weights / name) for name in WEIGHT_FILES]


def checkpoint_weights(plan: Plan, checkpoint: ModelInfo) -> list[RepoFile]:
    """The VAE's files of a checkpoint on the Hub, never the rest of the pipeline."""
    folder = f"{plan.handler.subfolder}/" if plan.handler.subfolder else ""
    remote = {file.rfilename: file for file in checkpoint.siblings}
    missing = [folder + name for name in WEIGHT_FILES if folder + name not in remote]
    if missing:
        raise DeployError(f"{plan.checkpoint} has no {' and no '.join(missing)} at commit {checkpoint.sha[:8]}")
    return [RepoFile(f"vae/{name}", remote[folder + name]) for name in WEIGHT_FILES]


def repository_files(plan: Plan, checkpoint: ModelInfo | None) -> list[RepoFile]:
    """Everything that is uploaded. `checkpoint` is None where the weights are on this machine."""
    if isinstance(plan.weights, Path):
        weights = local_weights(plan)
    else:
        weights = checkpoint_weights(plan, checkpoint) if plan.weights == "checkpoint" else []
    return [*code_files(), *generated_files(plan, checkpoint.sha if checkpoint else None), *weights]


def describe_files(plan: Plan) -> list[tuple[str, int | None]]:
    """The same without a network, as (path, bytes): of weights on the Hub the sizes are the published ones, rounded."""
    if isinstance(plan.weights, Path):
        return [(file.path, file.size) for file in repository_files(plan, None)]
    listed = [(file.path, file.size) for file in (*code_files(), *generated_files(plan, UNKNOWN_COMMIT))]
    if plan.weights == "checkpoint":
        megabytes = plan.handler.weights_mb
        sizes = (1_000, megabytes and megabytes * 1_000_000)
        listed += [(f"vae/{name}", size) for name, size in zip(WEIGHT_FILES, sizes, strict=True)]
    return listed
