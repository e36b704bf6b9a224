"""The options of one deployment, checked, with every default filled in. Nothing here needs a token or a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from handlers import MODELS, get_models
from handlers.model import Model
from handlers.serving.vae.hub import Repository
from scripts.console import DeployError
from scripts.deployment.weights import Files, find_weights
from scripts.instances import HOURLY, check_memory, check_region, instance_price, table_memory, table_price
from scripts.models import why_not_deployable

CALLERS = {
    "authenticated": "anyone with a token of any Hugging Face account",
    "private": "only you, or the members of the organization, with a token",
    "public": "anyone, without a token",
}
PENDING = 1.5
"""Pending requests per replica above which the platform starts one more replica."""
TAG = "remote-vae"
"""The tag of every endpoint of this project. Each of its models has a tag too."""
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
IMAGE = re.compile(r"[a-z0-9][\w.-]*(:\d+)?(/[a-z0-9][a-z0-9._-]*)+(:\w[\w.-]*|@sha256:[0-9a-f]{64})", re.ASCII)
"""A container image in a registry, with its tag or its digest."""


def model_tag(model: str) -> str:
    """Return the model's key without dots, which the platform does not take in names."""
    return model.replace(".", "-")


def default_name(*models: str) -> str:
    return "-".join([TAG, *map(model_tag, models)])


def make_variables(models: Sequence[str], namespace: str | None, name: str) -> str:
    """Return the variables that name an endpoint to `make`: `MODEL=flux NAME=mine`."""
    variables = {"MODEL": ",".join(models), "NAMESPACE": namespace}
    variables["NAME"] = name if name != default_name(*models) else None
    return " ".join(f"{key}={value}" for key, value in variables.items() if value)


def addresses(url: str, models: Sequence[str]) -> dict[str, str]:
    """Return the URL of each model. Several models have a path each; the first one is also at the root."""
    return {model: url if len(models) == 1 else f"{url}/{model}" for model in models}


@dataclass(frozen=True)
class Plan:
    """One deployment: the options of `scripts/deploy.py`, by the same names."""

    models: tuple[str, ...]
    name: str
    instance: str
    namespace: str | None = None
    size: str = "x1"
    vendor: str = "aws"
    region: str = "us-east-1"
    access: str = "authenticated"
    min_replica: int = 0
    max_replica: int = 1
    scale_to_zero: int | None = 15
    weights: str | None = None
    revision: str | None = None
    image: str | None = None
    """Container image of this project; None for the stock Inference Toolkit."""
    price: float | None = None
    """USD an hour for one replica: from the table, until the platform is asked."""
    sources: dict[str, Files | Repository] = field(default_factory=dict)
    """The weights of each model: files that are uploaded, or a repository on the Hub."""

    @classmethod
    def create(cls, model: str | None, name: str | None = None, instance: str | None = None, **options: Any) -> Plan:
        """Check the options and fill in the defaults. `DeployError` names the Makefile's variable that is wrong."""
        models = find_models(model)
        for key in models:
            if reason := why_not_deployable(key, options.get("image"), options.get("weights")):
                raise DeployError(reason)
        dearest = max((MODELS[key] for key in models), key=instance_price)
        plan = cls(models, name or default_name(*models), instance or dearest.instance, **options)
        plan._check()
        scale_to_zero = None if plan.min_replica else plan.scale_to_zero
        price = table_price(plan.vendor, plan.instance, plan.size)
        sources = {key: find_weights(key, plan.weights) for key in models}
        if plan.revision and any(isinstance(source, Repository) and source.revision for source in sources.values()):
            raise DeployError("WEIGHTS and REVISION both name a revision: name one")
        return replace(plan, scale_to_zero=scale_to_zero, price=price, sources=sources)

    def _check(self) -> None:
        """Raise `DeployError` for the first value that is not valid."""
        low, high = self.min_replica, self.max_replica
        sizes = HOURLY.get(self.instance, [self.size]) if self.vendor == "aws" else [self.size]
        if not NAME.fullmatch(self.name):
            raise DeployError(f"NAME={self.name} is not valid: use 1 to 32 of a-z, 0-9 and -, with no - at either end")
        if self.image and not IMAGE.fullmatch(self.image):
            example = "as in ghcr.io/someone/remote-vae:0.1.0-cuda"
            raise DeployError(f"IMAGE={self.image} is not valid: name its registry and its tag or digest, {example}")
        if self.access not in CALLERS:
            raise DeployError(f"ACCESS={self.access} is not valid: choose one of {', '.join(CALLERS)}")
        if not 0 <= low <= high >= 1:
            raise DeployError(f"MIN_REPLICA={low} MAX_REPLICA={high} is not valid: 0 <= MIN <= MAX, and MAX >= 1")
        if not low and self.scale_to_zero < 1:
            raise DeployError("SCALE_TO_ZERO is in minutes, 1 or more; MIN_REPLICA=1 never scales to zero")
        if len(self.models) > 1 and self.weights is not None:
            raise DeployError("WEIGHTS are the weights of one model: name one MODEL")
        if len(self.models) > 1 and self.revision not in (None, "main"):
            raise DeployError("REVISION is a commit of one checkpoint: name one MODEL")
        if self.size not in sizes:
            raise DeployError(f"SIZE={self.size} is not valid: {self.instance} has {', '.join(sizes)}")
        check_region(self.vendor, self.region)
        check_memory(self.models, self.instance, self.size, table_memory(self.instance, self.size))

    @property
    def model(self) -> str:
        """The value of MODEL."""
        return ",".join(self.models)

    @property
    def uploads(self) -> dict[str, Files]:
        """The files of weights that are uploaded, by model."""
        return {key: source for key, source in self.sources.items() if isinstance(source, dict)}

    @property
    def checkpoints(self) -> dict[str, Repository]:
        """The repositories on the Hub that weights are copied from, by model."""
        return {key: source for key, source in self.sources.items() if isinstance(source, Repository)}

    @property
    def tags(self) -> list[str]:
        return [TAG, *map(model_tag, self.models)]


def find_models(model: str | None) -> tuple[str, ...]:
    """Return the keys in `flux` or `sd-v1,sdxl,flux`."""
    try:
        models = get_models(model)
    except ValueError as error:
        raise DeployError(str(error)) from None
    for key, handler in models.items():
        if missing := [name for name in Model.__annotations__ if not hasattr(handler, name)]:
            raise DeployError(f"{key} does not declare {', '.join(missing)}; handlers/model.py says what that is")
    return tuple(models)
