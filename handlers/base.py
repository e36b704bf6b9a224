"""What every model has in common: `EndpointHandler`, in the custom-handler format of the Inference Toolkit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from handlers.serving.pipeline import Pipeline


class EndpointHandler:
    """A VAE as an endpoint. A subclass only declares what it is; everything else is the same for all.

    Reading the declarations needs no torch: it is imported when a handler is made.
    """

    checkpoint: ClassVar[str]
    """Repository on the Hub, or a local folder, that holds the weights."""
    subfolder: ClassVar[str | None] = None
    """Folder of the VAE inside the checkpoint; None where it lies at the root."""
    vae_class: ClassVar[str]
    """Class in diffusers."""
    kind: ClassVar[Literal["image", "video"]] = "image"
    """Latents are [B, C, H, W] for "image" and [B, C, F, H, W] for "video"."""
    dtype: ClassVar[str]
    """What the weights run in on a GPU; on a CPU every model runs in float32."""
    fps: ClassVar[int] = 24
    """Frames per second of an MP4 for which the request names none."""
    published_config: ClassVar[dict[str, Any]]
    """The checkpoint's `config.json` where it differs from the defaults of `vae_class`.

    It describes the model before it is loaded (`make models`) and builds it with random weights. A loaded VAE is
    described by its own config.
    """

    instance: ClassVar[str] = "nvidia-l4"
    """Smallest instance type of Inference Endpoints that decodes the model's usual sizes without tiling."""
    license: ClassVar[str] = "other"
    """Of the checkpoint, as the Hub spells it."""
    license_link: ClassVar[str | None] = None
    """None for the checkpoint's page."""
    weights_mb: ClassVar[int | None] = None
    """Size of the checkpoint's safetensors in MB, for a plan made without a network; None where nobody looked."""

    values_per_pixel: ClassVar[tuple[int, int]] = (770, 440)
    """Numbers alive at the peak of decoding for each pixel of the result, as diffusers runs it and in reduced memory.

    By these a picture is decoded as a whole or in tiles. Measured for the Stable Diffusion and Flux architectures with
    `scripts.benchmark.peak`: 768, and 434 at 256x256 falling to 389 at 2048x2048.
    """
    frames_at_once: ClassVar[int] = 1
    """Frames that diffusers has in memory at a time."""

    def __init__(self, path: str = "") -> None:
        """Loads the VAE. `path` is the folder that the toolkit mounted the repository at; "" where there is none."""
        from handlers.serving.pipeline import Pipeline

        self.pipeline: Pipeline = Pipeline.load(type(self), path)

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
