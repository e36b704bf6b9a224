"""What was asked for: checked, with every default filled in. Nothing here needs a token or a network."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from handlers import MODELS
from handlers.base import EndpointHandler
from handlers.model import Model
from scripts.deployment.calls import DeployError
from scripts.deployment.prices import describe_cost, hourly_price

Access = Literal["authenticated", "private", "public"]

CALLERS: dict[str, str] = {
    "authenticated": "anyone with a token of any Hugging Face account",
    "private": "only you, or the members of the organization, with a token",
    "public": "anyone, without a token",
}
FRAMEWORK = "pytorch"
TASK = "custom"
TAG = "remote-vae"
"""Marks an endpoint as this project's; the model's own is the tag beside it."""
WEIGHT_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"


def tag_of(model: str) -> str:
    """The model's key as the platform takes it in names: with no dot."""
    return model.replace(".", "-")


def default_name(model: str) -> str:
    return f"remote-vae-{tag_of(model)}"


@dataclass(frozen=True)
class Plan:
    """One endpoint to be. `name` is that of the endpoint and of its repository; `scale_to_zero` is in minutes."""

    model: str
    namespace: str | None
    """User or organization; None for the token's own."""
    name: str
    instance: str
    size: str
    vendor: str
    region: str
    access: Access
    min_replica: int
    max_replica: int
    scale_to_zero: int | None
    weights: Path | Literal["checkpoint", "hub"]
    """A folder to upload them from, or the model's checkpoint to copy them from; "hub" leaves them out: the endpoint
    then fetches them from the checkpoint at every start."""

    @classmethod
    def of(
        cls,
        model: str | None,
        *,
        namespace: str | None = None,
        name: str | None = None,
        instance: str | None = None,
        size: str = "x1",
        vendor: str = "aws",
        region: str = "us-east-1",
        access: str = "authenticated",
        min_replica: int = 0,
        max_replica: int = 1,
        scale_to_zero: int = 15,
        weights: str | None = None,
    ) -> Plan:
        """Raises `DeployError` for a value that cannot be, naming the Makefile's variable."""
        handler = find_model(model)
        if reason := cannot_run(model):
            raise DeployError(reason)
        name = name or default_name(model)
        if not NAME.fullmatch(name):
            raise DeployError(f"NAME={name} cannot be: at most 32 of a-z, 0-9 and -, with no - at either end")
        if access not in CALLERS:
            raise DeployError(f"ACCESS={access} cannot be: it is one of {', '.join(CALLERS)}")
        if not 0 <= min_replica <= max_replica or max_replica < 1:
            raise DeployError(f"MIN_REPLICA={min_replica} MAX_REPLICA={max_replica} cannot be: 0 <= MIN <= MAX >= 1")
        if min_replica == 0 and scale_to_zero < 1:
            raise DeployError("SCALE_TO_ZERO is in minutes, from 1; MIN_REPLICA=1 keeps a replica always on")
        return cls(
            model=model,
            namespace=namespace,
            name=name,
            instance=instance or handler.instance,
            size=size,
            vendor=vendor,
            region=region,
            access=access,
            min_replica=min_replica,
            max_replica=max_replica,
            scale_to_zero=scale_to_zero if min_replica == 0 else None,
            weights=_find_weights(handler, weights),
        )

    @property
    def handler(self) -> type[EndpointHandler]:
        return MODELS[self.model]

    @property
    def accelerator(self) -> str:
        return "cpu" if self.instance.startswith(("intel", "amd")) else "gpu"

    @property
    def variables(self) -> str:
        """What names this endpoint to the Makefile's other targets: `MODEL=flux NAME=mine`."""
        namespace = f" NAMESPACE={self.namespace}" if self.namespace else ""
        name = f" NAME={self.name}" if self.name != default_name(self.model) else ""
        return f"MODEL={self.model}{namespace}{name}"

    @property
    def tags(self) -> list[str]:
        return [TAG, tag_of(self.model)]

    @property
    def price(self) -> float | None:
        """USD an hour for one replica."""
        return hourly_price(self.vendor, self.instance, self.size)

    @property
    def cost(self) -> list[str]:
        return describe_cost(self.price, self.min_replica, self.max_replica, self.scale_to_zero)

    @property
    def checkpoint(self) -> str:
        """Where the weights are from: a repository on the Hub, or a folder."""
        if self.weights in ("checkpoint", "hub"):
            return self.handler.checkpoint
        return f"models/{self.model}" if str(self.weights) == self.handler.checkpoint else "a local folder"

    @property
    def license_link(self) -> str:
        return self.handler.license_link or f"https://huggingface.co/{self.handler.checkpoint}"


def find_model(model: str | None) -> type[EndpointHandler]:
    if model not in MODELS:
        asked = f"there is no model {model!r}" if model else "no model was named"
        raise DeployError(f"{asked}: MODEL is one of {', '.join(MODELS)}")
    if missing := [word for word in Model.__annotations__ if not hasattr(MODELS[model], word)]:
        raise DeployError(f"{model} does not declare {', '.join(missing)}; handlers/model.py says what that is")
    return MODELS[model]


def cannot_run(model: str) -> str | None:
    """Why an endpoint cannot run it; None where it can. requirements.txt bounds diffusers there, and not elsewhere."""
    handler = MODELS[model]
    bound = re.search(r"^diffusers\b.*<([\d.]+)", REQUIREMENTS.read_text(), re.MULTILINE)
    if bound is None or _version(handler.diffusers) < _version(bound[1]):
        return None
    return (
        f"{model} cannot run on an endpoint: its {handler.vae_class} needs diffusers {handler.diffusers} or later, and "
        f"endpoints have one before {bound[1]}; `make serve MODEL={model}` runs it on a machine of your own"
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def is_shipped(handler: type[EndpointHandler]) -> bool:
    """Whether the model's weights are part of this project."""
    return Path(handler.checkpoint).is_absolute()


def _find_weights(handler: type[EndpointHandler], weights: str | None) -> Path | Literal["checkpoint", "hub"]:
    if weights == "hub":
        if is_shipped(handler):
            raise DeployError("WEIGHTS=hub cannot be for this model: its weights are in this project, not on the Hub")
        return "hub"
    if weights is None and not is_shipped(handler):
        return "checkpoint"
    folder = Path(weights or handler.checkpoint).expanduser()
    missing = [name for name in WEIGHT_FILES if not (folder / name).is_file()]
    if missing:
        raise DeployError(f"WEIGHTS={folder} has no {' and no '.join(missing)}")
    try:
        found = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (ValueError, AttributeError):
        raise DeployError(f"WEIGHTS={folder} has a config.json that is no JSON object") from None
    if found != handler.vae_class.rpartition(":")[2]:
        raise DeployError(f"WEIGHTS={folder} is an {found}, and this model an {handler.vae_class}")
    return folder
