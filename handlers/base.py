"""What every model has in common: `EndpointHandler`, in the custom-handler format of the Inference Toolkit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from handlers.model import Model


class EndpointHandler(Model):
    """A VAE as an endpoint. A subclass only declares what it is; everything else is the same for all.

    Reading the declarations needs no torch: it is imported when a handler is made.
    """

    models: ClassVar[Mapping[str, type[EndpointHandler]]] = {}
    """Of an endpoint for several VAEs, all of them by their keys; that class declares nothing else."""

    def __init__(self, path: str = "") -> None:
        """Loads the VAE. `path` is the folder that the toolkit mounted the repository at; "" where there is none."""
        from handlers.serving.pipeline import load_pipelines

        self.pipelines = load_pipelines(self.models or {"": type(self)}, path)
        self.pipeline = next(iter(self.pipelines.values()))

    def __call__(self, data: dict[str, Any]) -> Any:
        """Runs one request given as a plain object, as the toolkit's own routes do.

        Args:
            data: `inputs` is base64 text or bytes (a tensor with `shape` and `dtype` in the parameters, or an image or
                video file), a torch tensor, or a PIL image. `parameters` are those of the HTTP interface.

        Returns:
            A PIL image for `output_type="pil"` (a list of frames for a video model), a tensor where a tensor or bytes
            came in, bytes for an MP4 asked for so; else `{"inputs": <base64>, "parameters": {"shape", "dtype"}}`, which
            the toolkit can send as JSON.

        Raises:
            RequestError: the request is wrong; the message says what was wrong and what would be right.
        """
        return self.pipeline.run_object(data)
