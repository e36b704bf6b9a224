"""The description of the HTTP interface, OpenAPI 3.1: the response to `GET /openapi.json`.

It holds for every model; `GET /config` tells what one model takes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from handlers.model import Task
from handlers.serving.media.request import IMAGE_FORMATS, Parameters
from handlers.version import VERSION

DECODE_ONLY = {
    "normalized", "num_frames", "height", "width", "output_type", "partial_postprocess", "image_format", "stream",
    "quality", "fps", "decode_timestep", "decode_noise_scale", "decode_chunk_size",
}  # fmt: skip
ENCODE_ONLY = {"sample_mode"}

BINARY = {"type": "string", "format": "binary"}
TEXT = {"text/plain": {"schema": {"type": "string"}}}
JSON_OBJECT = {"application/json": {"schema": {"type": "object"}}}

FILES = (*(name for name in IMAGE_FORMATS if name != "image/jpg"), "video/mp4", "application/zip")
"""Media types of files that the service sends."""

TENSOR_BODY = "Bytes of a tensor, C-contiguous and little-endian, with `shape` and `dtype`"
FILE_BODY = "a PNG, JPEG, WebP or MP4 file"
BODIES: dict[Task | None, str] = {
    "decode": f"{TENSOR_BODY}.",
    "encode": f"{TENSOR_BODY}, or {FILE_BODY}.",
    None: f"{TENSOR_BODY}, or {FILE_BODY}.",
}

SUCCESS = "The result. With `Accept: application/json` it is base64 inside JSON."
"""JSON is not listed as a content type: generated clients would take it for the only one that they can read."""

ERRORS = {
    400: "The request is malformed: a parameter, JSON, base64, the number of bytes, or a file.",
    401: "The service has an `API_TOKEN`, and the request has another token or none.",
    403: "A web page of another origin sent the request, or the host name is not the server's.",
    404: "The path does not exist.",
    405: "The path does not take this method.",
    406: "`Accept` refuses every image format.",
    408: "The body did not arrive within `VAE_TIMEOUT` seconds.",
    413: "The body, or its pixels, frames or batch, are over a limit. The error names the limit.",
    415: "The content type, content encoding or video codec is not supported.",
    422: "The request is well-formed, but this model cannot do it, or it has two meanings.",
    500: "The service failed. Its log has the `request_id`.",
    503: "The service is busy, short of memory, starting, stopping or broken. Try again after `Retry-After` seconds.",
    504: "The service did not respond within `VAE_TIMEOUT` seconds.",
}
"""Meaning of each status that is no success."""

RESPONSE_HEADERS = {
    "shape": ("array", "Sizes of the tensor in the body, as JSON. Only of a tensor."),
    "dtype": ("string", "Data type of the tensor in the body. Only of a tensor."),
    "Server-Timing": ("string", "Milliseconds of each stage."),
    "X-Request-Id": ("string", "The request's own id, or a new one. The service logs it."),
    "X-VAE-Frames": ("string", "Frames that were encoded, if a video was cut: `the first 9 of 12`."),
    "X-VAE-Mode": ("string", "How the VAE ran: `full`, `fast`, `reduced`, `sliced` or `tiled`."),
}
"""Type and description of each header of a success."""


@cache
def describe_interface(model: str | None = None) -> dict[str, Any]:
    """Return the OpenAPI document of the service, or of one of its several models."""
    parameters = _schema()
    paths = {
        "/decode": {"post": _operation("decode", "Decode latents to an image, a video or a tensor of pixels.")},
        "/encode": {"post": _operation("encode", "Encode an image, a video or a tensor of pixels to latents.")},
        "/predict": {"post": _operation(None, "Encode a file or a tensor of 3 channels, and decode any other tensor.")},
        "/": {
            "post": {**_operation(None, "Do the same as `/predict`."), "operationId": "root"},
            "get": _read("web_demo", "Return `Ok`, or the web demo to a browser.", TEXT | {"text/html": {}}),
        },
        "/config": {"get": _read("config", "Return what a client needs to know about the model.", JSON_OBJECT)},
        "/health": {"get": _read("health", "Return 200 while the service takes requests.", TEXT)},
        "/metrics": {"get": _read("metrics", "Return metrics in Prometheus' text format.", TEXT)},
        "/openapi.json": {"get": _read("openapi", "Return this document.", JSON_OBJECT)},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Remote VAE",
            "version": VERSION,
            "description": "Decode latents to images and videos, and encode images and videos to latents.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": f"/{model}" if model else "/"}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {
            "schemas": {
                "Parameters": {"type": "object", "properties": parameters},
                "Base64Request": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "inputs": {"type": "string", "contentEncoding": "base64", "description": "The body."},
                        "parameters": {"$ref": "#/components/schemas/Parameters"},
                    },
                },
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {"type": "string", "description": "The fault, what is expected, and how to fix it."},
                        "request_id": {"type": "string", "description": "Id of the request in the log. Only with 500."},
                    },
                },
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schema() -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each parameter. A parameter that is absent has no value, so none is null."""
    properties: dict[str, dict[str, Any]] = Parameters.model_json_schema()["properties"]
    for schema in properties.values():
        del schema["title"]
        if "anyOf" in schema:
            schema |= next(option for option in schema.pop("anyOf") if option != {"type": "null"})
        if schema.get("default", ...) is None:
            del schema["default"]
    return properties


def _operation(task: Task | None, summary: str) -> dict[str, Any]:
    """Return a POST operation; without a task, the body tells it."""
    other_tasks = {"decode": ENCODE_ONLY, "encode": DECODE_ONLY, None: set()}[task]
    names = [name for name in Parameters.model_fields if name not in other_tasks]
    bodies: dict[str, Any] = {"application/octet-stream": {"schema": BINARY}}
    successes: dict[str, Any] = {"tensor/binary": {"schema": BINARY}}
    if task != "decode":
        file = {"type": "object", "properties": {"file": {"type": "array", "items": BINARY}}}
        bodies["multipart/form-data"] = {"schema": file}
    if task != "encode":
        successes |= {media_type: {"schema": BINARY} for media_type in FILES}
    bodies["application/json"] = {"schema": {"$ref": "#/components/schemas/Base64Request"}}
    headers = {name: {"schema": {"type": kind}, "description": text} for name, (kind, text) in RESPONSE_HEADERS.items()}
    return {
        "operationId": task or "predict",
        "summary": summary,
        "parameters": [_query_parameter(name, schema) for name, schema in _schema().items() if name in names],
        "requestBody": {"description": BODIES[task], "required": True, "content": bodies},
        "responses": {
            "200": {"description": SUCCESS, "content": successes, "headers": headers},
            **{str(status): _error(text) for status, text in ERRORS.items()},
        },
    }


def _query_parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    description = schema.pop("description", None)
    return {"name": name, "in": "query", "schema": schema} | ({"description": description} if description else {})


def _read(name: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return a GET operation."""
    success = {"description": "Success.", "content": content}
    errors = {str(status): _error(ERRORS[status]) for status in (401, 403, 503)}
    return {"operationId": name, "summary": summary, "responses": {"200": success, **errors}}


def _error(description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": description, "content": content}
