"""Conversion between images and the tensors in [-1, 1] of a VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from handlers.serving.errors import RequestError
from handlers.serving.layout import Layout
from handlers.serving.media.payload import to_rgb, to_rgba
from handlers.serving.media.request import OutputKind

STRIP = 2**18
"""Pixels that are converted at once."""


def shape_of_images(sizes: Sequence[tuple[int, int]], layout: Layout) -> tuple[int, ...]:
    """Return the shape of the VAE's input: [N, 3 or 4, H, W] for images, or [1, 3, F, H, W] for the frames of a video.

    Sizes are rounded down to multiples of `vae_scale_factor`, like in diffusers' pipelines. A video is cut to the most
    frames that the VAE encodes without dropping one.

    Args:
        sizes: width and height of each image.

    Raises:
        RequestError: the sizes of a batch differ, or are smaller than one latent; status 422.
    """
    scale = layout.vae_scale_factor
    width, height = sizes[0]
    if layout.kind == "image" and len(set(sizes)) > 1:
        different = ", ".join(f"{width}x{height}" for width, height in dict.fromkeys(sizes))
        raise RequestError(f"the images of a batch must have one size, but these have {different[:200]}", 422)
    if min(width, height) < scale:
        raise RequestError(f"the image has {width}x{height} pixels; this VAE needs at least {scale}x{scale}", 422)
    height, width = height - height % scale, width - width % scale
    if layout.kind == "video":
        fitting, _ = layout.fitting_frames(len(sizes))
        return 1, layout.pixel_channels, fitting, height, width
    return len(sizes), layout.pixel_channels, height, width


def from_images(images: Iterable[Image.Image], shape: tuple[int, ...]) -> Tensor:
    """Convert images to a tensor in [-1, 1] of a shape from `shape_of_images`.

    Values and strides equal those of diffusers' `VaeImageProcessor.preprocess` and `VideoProcessor.preprocess_video`.
    Images are converted one by one, in strips, so the floats exist once.
    """
    height, width = shape[-2:]
    count = shape[2] if len(shape) == 5 else shape[0]
    floats = np.empty((count, height, width, shape[1]), np.float32)
    for target, image in zip(floats, images, strict=False):  # a video may have more frames than the shape
        _convert(image, target)
        del image
    batch = torch.from_numpy(floats.transpose(0, 3, 1, 2))
    if len(shape) == 4:
        return batch
    # torch gives a single frame other strides than several, and the rounding of kernels depends on strides
    frames = torch.stack([batch]) if count == 1 else batch.unsqueeze(0)
    return frames.permute(0, 2, 1, 3, 4)


def _convert(image: Image.Image, target: np.ndarray) -> None:
    """Resize an image of any mode and write its floats in [-1, 1] to `target` [H, W, 3 or 4]."""
    height, width, channels = target.shape
    convert = to_rgb if channels == 3 else to_rgba
    if image.size != (width, height):
        image = VaeImageProcessor().resize(_converted(image, convert), height, width)
    for top, strip in _strips(image, convert):
        rows = target[top : top + strip.height]
        np.divide(np.asarray(strip), 255, out=rows, dtype=np.float32)
        rows *= 2
        rows -= 1


Converter = Callable[[Image.Image], Image.Image]


def _converted(image: Image.Image, convert: Converter) -> Image.Image:
    """Convert a whole image to RGB on white, or RGBA, in strips, because converting it at once takes more copies."""
    if convert is to_rgb and image.mode == "RGB" and not image.has_transparency_data:
        return image
    whole = Image.new("RGB" if convert is to_rgb else "RGBA", image.size)
    for top, strip in _strips(image, convert):
        whole.paste(strip, (0, top))
    return whole


def _strips(image: Image.Image, convert: Converter) -> Iterator[tuple[int, Image.Image]]:
    """Yield converted strips of an image from the top, each with its first row."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, convert(image.crop((0, top, image.width, min(top + rows, image.height))))


def is_pixels(shape: tuple[int, ...], dtype: str | None, layout: Layout) -> bool:
    """Return whether a tensor of this shape holds pixels: channels first, or last in uint8 (like `to_output`).

    There are 3 channels, or 4 for a VAE of transparent images.
    """
    channels = (3, layout.pixel_channels)
    batched = len(shape) == layout.pixels_ndim and shape[1] in channels
    unbatched = len(shape) == layout.pixels_ndim - 1 and shape[0] in channels
    return batched or unbatched or _is_channels_last(shape, dtype, layout) or _is_one_frame(shape, layout)


def is_encodable(shape: Sequence[int], layout: Layout, dtype: str | None = None) -> bool:
    """Return whether pixels of this shape can be encoded. With a dtype, uint8 may have its channels last."""
    if _is_channels_last(tuple(shape), dtype, layout):
        shape = shape[:-1]
    return not (shape[-1] % layout.vae_scale_factor or shape[-2] % layout.vae_scale_factor)


def _is_channels_last(shape: tuple[int, ...], dtype: str | None, layout: Layout) -> bool:
    return dtype == "uint8" and len(shape) in (3, 4) and shape[-1] in (3, layout.pixel_channels)


def _is_one_frame(shape: tuple[int, ...], layout: Layout) -> bool:
    """Return whether the shape is [B, 3, 1, H, W], the input of an image VAE with frames."""
    channels = (3, layout.pixel_channels)
    return layout.kind == "image" and layout.ndim == 5 == len(shape) and shape[1] in channels and shape[2] == 1


def to_batch(pixels: Tensor, layout: Layout, exact: bool = False) -> Tensor:
    """Convert pixels to [B, 3, H, W] (image) or [B, 3, F, H, W] (video), in their own dtype.

    uint8 pixels may also be [H, W, 3], [B, H, W, 3] or, for a video, [F, H, W, 3]. Images for a VAE with frames may be
    [B, 3, 1, H, W]. A VAE of transparent images gets 4 channels; 3 are opaque.

    Args:
        exact: accept any size that diffusers' own pass takes, which may crop or pad.

    Raises:
        RequestError: the shape is none of these, or (unless `exact`) no multiple of `vae_scale_factor`, or the VAE
            would drop frames; status 422.
    """
    shape, scale = list(pixels.shape), layout.vae_scale_factor
    dtype = str(pixels.dtype).removeprefix("torch.")
    if not is_pixels(tuple(shape), dtype, layout):
        raise RequestError(f"`shape` {shape} is no shape of pixels: expected {layout.describe_pixels()}", 422)
    if _is_channels_last(tuple(shape), dtype, layout):
        pixels = pixels.movedim(-1, -3)
        if layout.kind == "video":  # several frames, or one
            pixels = (pixels if pixels.ndim == 4 else pixels.unsqueeze(0)).movedim(1, 0)
    if _is_one_frame(tuple(shape), layout):
        pixels = pixels.squeeze(2)
    if pixels.ndim < layout.pixels_ndim:
        pixels = pixels.unsqueeze(0)
    if pixels.shape[1] < layout.pixel_channels:  # opaque
        alpha = torch.full_like(pixels[:, :1], 255 if pixels.dtype == torch.uint8 else 1)
        pixels = torch.cat([pixels, alpha], 1)
    if exact:
        if min(pixels.shape[-2:]) < scale:
            raise RequestError(f"`shape` {shape}: height and width must be at least {scale}", 422)
        return pixels
    if not is_encodable(pixels.shape, layout):
        raise RequestError(f"`shape` {shape}: height and width must be multiples of {scale}", 422)
    if layout.kind == "video":
        below, above = layout.fitting_frames(pixels.shape[2])
        if below != above:
            raise RequestError(
                f"`shape` {shape}: this VAE would drop some of the {pixels.shape[2]} frames; send {below} or {above}",
                422,
            )
    return pixels


def normalize(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to [-1, 1]. Floats are in this range already and stay as they are."""
    return pixels.float().div_(127.5).sub_(1) if pixels.dtype == torch.uint8 else pixels


def to_output(decoded: Tensor, output_kind: OutputKind) -> Tensor:
    """Convert decoded pixels [B, 3, H, W] or [B, 3, F, H, W] to the kind of output, on the same device.

    IMAGE and MP4 become uint8 pixels for their encoders.
    """
    if output_kind is OutputKind.DECODED:
        return decoded
    pixels = VaeImageProcessor.denormalize(decoded)
    if pixels.ndim == 5:  # a video is a batch of one: [1, 3, F, H, W] to [F, 3, H, W]
        pixels = pixels[0].movedim(1, 0)
    if output_kind is OutputKind.PIXELS:
        return pixels
    return (pixels.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
