"""How the service is configured: environment variables, and `endpoint.json` in a deployed repository."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ValidationError

from handlers.serving.limits import Limits

REPOSITORY = Path(__file__).parents[2]
"""The folder that holds `handler.py`: this project, or the repository that an endpoint was made from."""


def _separated(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _origin(value: str) -> str:
    """As browsers send it."""
    if value != "*" and not re.fullmatch(r"https?://[^/?#@\s*]+", value):
        raise ValueError("expected origins such as https://example.org, separated by commas, or *")
    return value.lower()


Origin = Annotated[str, AfterValidator(_origin)]


class Settings(Limits):
    """`VAE_<NAME>` in the environment sets each of these; the last three follow from `endpoint.json`."""

    model: str | None = None
    """Key of the model, as in `handlers.MODELS`; several are separated by commas."""
    weights: str | None = None
    """A folder with the weights, or "random" for the published architecture with seeded random ones.

    Of several models the folder holds one for each, under its key.
    """
    device: str | None = None
    """A torch device; None takes CUDA, then MPS, then the CPU."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """None takes the model's own on a GPU and float32 on a CPU."""
    fast: bool = False
    """Whether the fast pass is used where a check on the device finds it right and quicker (`fast_check`)."""
    exact: bool = False
    """Whether every request is run as diffusers runs it, bit for bit, as with `exact` in each; else it is refused."""
    api_token: str | None = None
    """What every POST must send as a Bearer token. From the variable `API_TOKEN`."""
    cors_origins: Annotated[tuple[Origin, ...], BeforeValidator(_separated)] = ()
    """Origins whose pages may call the service, as `https://a.example,https://b.example`, or `*` for all."""
    foreign_repository: bool = False
    """Whether the repository is that of another model, so that the weights in it are not this one's."""
    revision: str | None = None
    """Commit of the checkpoint on the Hub, where the weights come from there."""
    revisions: dict[str, str] = {}
    """The same of each of several models, by its key."""

    @classmethod
    def load(cls, repository: Path = REPOSITORY) -> Settings:
        """Reads `endpoint.json` in `repository` where it is there, then the environment over it.

        With another model than the file's in the environment, nothing of the file holds.

        Raises:
            ValueError: a variable is blank or has a value that it cannot have, or two exclude each other; the message
                names it. An empty variable counts as unset, except `API_TOKEN`: an empty one would open the service.
        """
        endpoint = repository / "endpoint.json"
        values = json.loads(endpoint.read_text()) if endpoint.is_file() else {}
        if several := values.pop("models", None):
            values["model"] = ",".join(one["model"] for one in several)
            values["revisions"] = {one["model"]: one["revision"] for one in several if "revision" in one}
        if values and os.environ.get("VAE_MODEL", values.get("model")) != values.get("model"):
            values = {"foreign_repository": True}
        for name in cls.model_fields:
            value = os.environ.get(_variable(name), "")
            if value.isspace() or (name == "api_token" and _variable(name) in os.environ and not value):
                raise ValueError(f"{_variable(name)} is blank; give it a value, or unset it")
            if value:
                values[name] = value
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{_variable(str(first['loc'][0]))}: {first['msg']}, got {first['input']!r}") from None
        if settings.fast and settings.exact:
            raise ValueError("VAE_FAST and VAE_EXACT: only one can be on")
        return settings

    def of(self, key: str) -> Settings:
        """Those of one of several models."""
        weights = self.weights if self.weights in (None, "random") else str(Path(self.weights, key))
        return self.model_copy(update={"model": key, "weights": weights, "revision": self.revisions.get(key)})


def _variable(name: str) -> str:
    return "API_TOKEN" if name == "api_token" else f"VAE_{name.upper()}"
