"""`RemoteVAE`: an object of a real diffusers class whose `encode` and `decode` run on an endpoint."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from os import PathLike
from typing import Any

import diffusers
import torch
from diffusers.models import autoencoders
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from torch import Tensor, nn

from remote_vae import tensors
from remote_vae.batches import batch_limit, decoded_frames, fits_latents
from remote_vae.client import RemoteVAEError
from remote_vae.pool import AnyClient, connect
from remote_vae.tensors import memory_format
from remote_vae.text import visible
from remote_vae.threads import start_thread

logger = logging.getLogger("remote_vae")

CLASSES = re.compile(r"AutoencoderKL[A-Za-z0-9]*|AutoencoderDC|AutoencoderTiny")
"""Names of classes that an endpoint may choose. Other classes of diffusers may load what their config names."""


def RemoteVAE(url: str | Sequence[str], token: str | None = None, *, uint8: bool = False, **options: Any) -> Any:
    """Return a VAE whose passes run on an endpoint, for every pipeline that takes a VAE.

    It is an object of the class that the endpoint runs, with the checkpoint's config and statistics, but without
    weights, so it takes no memory. `encode` and `decode` return what the local class returns, in the dtype of their
    input. `decode_async` decodes while the next image is generated. `decode_stream` yields a video's file while it
    is decoded. The endpoint decides about tiling and slicing.

    Args:
        url: URL of the endpoint, or several URLs of one model: the least busy gets a request, another if it fails.
        token: token of an endpoint that is not public. None: the Hugging Face login, for Hugging Face's own hosts.
        uint8: receive decoded pixels in 8 bits, a half or a quarter of the bytes. `decode` returns them as float32 in
            [-1, 1]. PIL images are the same, if the pipeline adds no watermark.
        options: further arguments of `Client`.

    Raises:
        ValueError: `url` is no URL of an endpoint.
        RemoteVAEError: the endpoint cannot be reached, or it is no endpoint of this project.
        ImportError: the installed diffusers lacks the VAE's class.
    """
    return RemotePasses(connect(url, token, **options), uint8).vae


class RemotePasses:
    """Methods that run on an endpoint, for a VAE without weights. `vae` has them, and this object as `vae.remote`."""

    def __init__(self, client: AnyClient, uint8: bool = False) -> None:
        self.client = client
        self.config = client.config()
        self.uint8 = uint8
        self.is_video = self.config["kind"] == "video"
        self.has_moments = "moments" in self.config["sample_modes"]
        self.has_warned = False
        """True once the user knows that some sizes do not fit the VAE."""
        self.vae = empty_vae(self.config)
        self.vae.remote = self
        self.vae.encode = self.encode
        self.vae.decode = self.decode
        self.vae.decode_async = self.decode_async
        self.vae.decode_stream = self.decode_stream
        self.vae.save_pretrained = self.save_config
        self.vae.fuse_qkv_projections = self.vae.unfuse_qkv_projections = self.keep_projections

    def keep_projections(self) -> None:
        """Do nothing, in place of `fuse_qkv_projections` and `unfuse_qkv_projections`, which change no values."""

    def save_config(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save the config alone, in place of `save_pretrained`: there are no weights."""
        self.vae.save_config(save_directory)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Encode pixels, in the shapes and the range that the local class takes, to the distribution of their latents.

        Sizes and frame counts that do not fit the VAE are encoded by diffusers' own pass (`exact`), so the latents are
        those of the local class.

        Raises:
            RemoteVAEError: the class cannot encode this shape, or the endpoint lacks the memory for its own pass.
        """
        arguments = self._arguments("encode", args, kwargs)
        pixels: Tensor = arguments["x"]
        latents = self._encode(self._to_service(pixels)).to(pixels.device, pixels.dtype)
        if pixels.ndim == 4:
            latents = latents.squeeze(2) if self.is_video else latents
            if memory_format(pixels):  # convolutions keep it
                latents = latents.contiguous(memory_format=torch.channels_last)
        output: Any
        if self.has_moments:
            output = AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(latents))
        elif isinstance(self.vae, diffusers.AutoencoderTiny):
            output = AutoencoderTinyOutput(latents=latents)
        else:
            output = EncoderOutput(latent=latents)
        return output if arguments.get("return_dict", True) else output.to_tuple()

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels to moments, or to the latents of a VAE that has none, in as many requests as are needed."""
        batch = pixels
        if pixels.ndim != len(self.config["pixels"]["layout"]):  # one has a dimension of frames, the other has none
            batch = pixels.unsqueeze(2) if pixels.ndim == 4 else pixels.squeeze(2)
        frames, height, width = (1, *batch.shape[2:])[-3:]
        side = self.config["latents"]["vae_scale_factor"]
        sizes = {"C": self.config["latents"]["channels"] * (2 if self.has_moments else 1)}
        parameters: dict[str, Any] = {
            "sample_mode": "moments" if self.has_moments else None,
            "memory_format": memory_format(pixels),
        }
        is_exact = not fits_latents(self.config, frames, height, width)
        if is_exact:
            parameters["exact"] = True
        else:
            sizes |= {"H": height // side, "W": width // side}
        layout = self.config["latents"]["layout"]
        latents = [
            self._checked(tensors.encode(self.client, piece, **parameters), layout, B=len(piece), **sizes)
            for piece in batch.split(batch_limit(self.config, batch, frames * height * width))
        ]
        if is_exact:
            self._warn_about_size(pixels)
        return torch.cat(latents)

    def _to_service(self, pixels: Tensor) -> Tensor:
        """Convert the local class's pixels to the service's, which are in [-1, 1]. Most classes have the same."""
        if not (statistics := self.config["pixels"]["statistics"]):
            return pixels
        mean, std = _expand(statistics, pixels)
        return (pixels * std + mean) * 2 - 1

    def _from_service(self, pixels: Tensor) -> Tensor:
        if not (statistics := self.config["pixels"]["statistics"]):
            return pixels
        mean, std = _expand(statistics, pixels)
        return (pixels / 2 + 0.5 - mean) / std

    def _warn_about_size(self, pixels: Tensor) -> None:
        """Tell the user once that pixels are left out or added. The local class does so silently."""
        if self.has_warned:
            return
        self.has_warned = True
        side, counts = self.config["latents"]["vae_scale_factor"], self.config["pixels"]["frame_counts"]
        frames = f" and {counts[0]}, {counts[1]}, {counts[2]}, ... frames" if self.is_video else ""
        logger.warning(
            "pixels of shape %s do not fit this VAE: it encodes heights and widths in multiples of %d%s. It leaves out "
            "or pads the rest, as diffusers does locally. This warning is not repeated.",
            list(pixels.shape),
            side,
            frames,
        )

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Decode raw latents, in the shapes that the local class takes, to pixels in its range, about [-1, 1].

        A VAE that decodes to a multiple of the size returns 3 channels, after its pixel shuffle.
        """
        arguments = self._arguments("decode", args, kwargs)
        latents: Tensor = arguments["z"] if "z" in arguments else arguments["x"]
        parameters = {"latents_layout": self.config["latents"]["layout"], "memory_format": memory_format(latents)}
        if (timestep := arguments.get("temb")) is not None:
            parameters |= {"decode_timestep": _single_value(timestep), "decode_noise_scale": 0}
        if self.is_video and latents.ndim == 4:  # the frames of a video are a batch of images
            frames = arguments.get("num_frames") or 1
            videos = latents.unflatten(0, (-1, frames)).movedim(1, 2)
            sample = self._decode(videos, parameters).movedim(2, 1).flatten(0, 1)
        else:
            sample = self._decode(latents, parameters)
            sample = sample.unsqueeze(2) if sample.ndim < latents.ndim else sample
        output = DecoderOutput(sample=self._from_service(sample))
        return output if arguments.get("return_dict", True) else output.to_tuple()

    def _decode(self, latents: Tensor, parameters: dict[str, Any]) -> Tensor:
        """Decode to [B, 3, H, W] or [B, 3, F, H, W] on the latents' device, in as many requests as are needed."""
        frames = decoded_frames(self.config, latents.shape[2]) if self.is_video else 1
        factor = self.config["latents"]["vae_scale_factor"] * self.config["pixels"]["upscale"]
        height, width = (factor * side for side in latents.shape[-2:])
        layout = self.config["pixels"]["layout"]
        limit = batch_limit(self.config, latents, frames * height * width)
        if self.uint8:
            parameters = {**parameters, "partial_postprocess": True}
            layout, limit = ("FHWC", 1) if self.is_video else ("BHWC", limit)
        sizes = {"C": self.config["pixels"]["channels"], "F": frames, "H": height, "W": width}
        pixels = [
            self._checked(tensors.decode(self.client, piece, **parameters), layout, B=len(piece), **sizes)
            for piece in latents.split(limit)
        ]
        if not self.uint8:
            return torch.cat(pixels).to(latents.device, latents.dtype)
        values = torch.stack(pixels) if self.is_video else torch.cat(pixels)
        return values.movedim(-1, 1).to(latents.device).float() / 127.5 - 1

    def _checked(self, tensor: Tensor, layout: str, **sizes: int) -> Tensor:
        """Return the tensor of a response.

        Raises:
            RemoteVAEError: its dimensions are not those of `layout`, or one has another size than `sizes` says.
        """
        expected = [sizes.get(letter) for letter in layout]
        if len(layout) != tensor.ndim or any(
            size not in (None, actual) for size, actual in zip(expected, tensor.shape, strict=True)
        ):
            shape = ", ".join("any" if size is None else str(size) for size in expected)
            message = f"the response is a tensor of shape {list(tensor.shape)}: expected [{shape}] ({layout})"
            raise RemoteVAEError(f"{self.client.url}: {message}; is this a service of this project?")
        return tensor

    def _arguments(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a method by name. diffusers before 0.38 hides the method in a wrapper's closure."""
        method = getattr(type(self.vae), name)
        method = inspect.getclosurevars(inspect.unwrap(method)).nonlocals.get("method", method)
        return inspect.signature(method).bind(self.vae, *args, **kwargs).arguments

    def decode_async(self, latents: Tensor, output_type: str = "pil", **parameters: Any) -> Future[Any]:
        """Decode the latents of a pipeline with `output_type="latent"`, while this thread goes on.

        Args:
            latents: in the layout and with the normalization of the pipeline.
            output_type: "pil", or "mp4" for a video as a file.
            parameters: those of docs/http-api.md. Packed latents need `height` and `width`, those of a video also
                `num_frames`. Without `scaling_factor` and `do_scaling`, the endpoint undoes the pipeline's scaling.

        Returns:
            The future of a list of PIL images (for videos, a list of frames for each), or of the bytes of an MP4 file.
        """
        parameters = _with_scaling(parameters)
        latents = latents.detach().to("cpu", copy=True)  # the pipeline may change its own
        return start_thread(lambda: self._decode_to(output_type, latents, parameters))

    def _decode_to(self, output_type: str, latents: Tensor, parameters: dict[str, Any]) -> Any:
        if output_type == "mp4":
            return tensors.decode_mp4(self.client, latents, **parameters)
        if output_type != "pil":
            raise ValueError(f'output_type={output_type!r}: expected "pil" or "mp4"')
        parameters = {**parameters, "partial_postprocess": True}
        pieces = latents.split(1 if self.is_video else self.config["limits"]["max_batch"])
        images = [
            [Image.fromarray(pixels) for pixels in tensors.decode(self.client, piece, **parameters).numpy()]
            for piece in pieces
        ]
        return images if self.is_video else [image for batch in images for image in batch]

    def decode_stream(self, latents: Tensor, **parameters: Any) -> Iterator[bytes]:
        """Decode a video's latents, as for `decode_async`, and yield a fragmented MP4 file while it is decoded.

        Raises:
            RemoteVAEError: the endpoint refused the latents, or the file is incomplete and must be thrown away.
        """
        return tensors.stream_mp4(self.client, latents, **_with_scaling(parameters))


def empty_vae(config: dict[str, Any]) -> Any:
    """Return the VAE that `/config` describes. Its parameters are empty; its buffers hold the checkpoint's statistics.

    Raises:
        ImportError: the installed diffusers has no autoencoder of this name.
        RemoteVAEError: the class does not take this config.
    """
    name = config["vae_class"]
    cls = getattr(autoencoders, name, None) if CLASSES.fullmatch(name) else None
    if cls is None:
        raise ImportError(
            f"diffusers {diffusers.__version__} has no autoencoder for images or videos named {visible(name[:60])}; "
            f"the endpoint runs diffusers {visible(config['diffusers'][:60])}: install that version"
        )
    vae_config = {entry: value for entry, value in config["vae_config"].items() if not entry.startswith("_")}
    dtype = getattr(torch, config["dtype"])
    try:
        with torch.device("meta"):
            vae = cls.from_config({"_class_name": name, **vae_config})
        for path, _ in list(vae.named_parameters(remove_duplicate=False)):
            _replace(vae, path, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))
        for path, buffer in list(vae.named_buffers(remove_duplicate=False)):
            kind = dtype if buffer.is_floating_point() else buffer.dtype
            _replace(vae, path, torch.tensor(config["buffers"].get(path, []), dtype=kind))
    except Exception as error:  # a constructor may raise anything for a wrong config
        raise RemoteVAEError(f"the endpoint's `vae_config` is not one of {name}: {error}") from None
    return vae.eval()


def _expand(statistics: list[list[float]], pixels: Tensor) -> list[Tensor]:
    """Return mean and deviation with the dimensions of pixels [B, C, (F,) H, W]."""
    ones = (1,) * (pixels.ndim - 2)
    return [torch.tensor(values).to(pixels).view(1, -1, *ones) for values in statistics]


def _replace(vae: nn.Module, path: str, value: Tensor) -> None:
    """Replace the parameter or buffer with this name in `state_dict`."""
    module, _, name = path.rpartition(".")
    setattr(vae.get_submodule(module), name, value)


def _single_value(timesteps: Any) -> float:
    """Return the timestep that all items of a batch have."""
    values = set(torch.as_tensor(timesteps).flatten().tolist())
    if len(values) != 1:
        raise ValueError(
            f"the timesteps of the batch are {sorted(values)}: expected one timestep for all; split the batch"
        )
    return values.pop()


def _with_scaling(parameters: dict[str, Any]) -> dict[str, Any]:
    """Add the pipeline's scaling if the parameters name none."""
    is_named = {"scaling_factor", "shift_factor", "do_scaling"} & parameters.keys()
    return parameters if is_named else {**parameters, "do_scaling": True}
