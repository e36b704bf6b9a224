"""Base class of all models: `EndpointHandler`, in the custom-handler format of the Inference Toolkit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from handlers.model import Model


class EndpointHandler(Model):
    """A VAE as an endpoint. A subclass only declares attributes of `Model`.

    Reading the declarations needs no torch: creating a handler imports it.
    """

    models: ClassVar[Mapping[str, type[EndpointHandler]]] = {}
    """Models of an endpoint for several VAEs, by key. That class declares nothing else."""

    def __init__(self, path: str = "") -> None:
        """Load the VAE. `path` is the folder of the deployed repository, or ""."""
        from handlers.serving.pipeline import load_pipelines

        self.pipelines = load_pipelines(self.models or {"": type(self)}, path)
        self.pipeline = next(iter(self.pipelines.values()))

    def __call__(self, data: dict[str, Any]) -> Any:
        """Run one request, like POST /predict with JSON. The toolkit's own routes would call this.

        Args:
            data: `inputs` is base64 text of a tensor, an image or a video; `parameters` are those of the HTTP API.

        Returns:
            Base64 text of a file, or `{"inputs": <base64>, "parameters": {"shape", "dtype"}}` for a tensor.

        Raises:
            RequestError: the request is wrong.
        """
        return self.pipeline.run_message(data)
