"""Tests of properties of reading requests that are true for any input."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers import MODELS
from handlers.base import EndpointHandler
from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.media import payload
from handlers.serving.media.request import Parameters
from handlers.serving.pipeline import Pipeline
from handlers.serving.settings import Settings
from handlers.serving.vae.vae import VAE

LIMITS = Limits(max_pixels=100_000)
EXAMPLES = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-2, 9), st.floats(), st.sampled_from(["1e999", "0x10", "٣", "1_0", "4.0"])
)
VALUES = st.one_of(
    NUMBERS, NUMBERS.map(str), st.text(max_size=20), st.booleans(), st.none(), st.lists(NUMBERS, max_size=9)
)
NAMES = st.sampled_from([*Parameters.model_fields, "input_tensor_type", "", "shape[]"])
HEADERS = st.one_of(
    st.sampled_from([None, "*/*", "image/png", "tensor/binary", "application/json", "tensor/base64"]),
    st.text(max_size=30),
)
CONTENT_TYPES = st.sampled_from(["", "tensor/binary", "tensor/base64", "application/json", "image/png"])
JSON = st.recursive(
    st.one_of(VALUES, st.just("AAAA")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
)


@pytest.fixture(scope="module", params=["flux", "hunyuan-video"])
def pipeline(request: pytest.FixtureRequest, checkpoint: Any) -> Pipeline:
    model: type[EndpointHandler] = MODELS[request.param]
    options = Settings(weights=str(checkpoint(request.param)), max_pixels=LIMITS.max_pixels, fast=False)
    return Pipeline([VAE.load(model, "", options, "cpu")], options)


def refused_or(call: Any) -> Any:
    """Return the result of a call, or None if it refuses the request correctly: with a status and a message."""
    try:
        return call()
    except RequestError as error:
        refusal = error
    assert refusal.status in (400, 413, 415, 422)
    assert 0 < len(str(refusal)) < 1000
    return None


@pytest.mark.slow
@EXAMPLES
@given(values=st.dictionaries(NAMES, VALUES))
def test_parameters_are_valid_or_refused(values: dict[str, Any]) -> None:
    parameters = refused_or(lambda: Parameters.parse(values))
    if parameters is not None:
        assert all(0 < size < 2**31 for size in parameters.shape or ())
        assert len(parameters.shape or ()) <= 8
        assert parameters.scaling_factor != 0
        for number in (parameters.scaling_factor, parameters.shift_factor, parameters.fps):
            assert number is None or math.isfinite(number)


@pytest.mark.slow
@EXAMPLES
@given(shape=st.lists(st.integers(1, 2**31 - 1), max_size=8).map(tuple), size=st.integers(0, 4096))
def test_the_bytes_of_a_tensor_match_its_shape(shape: tuple[int, ...], size: int) -> None:
    tensor = refused_or(lambda: payload.read_tensor(bytes(size), shape, "float16"))
    assert (tensor is not None) == (math.prod(shape) * 2 == size)


@EXAMPLES
@given(
    body=st.binary(max_size=300),
    content_type=CONTENT_TYPES,
    accept=HEADERS,
    values=st.dictionaries(NAMES, VALUES),
    task=st.sampled_from([None, "decode", "encode"]),
)
def test_any_message_is_read_or_refused(
    pipeline: Pipeline, body: bytes, content_type: str, accept: str | None, values: dict[str, Any], task: Any
) -> None:
    assert_valid(pipeline, refused_or(lambda: read(pipeline, body, content_type, accept, values, task)))


@EXAMPLES
@given(
    message=JSON | st.fixed_dictionaries({"inputs": JSON, "parameters": st.dictionaries(NAMES, VALUES)}), accept=HEADERS
)
def test_any_json_is_read_or_refused(pipeline: Pipeline, message: Any, accept: str | None) -> None:
    body = json.dumps(message).encode()
    assert_valid(pipeline, refused_or(lambda: read(pipeline, body, "application/json", accept, {}, None)))


@EXAMPLES
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 4, 8, 16, 24, 64]), min_size=1, max_size=6),
    dtype=st.sampled_from([*payload.DTYPES]),
    values=st.dictionaries(NAMES.filter(lambda name: name not in ("shape", "dtype")), VALUES, max_size=4),
    task=st.sampled_from([None, "decode", "encode"]),
    bits=st.binary(min_size=1, max_size=8),
)
def test_any_tensor_with_matching_bytes_is_read_or_refused(
    pipeline: Pipeline, shape: list[int], dtype: str, values: dict[str, Any], task: Any, bits: bytes
) -> None:
    size = math.prod(shape) * payload.DTYPES[dtype].itemsize
    if size > 2**22:
        return
    body = (bits * (size // len(bits) + 1))[:size]
    values = {**values, "shape": shape, "dtype": dtype}
    assert_valid(pipeline, refused_or(lambda: read(pipeline, body, "", None, values, task)))


@EXAMPLES
@given(
    start=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"\0\0\0\x18ftypisom"]),
    data=st.binary(max_size=400),
)
def test_any_file_is_read_or_refused(pipeline: Pipeline, start: bytes, data: bytes) -> None:
    assert_valid(pipeline, refused_or(lambda: read(pipeline, start + data, "", None, {}, None)))


def read(
    pipeline: Pipeline, body: bytes, content_type: str, accept: str | None, values: Any, task: Any
) -> torch.Tensor:
    return pipeline.prepare(pipeline.parse(body, content_type, accept, values, task)).inputs


def assert_valid(pipeline: Pipeline, inputs: torch.Tensor | None) -> None:
    """Check that the VAE's input is finite, has its shape and is within the limits."""
    if inputs is not None:
        assert inputs.ndim == pipeline.layout.ndim
        assert inputs.shape[1] in (3, pipeline.layout.latent_channels)
        assert inputs.isfinite().all()
        task = "encode" if inputs.shape[1] == 3 else "decode"
        assert len(inputs) * pipeline.layout.pixels(task, inputs.shape) <= LIMITS.max_pixels
