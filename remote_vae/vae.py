"""`RemoteVAE`: an object of the real diffusers class, whose passes run elsewhere."""

from __future__ import annotations

import inspect
import logging
import math
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from os import PathLike
from threading import Thread
from types import FrameType
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models import autoencoders
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from torch import Tensor, nn

from remote_vae import tensors
from remote_vae.batches import batch_limit, decoded_frames, encodes_whole
from remote_vae.client import Client, RemoteVAEError
from remote_vae.tensors import memory_format
from remote_vae.text import visible

logger = logging.getLogger("remote_vae")

CLASSES = re.compile(r"AutoencoderKL[A-Za-z0-9]*|AutoencoderDC|AutoencoderTiny")
"""Names of classes that an endpoint may have a pipeline use. Others of diffusers may load what their config names."""


def RemoteVAE(url: str, token: str | None = None, **options: Any) -> Any:
    """A VAE of an endpoint, for wherever a pipeline takes one.

    It is an object of the very class of diffusers, with the checkpoint's config and statistics and without its weights,
    so that it takes no memory. `encode` and `decode` send their tensors to the endpoint, and give what the local ones
    give: pixels in the latents' dtype; for a pipeline that makes PIL pictures in float32, of pixels in uint8.
    `decode_async` decodes while the next picture is generated, and `decode_stream` gives a video's file as it is
    decoded. Tiling and slicing are the endpoint's matter.

    Args:
        url: of the endpoint.
        token: of an endpoint that is not public; None takes the Hugging Face login for Hugging Face's own hosts.
        options: those of `Client`.

    Raises:
        RemoteVAEError: the endpoint cannot be reached, or is none of this project.
        ImportError: the installed diffusers does not have the VAE's class.
    """
    return Connection(Client(url, token, **options)).vae


class Connection:
    """What makes an empty VAE one that works; it is the VAE's attribute `remote`."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.config = client.config()
        self.vae = hollow(self.config)
        self.vae.remote = self
        self.vae.encode = self.encode
        self.vae.decode = self.decode
        self.vae.decode_async = self.decode_async
        self.vae.decode_stream = self.decode_stream
        self.vae.save_pretrained = self.save_config
        self.vae.fuse_qkv_projections = self.vae.unfuse_qkv_projections = self.keep_projections
        self.has_warned = False
        """Whether the user knows that pixels are left out or added, which is said once."""

    def keep_projections(self) -> None:
        """In place of `fuse_qkv_projections` and `unfuse_qkv_projections`, which change no values: nothing."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Encode pixels in [-1, 1] as the class takes them, to the distribution of their latents.

        Sizes and counts of frames that the class does not encode whole are run by diffusers' own pass (`exact`), so
        that the latents are those of the local class.

        Raises:
            RemoteVAEError: the class cannot encode this shape, or the endpoint has no memory for its own pass.
        """
        given = self._given("encode", args, kwargs)
        pixels: Tensor = given["x"]
        moments = "moments" in self.config["sample_modes"]
        batch = self._to_rank(pixels, len(self.config["pixels"]["layout"]))
        pieces = batch.split(batch_limit(self.config, batch, math.prod(batch.shape[2:])))
        frames, height, width = (1, *batch.shape[2:])[-3:]
        is_whole = encodes_whole(self.config, frames, height, width)
        parameters = {
            "sample_mode": "moments" if moments else None,
            "memory_format": memory_format(pixels),
            "exact": None if is_whole else True,
        }
        sizes = {"C": self.config["latents"]["channels"] * (1 + moments)}
        if is_whole:
            side = self.config["latents"]["vae_scale_factor"]
            sizes |= {"H": height // side, "W": width // side}
        layout = self.config["latents"]["layout"]
        encoded = torch.cat(
            [
                self._checked(tensors.encode(self.client, piece, **parameters), layout, B=len(piece), **sizes)
                for piece in pieces
            ]
        )
        if not is_whole:
            self._say_not_whole(pixels)
        encoded = encoded.to(pixels.device, pixels.dtype)
        if pixels.ndim == 4 and self.config["kind"] == "video":
            encoded = encoded.squeeze(2)
        if pixels.ndim == 4 and memory_format(pixels):  # which convolutions hand on
            encoded = encoded.contiguous(memory_format=torch.channels_last)
        result = DiagonalGaussianDistribution(encoded) if moments else encoded
        if not given.get("return_dict", True):
            return (result,)
        if moments:
            return AutoencoderKLOutput(latent_dist=result)
        if isinstance(self.vae, diffusers.AutoencoderTiny):
            return AutoencoderTinyOutput(latents=result)
        return EncoderOutput(latent=result)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Raw latents as the class takes them, to pixels."""
        given = self._given("decode", args, kwargs)
        latents: Tensor = next(value for name, value in given.items() if name in ("z", "x"))
        parameters = {"latents_layout": self.config["latents"]["layout"], "memory_format": memory_format(latents)}
        if (timestep := given.get("temb")) is not None:
            parameters |= {"decode_timestep": _one_number(timestep), "decode_noise_scale": 0}
        pictures = self.config["kind"] == "video" and latents.ndim == 4  # a video as a batch of pictures
        batch = latents.unflatten(0, (-1, given.get("num_frames") or 1)).movedim(1, 2) if pictures else latents
        sample = self._pixels(batch, parameters, ends_as_picture())
        if pictures:
            sample = sample.movedim(2, 1).flatten(0, 1)
        elif sample.ndim < latents.ndim:
            sample = sample.unsqueeze(2)
        return DecoderOutput(sample=sample) if given.get("return_dict", True) else (sample,)

    def _checked(self, tensor: Tensor, layout: str, **sizes: int) -> Tensor:
        """The tensor of a response, whose dimensions the letters of `layout` name.

        Raises:
            RemoteVAEError: it has others, or other sizes than these.
        """
        expected = [sizes.get(letter, "any") for letter in layout]
        if len(layout) != tensor.ndim or any(n not in ("any", m) for n, m in zip(expected, tensor.shape, strict=True)):
            shape, wanted = list(tensor.shape), ", ".join(map(str, expected))
            message = f"{self.client.url} gave a tensor of shape {shape} where [{wanted}] ({layout}) was asked for"
            raise RemoteVAEError(message)
        return tensor

    def _say_not_whole(self, pixels: Tensor) -> None:
        """Tells the user once that pixels are left out or added, as the local class does without a word."""
        if self.has_warned:
            return
        self.has_warned = True
        side, counts = self.config["latents"]["vae_scale_factor"], self.config["pixels"]["frame_counts"]
        frames = f" and {counts[0]}, {counts[1]}, {counts[2]}, ... frames" if self.config["kind"] == "video" else ""
        logger.warning(
            "pixels of shape %s do not fit this VAE, which encodes heights and widths in multiples of %d%s; it leaves "
            "out or pads the rest, as diffusers does locally. This is said once.",
            list(pixels.shape),
            side,
            frames,
        )

    def _given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a method by their names. diffusers before 0.38 hides them in a wrapper's closure."""
        method = getattr(type(self.vae), name)
        method = inspect.getclosurevars(inspect.unwrap(method)).nonlocals.get("method", method)
        return inspect.signature(method).bind(self.vae, *args, **kwargs).arguments

    def _pixels(self, latents: Tensor, parameters: dict[str, Any], as_uint8: bool) -> Tensor:
        """[B, 3, H, W] or [B, 3, F, H, W] about in [-1, 1], on the latents' device."""
        video = self.config["kind"] == "video"
        frames = decoded_frames(self.config, latents.shape[2]) if video else 1
        factor = self.config["latents"]["vae_scale_factor"]
        limit = batch_limit(self.config, latents, frames * factor**2 * math.prod(latents.shape[-2:]))
        height, width = (factor * side for side in latents.shape[-2:])
        sizes = {"C": 3, "F": frames, "H": height, "W": width}

        def decode(piece: Tensor, layout: str) -> Tensor:
            return self._checked(tensors.decode(self.client, piece, **parameters), layout, B=len(piece), **sizes)

        if not as_uint8:
            layout = self.config["pixels"]["layout"]
            pixels = torch.cat([decode(piece, layout) for piece in latents.split(limit)])
            return pixels.to(latents.device, latents.dtype)
        parameters = {**parameters, "partial_postprocess": True}
        if video:
            pixels = torch.stack([decode(piece, "FHWC") for piece in latents.split(1)]).movedim(-1, 1)
        else:
            pixels = torch.cat([decode(piece, "BHWC") for piece in latents.split(limit)]).movedim(-1, 1)
        return pixels.to(latents.device).float() / 127.5 - 1

    def decode_async(self, latents: Tensor, output_type: str = "pil", **parameters: Any) -> Future[Any]:
        """Decodes what a pipeline gives with `output_type="latent"` while this thread goes on.

        Args:
            latents: in the layout and the normalisation of the pipeline.
            output_type: "pil", or "mp4" for a video as a file.
            parameters: those of docs/http-api.md; packed latents need `height` and `width`, of a video `num_frames`.
                Without a `scaling_factor` or `do_scaling` the endpoint normalises as the model's pipeline does.

        Returns:
            Of a list of PIL pictures, of videos a list of frames for each; or of the bytes of an MP4 file.
        """
        parameters = _as_the_pipeline(parameters)
        latents = latents.detach().to("cpu", copy=True)  # which the pipeline may go on to change
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(self._pictures(latents, output_type, parameters))
            except BaseException as error:  # whatever it is, the future's reader gets it
                future.set_exception(error)

        Thread(target=run, name="decode_async", daemon=True).start()
        return future

    def decode_stream(self, latents: Tensor, **parameters: Any) -> Iterator[bytes]:
        """A video's latents, as `decode_async` takes them, to an MP4 file in pieces, the first of which plays already.

        Raises:
            RemoteVAEError: the endpoint refused it, or the file is not complete; what came is to be thrown away then.
        """
        return tensors.stream_mp4(self.client, latents, **_as_the_pipeline(parameters))

    def _pictures(self, latents: Tensor, output_type: str, parameters: dict[str, Any]) -> Any:
        if output_type == "mp4":
            return tensors.decode_mp4(self.client, latents, **parameters)
        if output_type != "pil":
            raise ValueError(f'output_type is "pil" or "mp4", not {output_type!r}')
        parameters = {**parameters, "partial_postprocess": True}
        video = self.config["kind"] == "video"
        pieces = latents.split(1 if video else self.config["limits"]["max_batch"])
        answers = [tensors.decode(self.client, piece, **parameters).numpy() for piece in pieces]
        if video:
            return [[Image.fromarray(frame) for frame in frames] for frames in answers]
        return [Image.fromarray(picture) for pictures in answers for picture in pictures]

    def save_config(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """In place of `save_pretrained`: there are no weights here, so only the config is written."""
        self.vae.save_config(save_directory)

    def _to_rank(self, tensor: Tensor, rank: int) -> Tensor:
        """With the dimension for frames that the endpoint has and the class has not, or the other way round."""
        if tensor.ndim == rank:
            return tensor
        return tensor.unsqueeze(2) if tensor.ndim < rank else tensor.squeeze(2)


def hollow(config: dict[str, Any]) -> Any:
    """The VAE that `/config` describes, with empty parameters in place of its weights, and its statistics.

    Raises:
        ImportError: the installed diffusers has no autoencoder of this name.
        RemoteVAEError: that class takes no such config.
    """
    name = config["vae_class"]
    cls = getattr(autoencoders, name, None) if CLASSES.fullmatch(name) else None
    if cls is None:
        raise ImportError(
            f"diffusers {diffusers.__version__} has no autoencoder for images or videos named {visible(name[:60])}, "
            f"which the endpoint runs with diffusers {visible(config['diffusers'][:60])}"
        )
    stored = {entry: value for entry, value in config["vae_config"].items() if not entry.startswith("_")}
    dtype = getattr(torch, config["dtype"])
    try:
        with torch.device("meta"):
            vae = cls.from_config({"_class_name": name, **stored})
        for path, module in vae.named_modules():
            prefix = f"{path}." if path else ""
            for key, parameter in module.named_parameters(recurse=False):
                module.register_parameter(key, nn.Parameter(parameter.new_empty(0, dtype=dtype, device="cpu"), False))
            for key, buffer in module.named_buffers(recurse=False):
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[key] = torch.tensor(config["buffers"].get(prefix + key, []), dtype=kind)
    except Exception as error:  # a constructor may raise anything at a config that is not its own
        raise RemoteVAEError(f"the endpoint's `vae_config` is none of {name}: {error}") from None
    return vae.eval()


def ends_as_picture() -> bool:
    """Whether a pipeline is running that makes PIL pictures of the very pixels that are decoded now."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        pipeline = frame.f_locals.get("self")
        if frame.f_code.co_name == "__call__" and isinstance(pipeline, DiffusionPipeline):
            marks = getattr(pipeline, "watermark", None) is not None  # it changes pixels before they are rounded
            return frame.f_locals.get("output_type") == "pil" and not marks
        frame = frame.f_back
    return False


def _one_number(values: Any) -> float:
    """Of a timestep for each of a batch."""
    numbers = set(torch.as_tensor(values).flatten().tolist())
    if len(numbers) != 1:
        raise ValueError(f"one timestep for the whole batch is taken, not {sorted(numbers)}")
    return numbers.pop()


def _as_the_pipeline(parameters: dict[str, Any]) -> dict[str, Any]:
    """With its normalisation, where none is named."""
    named = {"scaling_factor", "shift_factor", "do_scaling"} & parameters.keys()
    return parameters if named else {**parameters, "do_scaling": True}
