"""What was asked for: checked, with every default filled in. Nothing here needs a token or a network."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from handlers import MODELS
from handlers.base import EndpointHandler
from handlers.model import Model
from scripts.deployment import hardware
from scripts.deployment.console import DeployError

if TYPE_CHECKING:
    from huggingface_hub import InferenceEndpointHardware

CALLERS: dict[str, str] = {
    "authenticated": "anyone with a token of any Hugging Face account",
    "private": "only you, or the members of the organization, with a token",
    "public": "anyone, without a token",
}
FRAMEWORK = "pytorch"
TASK = "custom"
TAG = "remote-vae"
"""Marks an endpoint as this project's; beside it is the tag of each of its models."""
WEIGHT_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"


def tag_of(model: str) -> str:
    """The model's key as the platform takes it in names: with no dot."""
    return model.replace(".", "-")


def default_name(*models: str) -> str:
    return "-".join([TAG, *map(tag_of, models)])


@dataclass(frozen=True)
class Source:
    """Where one model's weights come from."""

    model: str
    kind: Literal["checkpoint", "hub", "folder"]
    """Copied from the checkpoint into the endpoint's repository; fetched from it at every start; or uploaded."""
    folder: Path | None = None

    @property
    def handler(self) -> type[EndpointHandler]:
        return MODELS[self.model]

    @property
    def origin(self) -> str:
        """A repository on the Hub, or a folder."""
        if self.kind != "folder":
            return self.handler.checkpoint
        return f"models/{self.model}" if str(self.folder) == self.handler.checkpoint else "a local folder"

    @property
    def license_link(self) -> str:
        return self.handler.license_link or f"https://huggingface.co/{self.handler.checkpoint}"


@dataclass(frozen=True)
class Plan:
    """One endpoint to be: what `scripts/deploy.py` declares as options, by the same names."""

    models: tuple[str, ...]
    """The first one answers at the endpoint's root."""
    namespace: str | None
    name: str
    instance: str
    size: str
    vendor: str
    region: str
    access: str
    min_replica: int
    max_replica: int
    scale_to_zero: int | None
    weights: str | None
    revision: str | None
    price: float | None = None
    """USD an hour for one replica: of the table, until the platform was asked."""
    sources: tuple[Source, ...] = field(default=())

    @classmethod
    def of(cls, model: str | None, **asked: Any) -> Plan:
        """Raises `DeployError` for a value that cannot be, naming the Makefile's variable."""
        models = find_models(model)
        for reason in filter(None, map(cannot_run, models)):
            raise DeployError(reason)
        dearest = max((MODELS[key] for key in models), key=hardware.by_price)
        asked["name"] = asked["name"] or default_name(*models)
        asked["instance"] = asked["instance"] or dearest.instance
        if asked["min_replica"] == 0 and asked["scale_to_zero"] < 1:
            raise DeployError("SCALE_TO_ZERO is in minutes, from 1; MIN_REPLICA=1 keeps a replica always on")
        asked["scale_to_zero"] = asked["scale_to_zero"] if asked["min_replica"] == 0 else None
        plan = cls(models, **asked)
        plan._check()
        price = hardware.table_price(plan.vendor, plan.instance, plan.size)
        return replace(plan, price=price, sources=tuple(find_source(key, plan) for key in models))

    def _check(self) -> None:
        if not NAME.fullmatch(self.name):
            raise DeployError(f"NAME={self.name} cannot be: at most 32 of a-z, 0-9 and -, with no - at either end")
        if self.access not in CALLERS:
            raise DeployError(f"ACCESS={self.access} cannot be: it is one of {', '.join(CALLERS)}")
        if not 0 <= self.min_replica <= self.max_replica or self.max_replica < 1:
            raise DeployError(
                f"MIN_REPLICA={self.min_replica} MAX_REPLICA={self.max_replica} cannot be: 0 <= MIN <= MAX >= 1"
            )
        if len(self.models) > 1 and self.weights not in (None, "hub"):
            raise DeployError("WEIGHTS is a folder of one model's weights: name one MODEL, or WEIGHTS=hub")
        if len(self.models) > 1 and self.revision not in (None, "main"):
            raise DeployError("REVISION is a commit of one model's checkpoint: name one MODEL, or REVISION=main")
        if self.vendor == "aws":
            hardware.check_size(self.instance, self.size)
        memory = hardware.table_memory(self.instance, self.size)
        hardware.check_memory(self.handlers, self.instance, self.size, memory)

    def with_hardware(self, offered: list[InferenceEndpointHardware], kept: str | None, held: bool) -> Plan:
        """The plan with the region and the price that the platform has today.

        Args:
            offered: what the platform has; nothing where it did not tell.
            kept: the region of the endpoint that exists, which never changes.
            held: whether that endpoint has its instance, and its part of the quota, already.
        """
        region = kept if kept and self.region == "auto" else self.region
        wanted = (self.vendor, region, self.instance, self.size)
        same = [one for one in offered if wanted == (one.vendor, one.region, one.instance_type, one.instance_size)]
        if not offered or (held and not same):
            return replace(self, region="us-east-1" if region == "auto" else region)
        one = same[0] if held else hardware.choose(offered, *wanted, self.max_replica)
        memory = one.memory_gb if one.accelerator == "cpu" else (one.gpu_memory_gb or 0) / one.num_accelerators
        hardware.check_memory(self.handlers, self.instance, self.size, memory or None)
        return replace(self, region=one.region, price=one.price_per_hour)

    @property
    def model(self) -> str:
        """As the Makefile takes it."""
        return ",".join(self.models)

    @property
    def handlers(self) -> list[type[EndpointHandler]]:
        return [MODELS[key] for key in self.models]

    @property
    def accelerator(self) -> str:
        return "cpu" if hardware.is_cpu(self.instance) else "gpu"

    @property
    def variables(self) -> str:
        """What names this endpoint to the Makefile's other targets: `MODEL=flux NAME=mine`."""
        namespace = f" NAMESPACE={self.namespace}" if self.namespace else ""
        name = f" NAME={self.name}" if self.name != default_name(*self.models) else ""
        return f"MODEL={self.model}{namespace}{name}"

    @property
    def tags(self) -> list[str]:
        return [TAG, *map(tag_of, self.models)]

    @property
    def cost(self) -> list[str]:
        return hardware.describe_cost(self.price, self.min_replica, self.max_replica, self.scale_to_zero)


def find_models(model: str | None) -> tuple[str, ...]:
    """The keys in `flux` or `sd-v1,sdxl,flux`."""
    keys = tuple(key.strip() for key in (model or "").split(",") if key.strip())
    for key in keys or (None,):
        if key not in MODELS:
            asked = f"there is no model {key!r}" if key else "no model was named"
            raise DeployError(f"{asked}: MODEL is one of {', '.join(MODELS)}")
        if missing := [word for word in Model.__annotations__ if not hasattr(MODELS[key], word)]:
            raise DeployError(f"{key} does not declare {', '.join(missing)}; handlers/model.py says what that is")
    if len(set(keys)) < len(keys):
        raise DeployError(f"MODEL={model} names a model twice")
    return keys


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


def find_source(model: str, plan: Plan) -> Source:
    handler = MODELS[model]
    if plan.weights == "hub":
        if is_shipped(handler):
            raise DeployError(f"WEIGHTS=hub cannot be for {model}: its weights are in this project, not on the Hub")
        return Source(model, "hub")
    if plan.weights is None and not is_shipped(handler):
        return Source(model, "checkpoint")
    folder = Path(plan.weights or handler.checkpoint).expanduser()
    missing = [name for name in WEIGHT_FILES if not (folder / name).is_file()]
    if missing:
        raise DeployError(f"WEIGHTS={folder} has no {' and no '.join(missing)}")
    try:
        found = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (ValueError, AttributeError):
        raise DeployError(f"WEIGHTS={folder} has a config.json that is no JSON object") from None
    if found != handler.vae_class.rpartition(":")[2]:
        raise DeployError(f"WEIGHTS={folder} is an {found}, and this model an {handler.vae_class}")
    return Source(model, "folder", folder)
