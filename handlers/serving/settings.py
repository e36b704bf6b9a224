"""Configuration of the service: environment variables, and `endpoint.json` in a deployed repository."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from handlers.serving.limits import Limits

REPOSITORY = Path(os.environ.get("VAE_REPOSITORY") or Path(__file__).parents[2])
"""Folder with `endpoint.json` and weights: that of `handler.py`, unless the environment names another."""

WARM_UP = 5.0
"""Most seconds of a pass of the warm-up on a GPU."""


def _separated(value: Any) -> Any:
    return [text.strip() for text in value.split(",") if text.strip()] if isinstance(value, str) else value


def _origin(value: str) -> str:
    """Check an origin and return it in lower case, like browsers send it."""
    if value != "*" and not re.fullmatch(r"https?://[^/?#@\s*]+", value):
        raise ValueError("expected origins such as https://example.org, separated by commas, or *")
    return value.lower()


Origin = Annotated[str, AfterValidator(_origin)]


class Settings(Limits):
    """Settings of the service. `VAE_<NAME>` in the environment sets each, and `endpoint.json` the last three."""

    model: str | None = None
    """Key of the model in `handlers.MODELS`; several keys are separated by commas."""
    weights: str | None = None
    """Folder, .safetensors file or `org/repo[:subfolder][@revision]`, or "random" for seeded random values.

    For several models, the folder has a subfolder for each, named by its key.
    """
    device: str | None = None
    """Torch device; None uses CUDA, then MPS, then the CPU."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Dtype of the weights; None uses the model's own on a GPU and float32 on a CPU. A CPU with instructions for
    bfloat16 then decodes in bfloat16, as a fast pass."""
    fast: bool | None = None
    """True if a fast pass is used when a check on the device finds it accurate and faster (`fast/check.py`).

    None allows it on a CPU, unless `dtype` or `exact` is set."""
    exact: bool = False
    """True if every request runs diffusers' own pass, bit for bit, or is refused (`exact` of a request)."""
    warm_up: Annotated[float | None, Field(ge=0)] = None
    """Most seconds of a pass that runs before the first request, at the model's usual size; 0 for no pass.

    None is `WARM_UP` on a GPU, and 0 on a CPU, whose first pass takes little longer than the next ones."""
    api_token: str | None = None
    """Bearer token that every POST must send. The variable is `API_TOKEN`."""
    cors_origins: Annotated[tuple[Origin, ...], BeforeValidator(_separated)] = ()
    """Origins whose pages may call the service: `https://a.example,https://b.example`, or `*` for all."""
    foreign_repository: bool = False
    """True if the repository belongs to another model, so its weights are not used."""
    revision: str | None = None
    """Commit of the checkpoint on the Hub, for weights that are downloaded."""
    revisions: dict[str, str] = {}
    """Commits of the checkpoints of several models, by key."""

    @classmethod
    def load(cls, repository: Path = REPOSITORY) -> Settings:
        """Read `endpoint.json` in `repository`, if it exists, and the environment, which has priority.

        If the environment names another model than the file, the file is ignored.

        Raises:
            ValueError: a variable is blank or has a wrong value, or two exclude each other. An empty variable counts as
                unset, except `API_TOKEN`, because an empty token would open the service.
        """
        values = _read_endpoint(repository / "endpoint.json")
        if values and os.environ.get("VAE_MODEL", values.get("model")) != values.get("model"):
            values = {"foreign_repository": True}
        try:
            settings = cls.model_validate(values | cls._read_environment())
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{_variable(str(first['loc'][0]))}: {first['msg']}, got {first['input']!r}") from None
        if settings.fast and settings.exact:
            raise ValueError("VAE_FAST and VAE_EXACT: only one can be on; unset the other")
        return settings

    @classmethod
    def _read_environment(cls) -> dict[str, str]:
        sent = {name: os.environ[_variable(name)] for name in cls.model_fields if _variable(name) in os.environ}
        for name, value in sent.items():
            if value.isspace() or (name == "api_token" and not value):
                raise ValueError(f"{_variable(name)} is blank; give it a value, or unset it")
        return {name: value for name, value in sent.items() if value}

    def allows_fast(self, device_type: str) -> bool:
        """Return whether a device may run a fast pass."""
        if self.fast is None:
            return device_type == "cpu" and self.dtype is None and not self.exact
        return self.fast

    def warm_up_seconds(self, device_type: str) -> float:
        """Return the most seconds of a pass of the warm-up on a device; 0 for no warm-up."""
        if self.warm_up is None:
            return 0 if device_type == "cpu" else WARM_UP
        return self.warm_up

    def for_model(self, key: str) -> Settings:
        """Return the settings of one of several models."""
        weights = self.weights if self.weights in (None, "random") else str(Path(self.weights, key))
        return self.model_copy(update={"model": key, "weights": weights, "revision": self.revisions.get(key)})


def _read_endpoint(file: Path) -> dict[str, Any]:
    """Return the settings in `endpoint.json`; an empty dict without the file."""
    values = json.loads(file.read_text()) if file.is_file() else {}
    if models := values.pop("models", None):
        values["model"] = ",".join(model["model"] for model in models)
        values["revisions"] = {model["model"]: model["revision"] for model in models if "revision" in model}
    return values


def _variable(name: str) -> str:
    return "API_TOKEN" if name == "api_token" else f"VAE_{name.upper()}"
