"""A client's request: its parameters, validated once, and the kind of its response."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from handlers.model import Kind, LatentsLayout, SampleMode, Task
from handlers.serving.errors import RequestError

Body = bytes | bytearray
"""Body of a request, or one of the files in it."""
BodyKind = Literal["tensor", "image", "video"]
ImageFormat = Literal["jpg", "png", "webp"]


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("Input should not be zero")
    return value


def _image_format(value: str) -> str:
    return "jpg" if value == "jpeg" else value


def _dimensions(value: Any) -> Any:
    """Split `shape=1,4,64,64` and `shape=[1,4,64,64]`. The usual form is one `shape` for each dimension."""
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) == 1 and isinstance(values[0], str):
        return [size.strip() for size in values[0].strip("[]() ").split(",")]
    return value


Dimension = Annotated[int, Field(gt=0, lt=2**31)]


class Parameters(BaseModel):
    """The parameters of a request. Unknown ones are ignored, as some clients send more.

    The docstrings below are the descriptions in `/openapi.json`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)

    shape: Annotated[tuple[Dimension, ...], Field(max_length=8), BeforeValidator(_dimensions)] | None = None
    """Sizes of the tensor in the body. Required for a tensor."""
    dtype: Literal["float16", "float32", "bfloat16", "uint8"] | None = None
    """Data type of the tensor in the body. Required for a tensor."""
    scaling_factor: Annotated[float, AfterValidator(_not_zero)] | None = None
    """Factor of normalized latents: `raw = latents / scaling_factor + shift_factor`."""
    shift_factor: float | None = None
    """Shift of normalized latents: `raw = latents / scaling_factor + shift_factor`."""
    do_scaling: bool = False
    """True if the service scales latents as the model's pipeline does. Otherwise latents are raw."""
    normalized: bool | None = None
    """True if latents are still normalized, in a layout in which some of the model's pipelines return raw latents."""
    latents_layout: LatentsLayout | None = None
    """Layout of the latents. Absent: decode finds it by the shape, and encode returns the VAE's own."""
    memory_format: Literal["channels_last"] | None = None
    """Memory format of the VAE's input, contiguous by default. torch's kernels round differently in each."""
    num_frames: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Frames of the decoded video. Required for packed latents of several frames."""
    height: Annotated[Any, Field(json_schema_extra={"type": "integer"})] = None
    """Height of the decoded image or video in pixels. Required for packed latents, and ignored for all others."""
    width: Annotated[Any, Field(json_schema_extra={"type": "integer"})] = None
    """Width of the decoded image or video in pixels. Required for packed latents, and ignored for all others."""
    output_type: Literal["pil", "pt", "mp4"] | None = None
    """Output kind: `pil` for an image file or floats in [0, 1], `pt` for a tensor, `mp4` for a video file."""
    partial_postprocess: bool = False
    """True if `pt` returns uint8 with channels last."""
    output_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Data type of floats in the response, the VAE's own by default. JavaScript and numpy have no bfloat16."""
    image_format: Annotated[Literal[ImageFormat, "jpeg"], AfterValidator(_image_format)] | None = None
    """Format of an image file. Absent: `Accept` decides, then JPEG."""
    stream: bool = False
    """True if an MP4 is sent while it is decoded."""
    background: Annotated[str, Field(pattern="^(white|black|#[0-9a-fA-F]{6})$")] | None = None
    """Color that an image file with transparency is laid on: white, black or #rrggbb. Required for JPEG."""
    layers: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Layers of an image, for a model of layers. Its latents may have one more at the start, which is left out."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of a JPEG or WebP file."""
    fps: Annotated[float, Field(ge=1, le=240)] | None = None
    """Frames per second of an MP4, the model's own by default."""
    decode_timestep: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Timestep that LTX-Video's VAE is conditioned on, from version 0.9.1 on."""
    decode_noise_scale: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of noise in LTX-Video's latents, drawn with `seed`. Absent: `decode_timestep`."""
    decode_chunk_size: Annotated[int, Field(ge=1)] | None = None
    """Frames that SVD's VAE decodes at a time, all by default."""
    exact: bool = False
    """True if only diffusers' own pass will do, bit for bit. The service refuses what that has no memory for."""
    sample_mode: SampleMode = "argmax"
    """Latents of the encoder's distribution: its mode, a sample drawn with `seed`, or its moments."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of all random values, random by default. A seed gives the same values on every device."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Parameters:
        """Validate the parameters of a request.

        Raises:
            RequestError: a parameter is wrong; the message names the first three, their values and what is expected.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RequestError("; ".join(_describe(e) for e in error.errors(include_url=False)[:3])) from None


def _describe(error: Any) -> str:
    name, *inner = error["loc"]
    position = f"[{inner[0]}]" if inner and isinstance(inner[0], int) else ""
    return f"`{name}{position}`: {error['msg']}, got {str(error['input'])[:100]!r}"


class OutputKind(Enum):
    """Kind of output of a request."""

    IMAGE = "one encoded image"
    IMAGES = "a ZIP with an encoded image for each item of the batch"
    MP4 = "one MP4 file"
    PIXELS = "floats in [0, 1], [B, C, H, W] or [F, C, H, W]"
    UINT8 = "uint8, [B, H, W, C] or [F, H, W, C]"
    DECODED = "floats about [-1, 1] from the decoder, [B, C, H, W] or [B, C, F, H, W]"
    LATENTS = "latents"


IMAGE_FORMATS: dict[str, ImageFormat] = {
    "image/jpeg": "jpg",
    "image/jpg": "jpg",
    "image/png": "png",
    "image/webp": "webp",
}
"""Image formats, by media type. A new one changes the response to clients that already name it in `Accept`."""
KNOWN_RANGES = {*IMAGE_FORMATS, "image/*", "application/json", "application/zip", "*/*"}
"""Media ranges that the service can send, beside those that begin with `tensor/`."""


@dataclass(frozen=True)
class Accept:
    """Preferences from the `Accept` header of a request."""

    tensor: bool = False
    """True if the client prefers a tensor to a file."""
    json: bool = False
    """True if the client wants base64 inside JSON."""
    image: bool = False
    """True if the client wants an image file, which a video model cannot send."""
    zip: bool = False
    """True if the client wants a ZIP with a file for each item of the batch."""
    ranges: tuple[str, ...] = ()
    """Wanted media ranges, such as `image/png` or `image/*`, best first."""
    refused: frozenset[str] = frozenset()
    """Media ranges with the quality 0."""

    @classmethod
    def parse(cls, header: str | None, content_type: str = "") -> Accept:
        """Read the header (RFC 9110, section 12.5.1).

        The media range with the highest quality wins, then the most specific one, then the first. Unknown ranges do not
        count; without a known one, the client gets the default response. A JSON request that accepts anything gets
        JSON, like in the Inference Toolkit.
        """
        qualities = _qualities(header or "*/*")
        if list(qualities) == ["*/*"] and media_type_of(content_type) == "application/json":
            qualities = {"application/json": 1}
        ranges = sorted(filter(qualities.get, qualities), key=lambda name: (-qualities[name], name.count("*")))
        best = next((known for known in ranges if known in KNOWN_RANGES or known.startswith("tensor/")), "*/*")
        return cls(
            tensor=best.startswith("tensor/"),
            json=best in ("tensor/base64", "application/json"),
            image=best in IMAGE_FORMATS,
            zip=best == "application/zip",
            ranges=tuple(ranges),
            refused=frozenset(media_range for media_range, quality in qualities.items() if not quality),
        )

    def image_format(self, default: ImageFormat) -> ImageFormat:
        """Return the image format that the header prefers, or `default` without a preference.

        Raises:
            RequestError: the header refuses every format; status 406.
        """
        named = {IMAGE_FORMATS.get(media_range) for media_range in (*self.ranges, *self.refused)}
        others = [image_format for image_format in (default, *IMAGE_FORMATS.values()) if image_format not in named]
        if "image/*" in self.refused:
            others = []
        for media_range in self.ranges:
            if media_range in IMAGE_FORMATS:
                return IMAGE_FORMATS[media_range]
            if others and media_range in ("image/*", "*/*"):
                break
        if not others:
            raise RequestError("`Accept` refuses JPEG, PNG and WebP (q=0); accept at least one of them", 406)
        return others[0]


def _qualities(header: str) -> dict[str, float]:
    """Return the media ranges of a header, in order, with their qualities from 0 to 1.

    An invalid quality counts as 1.
    """
    qualities: dict[str, float] = {}
    for entry in header.lower().split(","):
        media_range, *parameters = (text.strip() for text in entry.split(";"))
        quality = next((text[2:] for text in parameters if re.fullmatch(r"q=(0(\.\d*)?|1(\.0*)?)", text)), "1")
        if media_range:
            qualities.setdefault(media_range, float(quality))
    return qualities


def media_type_of(content_type: str) -> str:
    """Return a Content-Type without its parameters."""
    return content_type.split(";")[0].strip().lower()


def decode_output_kind(kind: Kind, parameters: Parameters, accept: Accept) -> OutputKind:
    """Return the kind of output of a decode request. `docs/http-api.md` has the table.

    Raises:
        RequestError: the model or the `Accept` header rules the output out; status 422 or 400.
    """
    if kind == "video" and (accept.image or accept.zip) and parameters.output_type in (None, "pil"):
        raise RequestError("a video cannot be sent as images; use output_type=mp4, or Accept: tensor/binary")
    default = "pt" if accept.tensor else "mp4" if kind == "video" else "pil"
    match kind, parameters.output_type or default:
        case _, "pt":
            return OutputKind.UINT8 if parameters.partial_postprocess else OutputKind.DECODED
        case "video", "mp4":
            return OutputKind.MP4
        case "image", "mp4":
            message = "`output_type`: 'mp4' needs a video model, and this is an image model; use 'pil' or 'pt'"
            raise RequestError(message, 422)
        case "image", _ if accept.zip:
            return OutputKind.IMAGES
        case "image", _ if not accept.tensor:
            return OutputKind.IMAGE
    return OutputKind.PIXELS


def choose_image_format(
    parameters: Parameters, accept: Accept, output_kind: OutputKind, is_transparent: bool = False
) -> ImageFormat:
    """Return the format of an image response: the parameter, the `Accept` header's, or the default.

    The default is JPEG, and PNG inside JSON, like in the Inference Toolkit, and for images with transparency.

    Raises:
        RequestError: the header refuses every format; status 406. JPEG has no transparency, and no background is named,
            or a tensor has one; status 422.
    """
    if output_kind not in (OutputKind.IMAGE, OutputKind.IMAGES):
        if is_transparent and parameters.background:
            raise RequestError("`background`: only a decoded image is laid on a color; leave it out for a tensor", 422)
        return cast(ImageFormat, parameters.image_format or "jpg")
    keeps_transparency = is_transparent and not parameters.background
    default: ImageFormat = "png" if accept.json or keeps_transparency else "jpg"
    image_format = cast(ImageFormat, parameters.image_format or accept.image_format(default))
    if image_format == "jpg" and keeps_transparency:
        raise RequestError(
            "this model's images have transparency, and JPEG has none: send background=white (or black, or #rrggbb), "
            "or image_format=png or webp",
            422,
        )
    return image_format


@dataclass(frozen=True)
class Request:
    """A validated request: the task, the body, and the kind of output."""

    task: Task
    body: Body | list[Body]
    """Bytes of a tensor or file; a list for several files."""
    body_kind: BodyKind
    parameters: Parameters
    output_kind: OutputKind
    accept: Accept
    image_format: ImageFormat
    """Format of an image response."""
    reserve: Callable[[int], None] = lambda size: None
    """Function that counts bytes before they are allocated. It raises `RequestError` above the limit."""
