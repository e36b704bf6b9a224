"""Pixels between pictures and the [-1, 1] tensors that a VAE takes and gives."""

from __future__ import annotations

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from handlers.serving.errors import RequestError
from handlers.serving.layout import Layout
from handlers.serving.request import Answer


def from_images(images: list[Image.Image], layout: Layout) -> Tensor:
    """RGB images of one size to [N, 3, H, W], or to the frames [1, 3, F, H, W] of a video, in [-1, 1].

    A size that is no multiple of `vae_scale_factor` is resized down to one, as diffusers' pipelines do; a video is
    cut to the most frames that the VAE encodes without dropping one.
    """
    scale = layout.vae_scale_factor
    width, height = images[0].size
    if layout.kind == "image" and len({image.size for image in images}) > 1:
        sizes = ", ".join(f"{width}x{height}" for width, height in dict.fromkeys(image.size for image in images))
        raise RequestError(f"the pictures of a batch must have one size, and these have {sizes[:200]}", 422)
    if min(width, height) < scale:
        raise RequestError(f"the picture is {width}x{height} pixels; this VAE needs at least {scale} each way", 422)
    if layout.kind == "video":
        fitting, _ = layout.fitting_frames(len(images))
        return VideoProcessor(vae_scale_factor=scale).preprocess_video(images[:fitting])
    return VaeImageProcessor(vae_scale_factor=scale).preprocess(images)


def is_pixels(shape: tuple[int, ...], dtype: str | None, layout: Layout) -> bool:
    """Whether a tensor of this shape holds pixels: 3 channels, first, or last in uint8 (as `to_answer` gives them)."""
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


def to_batch(pixels: Tensor, layout: Layout) -> Tensor:
    """A tensor of pixels to [B, 3, H, W] (image) or [B, 3, F, H, W] (video), in its own dtype.

    uint8 may also be [H, W, 3], [B, H, W, 3] or, for a video, [F, H, W, 3]. An image of a VAE with frames may have its
    one frame, [B, 3, 1, H, W].

    Raises:
        RequestError: the shape is none of these, or no multiple of `vae_scale_factor`, or the VAE would drop frames.
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
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels


def to_answer(decoded: Tensor, answer: Answer) -> Tensor:
    """What the decoder gave ([B, 3, H, W] or [B, 3, F, H, W]) in the form that was asked for, on the same device.

    IMAGE and MP4 give the uint8 pixels that their encoders take.
    """
    if answer is Answer.DECODED:
        return decoded
    pixels = VaeImageProcessor.denormalize(decoded)
    if pixels.ndim == 5:  # a video has a batch of one here: [1, 3, F, H, W] to [F, 3, H, W]
        pixels = pixels[0].movedim(1, 0)
    if answer is Answer.PIXELS:
        return pixels
    return (pixels.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
