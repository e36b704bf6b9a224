"""Pixels between pictures and the [-1, 1] tensors that a VAE takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from handlers.serving.errors import RequestError
from handlers.serving.layout import Layout
from handlers.serving.media.payload import to_rgb
from handlers.serving.media.request import OutputKind

STRIP = 2**18
"""Pixels that are converted at a time."""


def shape_of_images(sizes: Sequence[tuple[int, int]], layout: Layout) -> tuple[int, ...]:
    """The shape [N, 3, H, W] of images of these sizes, or [1, 3, F, H, W] of a video's frames, for a VAE.

    A size that is no multiple of `vae_scale_factor` is resized down to one, as diffusers' pipelines do; a video is
    cut to the most frames that the VAE encodes without dropping one.

    Args:
        sizes: width and height of each.

    Raises:
        RequestError: the sizes of a batch differ, or are smaller than the VAE's latents; status 422.
    """
    scale = layout.vae_scale_factor
    width, height = sizes[0]
    if layout.kind == "image" and len(set(sizes)) > 1:
        different = ", ".join(f"{width}x{height}" for width, height in dict.fromkeys(sizes))
        raise RequestError(f"the pictures of a batch must have one size, and these have {different[:200]}", 422)
    if min(width, height) < scale:
        raise RequestError(f"the picture is {width}x{height} pixels; this VAE needs at least {scale} each way", 422)
    height, width = height - height % scale, width - width % scale
    if layout.kind == "video":
        fitting, _ = layout.fitting_frames(len(sizes))
        return 1, 3, fitting, height, width
    return len(sizes), 3, height, width


def from_images(images: Iterable[Image.Image], shape: tuple[int, ...]) -> Tensor:
    """Images to a tensor of this shape, as `shape_of_images` gives it, in [-1, 1].

    They are taken one by one and the floats are made once, by strips. The values, and the strides, are those of
    diffusers' `VaeImageProcessor.preprocess` and `VideoProcessor.preprocess_video`.
    """
    height, width = shape[-2:]
    count = shape[2] if len(shape) == 5 else shape[0]
    floats = np.empty((count, height, width, 3), np.float32)
    for target, image in zip(floats, images, strict=False):  # a video's last frames may be left out
        _convert(image, target)
        del image
    batch = torch.from_numpy(floats.transpose(0, 3, 1, 2))
    if len(shape) == 4:
        return batch
    # torch gives a single frame other strides than several, and kernels round by strides
    frames = torch.stack([batch]) if count == 1 else batch.unsqueeze(0)
    return frames.permute(0, 2, 1, 3, 4)


def _convert(image: Image.Image, target: np.ndarray) -> None:
    """Writes the floats of an image of any mode, in [-1, 1], to `target` [H, W, 3], resized to its size."""
    height, width, _ = target.shape
    if image.size != (width, height):
        image = VaeImageProcessor().resize(_rgb(image), height, width)
    for top, strip in _rgb_strips(image):
        part = target[top : top + strip.height]
        np.divide(np.asarray(strip), 255, out=part, dtype=np.float32)
        part *= 2
        part -= 1


def _rgb(image: Image.Image) -> Image.Image:
    """The whole image in RGB, on white, without the copies that converting it at once takes."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rgb = Image.new("RGB", image.size)
    for top, strip in _rgb_strips(image):
        rgb.paste(strip, (0, top))
    return rgb


def _rgb_strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image's strips from the top in RGB, on white, each with its first row."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, to_rgb(image.crop((0, top, image.width, min(top + rows, image.height))))


def is_pixels(shape: tuple[int, ...], dtype: str | None, layout: Layout) -> bool:
    """Whether a tensor of this shape holds pixels: 3 channels, first, or last in uint8 (as `to_output` gives them)."""
    batched = len(shape) == layout.pixels_ndim and shape[1] == 3
    unbatched = len(shape) == layout.pixels_ndim - 1 and shape[0] == 3
    return batched or unbatched or _is_channels_last(shape, dtype) or _is_one_frame(shape, layout)


def fits(shape: tuple[int, ...], layout: Layout) -> bool:
    """Whether pixels of this shape, channels first, could be encoded."""
    return not (shape[-1] % layout.vae_scale_factor or shape[-2] % layout.vae_scale_factor)


def _is_channels_last(shape: tuple[int, ...], dtype: str | None) -> bool:
    return dtype == "uint8" and len(shape) in (3, 4) and shape[-1] == 3


def _is_one_frame(shape: tuple[int, ...], layout: Layout) -> bool:
    """Whether these are images as an image VAE with frames takes them itself: [B, 3, 1, H, W]."""
    return layout.kind == "image" and layout.ndim == 5 == len(shape) and shape[1:3] == (3, 1)


def to_batch(pixels: Tensor, layout: Layout, exact: bool = False) -> Tensor:
    """A tensor of pixels to [B, 3, H, W] (image) or [B, 3, F, H, W] (video), in its own dtype.

    uint8 may also be [H, W, 3], [B, H, W, 3] or, for a video, [F, H, W, 3]. An image of a VAE with frames may have its
    one frame, [B, 3, 1, H, W].

    Args:
        exact: any size that diffusers' own pass takes will do, although that may leave out or pad the rest.

    Raises:
        RequestError: the shape is none of these, or (unless `exact`) no multiple of `vae_scale_factor`, or the VAE
            would drop frames.
    """
    shape, scale = list(pixels.shape), layout.vae_scale_factor
    dtype = str(pixels.dtype).removeprefix("torch.")
    if not is_pixels(tuple(shape), dtype, layout):
        raise RequestError(f"`shape` {shape} is no shape of pixels: expected {layout.describe_pixels()}", 422)
    if _is_channels_last(tuple(shape), dtype):
        pixels = pixels.movedim(-1, -3)
        if layout.kind == "video":  # frames, or a single one
            pixels = (pixels if pixels.ndim == 4 else pixels.unsqueeze(0)).movedim(1, 0)
    if _is_one_frame(tuple(shape), layout):
        pixels = pixels.squeeze(2)
    if pixels.ndim < layout.pixels_ndim:
        pixels = pixels.unsqueeze(0)
    if exact:
        if min(pixels.shape[-2:]) < scale:
            raise RequestError(f"`shape` {shape}: height and width must be at least {scale}", 422)
        return pixels
    if pixels.shape[-2] % scale or pixels.shape[-1] % scale:
        raise RequestError(f"`shape` {shape}: height and width must be multiples of {scale}", 422)
    if layout.kind == "video":
        below, above = layout.fitting_frames(pixels.shape[2])
        if below != above:
            raise RequestError(
                f"`shape` {shape} is a video of {pixels.shape[2]} frames, of which this VAE would drop some; send "
                f"{below} or {above}",
                422,
            )
    return pixels


def normalize(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] to [-1, 1]; floats are taken as they are, so they must be in that range."""
    return pixels.float().div_(127.5).sub_(1) if pixels.dtype == torch.uint8 else pixels


def to_output(decoded: Tensor, output_kind: OutputKind) -> Tensor:
    """What the decoder gave ([B, 3, H, W] or [B, 3, F, H, W]) in the form that was asked for, on the same device.

    IMAGE and MP4 give the uint8 pixels that their encoders take.
    """
    if output_kind is OutputKind.DECODED:
        return decoded
    pixels = VaeImageProcessor.denormalize(decoded)
    if pixels.ndim == 5:  # a video has a batch of one here: [1, 3, F, H, W] to [F, 3, H, W]
        pixels = pixels[0].movedim(1, 0)
    if output_kind is OutputKind.PIXELS:
        return pixels
    return (pixels.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
