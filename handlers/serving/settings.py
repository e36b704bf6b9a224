"""How the service is configured: environment variables, and `endpoint.json` in a deployed repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

REPOSITORY = Path(__file__).parents[2]
"""The folder that holds `handler.py`: this project, or the repository that an endpoint was made from."""


class Settings(BaseModel):
    """`VAE_<NAME>` in the environment sets each of these; the last two follow from `endpoint.json`."""

    model_config = ConfigDict(frozen=True)

    model: str | None = None
    """Key of the model, as in `handlers.MODELS`."""
    weights: str | None = None
    """A folder with the weights, or "random" for the published architecture with seeded random ones."""
    device: str | None = None
    """A torch device; None takes CUDA, then MPS, then the CPU."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """None takes the model's own on a GPU and float32 on a CPU."""
    max_body_mb: Annotated[float, Field(gt=0)] = 512
    """Megabytes of a request's body; a minute of 720p video as uint8 pixels is about this much."""
    max_queue: Annotated[int, Field(ge=1)] = 64
    """Requests that may wait for a device; one more is told to come back."""
    foreign_repository: bool = False
    """Whether the repository is that of another model, so that the weights in it are not this one's."""
    revision: str | None = None
    """Commit of the checkpoint on the Hub, where the weights come from there."""

    @classmethod
    def load(cls, repository: Path = REPOSITORY) -> Settings:
        """Reads `endpoint.json` in `repository` where it is there, then the environment over it.

        With another model than the file's in the environment, nothing of the file holds.

        Raises:
            ValueError: a variable has a value that it cannot have; the message names it.
        """
        endpoint = repository / "endpoint.json"
        values = json.loads(endpoint.read_text()) if endpoint.is_file() else {}
        if values and os.environ.get("VAE_MODEL", values.get("model")) != values.get("model"):
            values = {"foreign_repository": True}
        for name in cls.model_fields:
            if value := os.environ.get(f"VAE_{name.upper()}"):
                values[name] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            variable = f"VAE_{str(first['loc'][0]).upper()}"
            raise ValueError(f"{variable}: {first['msg']}, got {first['input']!r}") from None
