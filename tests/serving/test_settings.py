import json
from pathlib import Path

import pytest

from handlers.serving.settings import Settings


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what conftest.py sets for all tests."""
    monkeypatch.delenv("VAE_FAST")


def test_the_environment_overrides_endpoint_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endpoint.json").write_text(json.dumps({"model": "flux", "revision": "abc", "version": "1"}))
    monkeypatch.setenv("VAE_DEVICE", "cpu")
    assert Settings.load(tmp_path) == Settings(model="flux", revision="abc", device="cpu")


def test_another_model_ignores_endpoint_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endpoint.json").write_text(json.dumps({"model": "flux", "revision": "abc"}))
    monkeypatch.setenv("VAE_MODEL", "sdxl")
    assert Settings.load(tmp_path) == Settings(model="sdxl", foreign_repository=True)


@pytest.mark.parametrize("variable", ["API_TOKEN", "VAE_MODEL", "VAE_WEIGHTS", "VAE_CORS_ORIGINS", "VAE_FAST"])
@pytest.mark.parametrize("value", [" ", "\t \n"])
def test_a_blank_variable_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"^{variable} is blank; give it a value, or unset it$"):
        Settings.load(tmp_path)


def test_an_empty_variable_is_unset_except_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test an empty variable: `API_TOKEN=$SECRET` without a SECRET would open the service."""
    monkeypatch.setenv("VAE_MODEL", "")
    assert Settings.load(tmp_path) == Settings()
    monkeypatch.setenv("API_TOKEN", "")
    with pytest.raises(ValueError, match=r"^API_TOKEN is blank"):
        Settings.load(tmp_path)


def test_the_error_of_a_wrong_value_names_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_DTYPE", "float8")
    with pytest.raises(ValueError, match=r"^VAE_DTYPE: .*'float16'.*got 'float8'$"):
        Settings.load(tmp_path)
