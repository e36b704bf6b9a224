"""What was asked for: checked, with every default filled in. Nothing here needs a token or a network."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from handlers import MODELS, get_models
from handlers.model import Model
from scripts.console import DeployError
from scripts.instances import HOURLY, by_price, check_memory, check_place, table_memory, table_price
from scripts.models import cannot_run, is_shipped

CALLERS = {
    "authenticated": "anyone with a token of any Hugging Face account",
    "private": "only you, or the members of the organization, with a token",
    "public": "anyone, without a token",
}
PENDING = 1.5
"""Requests that wait or are worked on, a replica: at more of them there is one replica more."""
TAG = "remote-vae"
"""Marks an endpoint as this project's; beside it is the tag of each of its models."""
WEIGHT_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


def tag_of(model: str) -> str:
    """The model's key as the platform takes it in names: with no dot."""
    return model.replace(".", "-")


def default_name(*models: str) -> str:
    return "-".join([TAG, *map(tag_of, models)])


def variables(models: Sequence[str], namespace: str | None, name: str) -> str:
    """What names an endpoint to the Makefile's targets: `MODEL=flux NAME=mine`."""
    given = {"NAMESPACE": namespace, "NAME": name if name != default_name(*models) else None}
    return " ".join([f"MODEL={','.join(models)}", *(f"{key}={value}" for key, value in given.items() if value)])


def addresses(url: str, models: Sequence[str]) -> dict[str, str]:
    """Where each model answers. Of several each has its own path; the first one answers at the root too."""
    return {model: url if len(models) == 1 else f"{url}/{model}" for model in models}


@dataclass(frozen=True)
class Plan:
    """One endpoint to be: what `scripts/deploy.py` takes as options, by the same names."""

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
    price: float | None = None
    """USD an hour for one replica: of the table, until the platform was asked."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Of the models whose weights are uploaded from one."""

    @classmethod
    def of(cls, model: str | None, name: str | None = None, instance: str | None = None, **asked: Any) -> Plan:
        """Raises `DeployError` for a value that cannot be, naming the Makefile's variable."""
        models = find_models(model)
        for reason in filter(None, map(cannot_run, models)):
            raise DeployError(reason)
        dearest = max((MODELS[key] for key in models), key=by_price)
        plan = cls(models, name or default_name(*models), instance or dearest.instance, **asked)
        plan._check()
        sleeps, price = not plan.min_replica, table_price(plan.vendor, plan.instance, plan.size)
        folders = {key: folder for key in models if (folder := find_folder(key, plan.weights))}
        return replace(plan, scale_to_zero=plan.scale_to_zero if sleeps else None, price=price, folders=folders)

    def _check(self) -> None:
        """What has to be true, by what is said where it is not."""
        low, high, single = self.min_replica, self.max_replica, len(self.models) == 1
        sizes = HOURLY.get(self.instance, [self.size]) if self.vendor == "aws" else [self.size]
        named = NAME.fullmatch(self.name)
        rules = {
            f"NAME={self.name} cannot be: at most 32 of a-z, 0-9 and -, with no - at either end": named,
            f"ACCESS={self.access} cannot be: it is one of {', '.join(CALLERS)}": self.access in CALLERS,
            f"MIN_REPLICA={low} MAX_REPLICA={high} cannot be: 0 <= MIN <= MAX >= 1": 0 <= low <= high >= 1,
            "SCALE_TO_ZERO is in minutes, from 1; MIN_REPLICA=1 never sleeps": low or self.scale_to_zero >= 1,
            "WEIGHTS is a folder of one model's weights: name one MODEL": single or self.weights in (None, "hub"),
            "REVISION is a commit of one checkpoint: name one MODEL": single or self.revision in (None, "main"),
            f"SIZE={self.size} cannot be: {self.instance} has {', '.join(sizes)}": self.size in sizes,
        }
        if broken := [message for message, kept in rules.items() if not kept]:
            raise DeployError(broken[0])
        check_place(self.vendor, self.region)
        check_memory(self.models, self.instance, self.size, table_memory(self.instance, self.size))

    @property
    def model(self) -> str:
        """As the Makefile takes it."""
        return ",".join(self.models)

    @property
    def tags(self) -> list[str]:
        return [TAG, *map(tag_of, self.models)]


def find_models(model: str | None) -> tuple[str, ...]:
    """The keys in `flux` or `sd-v1,sdxl,flux`."""
    try:
        models = get_models(model)
    except ValueError as error:
        raise DeployError(str(error)) from None
    for key, handler in models.items():
        if missing := [word for word in Model.__annotations__ if not hasattr(handler, word)]:
            raise DeployError(f"{key} does not declare {', '.join(missing)}; handlers/model.py says what that is")
    return tuple(models)


def find_folder(model: str, weights: str | None) -> Path | None:
    """The folder that the model's weights are uploaded from, checked; None where they are on the Hub.

    `weights` is a folder, "hub" for those that the endpoint fetches itself, or None for the model's own.
    """
    handler = MODELS[model]
    if weights == "hub" and is_shipped(model):
        raise DeployError(f"WEIGHTS=hub cannot be for {model}: its weights are in this project, not on the Hub")
    if weights == "hub" or (weights is None and not is_shipped(model)):
        return None
    folder, found = Path(weights or handler.checkpoint).expanduser(), "unknown class"
    if missing := [name for name in WEIGHT_FILES if not (folder / name).is_file()]:
        raise DeployError(f"WEIGHTS={folder} has no {' and no '.join(missing)}")
    with suppress(ValueError, AttributeError):  # a config.json that is no JSON object
        found = json.loads((folder / "config.json").read_text()).get("_class_name", found)
    if found != handler.vae_class.rpartition(":")[2]:
        raise DeployError(f"WEIGHTS={folder} is an {found}, and this model an {handler.vae_class}")
    return folder
