import pytest

from handlers.serving.errors import RequestError
from handlers.serving.media.request import Accept, OutputKind, Parameters, decode_output_kind


def test_parameters_in_the_spelling_of_the_client() -> None:
    values = {
        "shape": ["1", "4", "64", "64"],
        "dtype": "float16",
        "partial_postprocess": "False",
        "do_scaling": "True",
        "scaling_factor": "0.18215",
        "image_format": "jpeg",
        "input_tensor_type": "binary",
    }
    parameters = Parameters.parse(values)
    assert (parameters.shape, parameters.dtype) == ((1, 4, 64, 64), "float16")
    assert (parameters.partial_postprocess, parameters.do_scaling) == (False, True)
    assert (parameters.scaling_factor, parameters.image_format) == (0.18215, "jpg")


def test_every_wrong_parameter_is_named() -> None:
    with pytest.raises(RequestError, match=r"`dtype`: .*; `quality`: .*; `fps`: .*"):
        Parameters.parse({"dtype": "int4", "quality": "best", "fps": "0"})


@pytest.mark.parametrize(
    ("kind", "accept", "expected"),
    [
        ("image", None, OutputKind.IMAGE),
        ("image", "image/webp", OutputKind.IMAGE),
        ("image", "tensor/binary", OutputKind.DECODED),
        ("video", None, OutputKind.MP4),
        ("video", "text/plain", OutputKind.MP4),
        ("image", "application/json, text/plain, */*", OutputKind.IMAGE),
        ("video", "tensor/binary", OutputKind.DECODED),
    ],
)
def test_without_an_output_type_accept_decides(kind: str, accept: str | None, expected: OutputKind) -> None:
    assert decode_output_kind(kind, Parameters(), Accept.parse(accept)) is expected


def test_a_json_request_that_accepts_anything_gets_json() -> None:
    assert Accept.parse("*/*", "application/json").json
    assert not Accept.parse("*/*", "tensor/binary").json
    assert not Accept.parse("image/png", "application/json").json


@pytest.mark.parametrize(
    ("accept", "image_format"),
    [
        ("image/jpeg;q=0, image/png", "png"),
        ("image/png;q=0.5, image/webp;q=0.9", "webp"),
        ("image/png;q=0.5, */*", "jpg"),
        ("image/webp, image/png", "webp"),
        ("IMAGE/PNG ; level=1 ; Q=0.2, image/jpeg;q=0.1", "png"),
        ("image/jpeg;q=0, */*", "png"),
        ("image/jpeg;q=0.1, image/*", "png"),
        ("image/jpeg;q=0", "png"),
        ("image/png;q=rubbish", "png"),
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "webp"),  # <img> in Chromium
        ("text/plain", "jpg"),
        ("*/*;q=0", "jpg"),
        ("", "jpg"),
    ],
)
def test_the_preferred_image_format(accept: str, image_format: str) -> None:
    parsed = Accept.parse(accept)
    assert (parsed.image_format("jpg"), parsed.tensor, parsed.json) == (image_format, False, False)


@pytest.mark.parametrize("accept", ["image/*;q=0", "image/jpeg;q=0, image/png;q=0.0, image/webp;q=0.000"])
def test_no_image_format_is_acceptable(accept: str) -> None:
    with pytest.raises(RequestError, match="refuses JPEG, PNG and WebP") as refused:
        Accept.parse(accept).image_format("jpg")
    assert refused.value.status == 406


@pytest.mark.parametrize(
    ("accept", "tensor", "json"),
    [
        ("tensor/binary;q=0.5, image/png", False, False),
        ("image/png;q=0.5, tensor/binary", True, False),
        ("application/json;q=0, tensor/binary", True, False),
        ("application/json, text/plain, */*", False, True),  # axios
        ("tensor/base64", True, True),
    ],
)
def test_qualities_tell_tensors_from_images(accept: str, tensor: bool, json: bool) -> None:
    parsed = Accept.parse(accept)
    assert (parsed.tensor, parsed.json) == (tensor, json)
