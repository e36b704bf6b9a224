"""What a client asks for: parameters as they came, validated once, and the answer's form."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from handlers.model import Kind, LatentsLayout, SampleMode, Task
from handlers.serving.errors import RequestError

Body = bytes | bytearray
BodyKind = Literal["tensor", "image", "video"]
ImageFormat = Literal["jpg", "png", "webp"]


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("Input should not be zero")
    return value


def _image_format(value: str) -> str:
    return "jpg" if value == "jpeg" else value


def _dimensions(value: Any) -> Any:
    """`shape=1,4,64,64` and `shape=[1,4,64,64]`, which people try first, beside one `shape` a dimension."""
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) == 1 and isinstance(values[0], str):
        return [part.strip() for part in values[0].strip("[]() ").split(",")]
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
    """Whether the service normalizes latents as the model's pipeline does. Otherwise latents are raw."""
    normalized: bool | None = None
    """Whether latents are normalized still, for a layout in which some of the model's pipelines return raw latents."""
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
    """Whether `pt` returns uint8 with channels last."""
    output_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Data type of floats in the response, the VAE's own by default. JavaScript and numpy have no bfloat16."""
    image_format: Annotated[Literal[ImageFormat, "jpeg"], AfterValidator(_image_format)] | None = None
    """Format of an image file. Absent: `Accept` decides, then JPEG."""
    stream: bool = False
    """Whether an MP4 is sent while it is decoded."""
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
    """Whether the result equals diffusers' bit for bit. The service then refuses what does not fit into memory."""
    sample_mode: SampleMode = "argmax"
    """Latents of the encoder's distribution: its mode, a sample drawn with `seed`, or its moments."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of all random values, random by default. A seed gives the same values on every device."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Parameters:
        """Validates what came.

        Raises:
            RequestError: it names the first three wrong parameters, what came and what is expected.
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
    """The form of an answer."""

    IMAGE = "one encoded image"
    IMAGES = "a ZIP of one encoded image for each of the batch"
    MP4 = "one MP4 file"
    PIXELS = "floats in [0, 1], [B, C, H, W] or [F, C, H, W]"
    UINT8 = "uint8, [B, H, W, C] or [F, H, W, C]"
    DECODED = "floats about [-1, 1] as the decoder gave them, [B, C, H, W] or [B, C, F, H, W]"
    LATENTS = "latents"


IMAGE_FORMATS: dict[str, ImageFormat] = {
    "image/jpeg": "jpg",
    "image/jpg": "jpg",
    "image/png": "png",
    "image/webp": "webp",
}
"""Image formats by media type."""
KNOWN_RANGES = {*IMAGE_FORMATS, "image/*", "application/json", "application/zip", "*/*"}
"""Media ranges that the service gives something of, beside those that begin with `tensor/`."""


@dataclass(frozen=True)
class Accept:
    """The `Accept` header of a request, as far as it matters."""

    tensor: bool = False
    """A tensor rather than an image file."""
    json: bool = False
    """Bytes as base64 inside JSON."""
    image: bool = False
    """An image file, so nothing for a video model."""
    zip: bool = False
    """A file for each of a batch, together in a ZIP."""
    ranges: tuple[str, ...] = ()
    """Media ranges that are wanted, as `image/png` or `image/*`, best first."""
    refused: frozenset[str] = frozenset()
    """Media ranges with the quality 0."""

    @classmethod
    def parse(cls, header: str | None, content_type: str = "") -> Accept:
        """Read the header (RFC 9110, section 12.5.1).

        The media range of the highest quality decides; of several the most specific one, and of these the first. Ranges
        that the service gives nothing of are passed over; where none is left, the default response is given. As in the
        toolkit, a JSON request that accepts anything gets JSON.
        """
        qualities = _qualities(header or "*/*")
        if list(qualities) == ["*/*"] and media_type_of(content_type) == "application/json":
            qualities = {"application/json": 1}
        ranges = sorted(filter(qualities.get, qualities), key=lambda one: (-qualities[one], one.count("*")))
        best = next((one for one in ranges if one in KNOWN_RANGES or one.startswith("tensor/")), "*/*")
        return cls(
            tensor=best.startswith("tensor/"),
            json=best in ("tensor/base64", "application/json"),
            image=best in IMAGE_FORMATS,
            zip=best == "application/zip",
            ranges=tuple(ranges),
            refused=frozenset(one for one, quality in qualities.items() if not quality),
        )

    def image_format(self, default: ImageFormat) -> ImageFormat:
        """The image format that the header wants most, or `default` where it has no preference.

        Raises:
            RequestError: the header refuses every format; status 406.
        """
        named = {IMAGE_FORMATS.get(one) for one in (*self.ranges, *self.refused)}
        others = [one for one in (default, *IMAGE_FORMATS.values()) if one not in named]
        if "image/*" in self.refused:
            others = []
        for one in self.ranges:
            if one in IMAGE_FORMATS:
                return IMAGE_FORMATS[one]
            if others and one in ("image/*", "*/*"):
                break
        if not others:
            raise RequestError("`Accept` refuses JPEG, PNG and WebP (q=0); an image comes as one of them", 406)
        return others[0]


def _qualities(header: str) -> dict[str, float]:
    """The header's media ranges without their parameters, in order, and their qualities from 0 to 1.

    A quality that is no number counts as 1.
    """
    qualities: dict[str, float] = {}
    for entry in header.lower().split(","):
        media_range, *parameters = (part.strip() for part in entry.split(";"))
        quality = next((part[2:] for part in parameters if re.fullmatch(r"q=(0(\.\d*)?|1(\.0*)?)", part)), "1")
        if media_range:
            qualities.setdefault(media_range, float(quality))
    return qualities


def media_type_of(content_type: str) -> str:
    """The header without its parameters."""
    return content_type.split(";")[0].strip().lower()


def decode_output_kind(kind: Kind, parameters: Parameters, accept: Accept) -> OutputKind:
    """The answer to a decode request: the table of `docs/http-api.md`. Raises `RequestError` where it has no row."""
    output_type = parameters.output_type or _default_output_type(kind, accept)
    answers = {
        ("image", "pil"): OutputKind.PIXELS if accept.tensor else OutputKind.IMAGES if accept.zip else OutputKind.IMAGE,
        ("image", "pt"): OutputKind.UINT8 if parameters.partial_postprocess else OutputKind.DECODED,
        ("video", "pil"): OutputKind.PIXELS,
        ("video", "pt"): OutputKind.UINT8 if parameters.partial_postprocess else OutputKind.DECODED,
        ("video", "mp4"): OutputKind.MP4,
    }
    if (kind, output_type) not in answers:
        message = "`output_type`: 'mp4' needs a video model, and this is an image model; use 'pil' or 'pt'"
        raise RequestError(message, 422)
    if kind == "video" and (accept.image or accept.zip) and parameters.output_type in (None, "pil"):
        raise RequestError("a video cannot be answered as images: use output_type=mp4, or Accept: tensor/binary")
    return answers[kind, output_type]


def _default_output_type(kind: Kind, accept: Accept) -> str:
    if accept.tensor:
        return "pt"
    return "mp4" if kind == "video" else "pil"


@dataclass(frozen=True)
class Request:
    """A validated request: what to do with which body, and how to answer."""

    task: Task
    body: Any
    """Bytes, or several files' in a list; a tensor or PIL image where the request came as a plain object."""
    body_kind: BodyKind
    parameters: Parameters
    output_kind: OutputKind
    accept: Accept
    image_format: ImageFormat
    """Format of an image response."""
    hold: Callable[[int], None] = lambda size: None
    """Counts bytes before they are taken for this request, and raises `RequestError` where they are too many."""
