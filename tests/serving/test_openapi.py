"""Tests of the OpenAPI description: it is valid, has the code's parameters, and matches the service's responses."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from openapi_spec_validator import validate
from PIL import Image

from handlers.serving.http.openapi import DECODE_ONLY, ENCODE_ONLY, ERRORS
from handlers.serving.media.request import Parameters
from tests.support.endpoint import Endpoint

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def endpoint(running: Callable[[str], Endpoint]) -> Endpoint:
    return running("sd-v1")


@pytest.fixture(scope="module")
def described(endpoint: Endpoint) -> dict:
    response = requests.get(f"{endpoint.url}/openapi.json", timeout=10)
    assert response.headers["Content-Type"] == "application/json"
    return response.json()


def test_the_description_is_valid(described: dict) -> None:
    validate(described)


def test_every_operation_responds(described: dict, endpoint: Endpoint) -> None:
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            response = requests.request(method, endpoint.url + path, timeout=10)
            documented = operation["responses"][str(response.status_code)]
            assert response.headers["Content-Type"].partition(";")[0] in documented["content"]
            if method == "post":  # an empty body
                assert response.status_code == 400
                assert isinstance(response.json()["error"], str)


def test_each_parameter_has_a_type_and_a_description(described: dict) -> None:
    for task, others in (("decode", ENCODE_ONLY), ("encode", DECODE_ONLY)):
        parameters = described["paths"][f"/{task}"]["post"]["parameters"]
        assert {parameter["name"] for parameter in parameters} == set(Parameters.model_fields) - others
        assert others < set(Parameters.model_fields)
        for parameter in parameters:
            assert parameter["description"]
            assert {"type", "enum", "const"} & parameter["schema"].keys()


def test_responses_match_the_description(described: dict, endpoint: Endpoint) -> None:
    documented = described["paths"]["/decode"]["post"]["responses"]["200"]
    latents = endpoint.latents()
    for accept in documented["content"]:
        if accept != "video/mp4":
            response = endpoint.post(latents, "/decode", headers={"Accept": accept})
            assert response.status_code == 200
            assert response.headers["Content-Type"] == accept
    tensor = endpoint.post(latents, "/decode", headers={"Accept": "tensor/binary"})
    assert [name for name in documented["headers"] if name not in tensor.headers] == ["X-VAE-Frames"]


def test_a_form_with_files_matches_the_description(described: dict, endpoint: Endpoint) -> None:
    (field,) = described["paths"]["/encode"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"][
        "properties"
    ]
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    response = requests.post(f"{endpoint.url}/encode", files=[(field, file.getvalue())] * 2, timeout=30)
    assert response.status_code == 200
    assert response.headers["shape"].startswith("[2, ")


def test_the_described_errors_match_the_docs() -> None:
    _, _, section = (DOCS / "http-api.md").read_text().partition("## Errors")
    rows = re.findall(r"^\| ([\d, ]+) \|", section.partition("\n## ")[0], re.MULTILINE)
    named = {int(status) for row in rows for status in row.split(",")}
    assert named - {431} == set(ERRORS)  # 431 comes from the HTTP server alone
