import pytest

from handlers.serving.errors import RequestError
from handlers.serving.request import Accept, Answer, Parameters, decode_answer


def test_parameters_as_the_client_spells_them() -> None:
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
        ("image", None, Answer.IMAGE),
        ("image", "image/webp", Answer.IMAGE),
        ("image", "tensor/binary", Answer.DECODED),
        ("video", None, Answer.MP4),
        ("video", "text/plain", Answer.MP4),
        ("image", "application/json, text/plain, */*", Answer.IMAGE),
        ("video", "tensor/binary", Answer.DECODED),
    ],
)
def test_without_an_output_type_accept_decides(kind: str, accept: str | None, expected: Answer) -> None:
    assert decode_answer(kind, Parameters(), Accept.parse(accept)) is expected


def test_a_json_request_that_accepts_anything_is_answered_in_json() -> None:
    assert Accept.parse("*/*", "application/json").json
    assert not Accept.parse("*/*", "tensor/binary").json
    assert not Accept.parse("image/png", "application/json").json
