"""Tests that the README and the guides are correct: Python and commands run, links resolve, tables match the code."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import diffusers
import pytest
import torch
from PIL import Image

from handlers import MODELS
from handlers.serving import metrics
from handlers.serving.limits import Limits
from scripts import make_options, models
from scripts.local_server import ROOT
from tests.support.small_pipelines import CASES, STEPS, make, run
from tests.support.small_service import SERVED, Service
from tests.test_makefile import ENVIRONMENT

README = (ROOT / "README.md").read_text()
DIFFUSERS = (ROOT / "docs" / "diffusers.md").read_text()
MODELS_PAGE = (ROOT / "docs" / "models.md").read_text()
OPERATING = (ROOT / "docs" / "operating.md").read_text()
HTTP_API = (ROOT / "docs" / "http-api.md").read_text()
REMOTE_VAE = (ROOT / "remote_vae" / "README.md").read_text()
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "remote_vae/*.md", "clients/*/*.md", "benchmarks/*.md", "models/*/*.md")
    for path in ROOT.glob(pattern)
)
COMMAND = re.compile(r"^(?:\$ |    )(make .*?)\s*(?:#.*)?$", re.MULTILINE)
COMMANDS = sorted(
    {command for document in DOCUMENTS for command in COMMAND.findall(document.read_text().replace("\\\n", ""))}
)
QUICK = {"num_inference_steps": 1, "height": 64, "width": 64}
DEPRECATED = "ignore:`do_scaling` is deprecated:FutureWarning"


def code(text: str) -> list[str]:
    """Return the blocks of Python in a document, without the class of a model."""
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "EndpointHandler" not in block]


def snippets(text: str) -> Iterator[tuple[str, str]]:
    """Yield each snippet with its model, which the snippet's first comment names."""
    for block in code(text):
        for snippet in re.split(r"^(?=# MODEL=)", block, flags=re.MULTILINE):
            if named := re.match(r"# MODEL=([a-z0-9-]+(?:\.\d)?)", snippet):
                yield named[1], snippet


def smaller(code: str) -> str:
    """Return code or a command with an eighth of the height and the width, and of the tokens a 64th."""

    def shape(match: re.Match) -> str:
        *sizes, height, width = map(int, match[1].split(","))
        last = [height // 64, width] if len(sizes) == 1 else [height // 8, width // 8]
        return match[0].replace(match[1], (", " if ", " in match[1] else ",").join(map(str, [*sizes, *last])))

    code = re.sub(r"(?:randn\(\[|shape=)([\d, ]+\d)", shape, code)
    return re.sub(r"(?<=height=|.width=)\d+", lambda match: str(int(match[0]) // 8), code)


def run_snippets(text: str, key: str, url: str) -> dict[str, Any]:
    """Run the snippets of one model in their order, after the block that sets ENDPOINT. Return their variables.

    `url` is the URL of the model, which may run in any dtype.
    """
    namespace: dict[str, Any] = {"photograph": Image.effect_noise((64, 64), 50).convert("RGB")}
    exec(next(block for block in code(text) if "ENDPOINT = " in block), namespace)
    namespace["ENDPOINT"] = url
    for model, snippet in snippets(text):
        if model == key:
            exec(snippet, namespace)
    return namespace


@pytest.fixture(params=["", "-bfloat16"], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    """Return the end of the URL of a model in this dtype: a GPU runs most in half precision, a CPU in float32."""
    return request.param


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize("key", dict.fromkeys(key for key, _ in snippets(DIFFUSERS)))
def test_snippets_run(key: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    variables = run_snippets(smaller(DIFFUSERS), key, f"{service.url}/{key}")
    assert min(variables["image"].size) >= 64 if MODELS[key].kind == "image" else len(variables["video"]) > 1000


def run_curl(commands: str, url: str, folder: Path, before: str = "") -> None:
    """Run commands of a document in a shell, against the service at `url`."""
    script = re.sub(r"^\$ ", "", commands, flags=re.MULTILINE).replace("http://127.0.0.1:8000", url)
    script = f"{before}\n{script.replace('curl ', 'curl -sS ')}"
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, check=True, env={**os.environ, "HF_TOKEN": "hf_x"}
    )


CURL = next(block for block in re.findall(r"```console\n(.*?)```", HTTP_API, re.DOTALL) if "@photo.jpg" in block)


@pytest.mark.parametrize("auth", ["with a token", "without"])
def test_curl_makes_a_round_trip_with_an_image(dtype: str, auth: str, service: Service, tmp_path: Path) -> None:
    photograph = Image.effect_noise((72, 64), 50).convert("RGB")
    photograph.save(tmp_path / "photo.jpg")
    commands = CURL if auth == "with a token" else re.sub("AUTH=.*", "AUTH=", CURL)
    run_curl(commands, f"{service.url}/tiny{dtype}", tmp_path)
    assert "dtype: float32" in (tmp_path / "headers.txt").read_text()
    assert not (tmp_path / "error.json").exists()
    with Image.open(tmp_path / "photo-again.png") as again:
        assert again.size == photograph.size


def test_curl_keeps_an_error_out_of_the_image(service: Service, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    commands = CURL[: CURL.index("# 3. ")]
    run_curl(commands, f"{service.url}/tiny", tmp_path)
    assert not (tmp_path / "latents.bin").exists()
    assert "cannot be read" in json.loads((tmp_path / "error.json").read_text())["error"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_curl_command_sends_the_token_and_fails_on_an_error(document: Path) -> None:
    blocks = re.findall(r"```console\n(.*?)```", document.read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", "").splitlines() if " curl " in f" {line}"]
    calls = [command for command in commands if re.search(r"\$URL|http|URL/", command)]
    assert all('-H "$AUTH"' in call and "--fail-with-body" in call for call in calls), calls


def test_a_half_precision_response_is_widened_exactly(dtype: str, service: Service) -> None:
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    own, wide = (service.tensor(f"tiny{dtype}", pixels, "encode", output_dtype=name) for name in (None, "float32"))
    assert own.dtype == getattr(torch, dtype.strip("-") or "float32")
    assert wide.dtype == torch.float32
    assert torch.equal(wide, own.float())


def test_curl_pipes_a_stream_to_a_player(service: Service, tmp_path: Path) -> None:
    """Run the command of the streaming section with a player that writes a file."""
    (command,) = re.findall(r"^\$ (curl -N .*?)\n```", smaller(HTTP_API), re.MULTILINE | re.DOTALL)
    shape = [int(size) for size in re.search(r"shape=([\d,]+)", command)[1].split(",")]
    (tmp_path / "latents.bin").write_bytes(torch.randn(shape).numpy().tobytes())
    player = f"URL={service.url}/hunyuan-video AUTH=; ffplay() {{ cat > video.mp4; }}"
    run_curl(command, "", tmp_path, before=player)
    with av.open(str(tmp_path / "video.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 4 * (shape[2] - 1) + 1


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize("key", dict.fromkeys(key for key, _ in snippets(MODELS_PAGE)))
def test_snippets_of_the_models_run_unchanged(
    key: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key not in (*SERVED, "tiny"):
        pytest.skip(f"{key} needs diffusers {MODELS[key].diffusers}")
    monkeypatch.chdir(tmp_path)
    assert run_snippets(MODELS_PAGE, key, f"{service.url}/{key}")


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_the_documented_callback_shows_each_step(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a pipeline of Wan with the callback of the guide, which decodes with the tiny VAE."""
    monkeypatch.chdir(tmp_path)
    preview = run_snippets(MODELS_PAGE, "taew2.1", f"{service.url}/taew2.1")["preview"]
    case = next(case for case in CASES if case.pipeline == "WanPipeline")
    run(make(case, service.model("wan-2.1")), case, callback_on_step_end=preview)
    for step in range(STEPS):
        with av.open(f"step-{step}.mp4") as video:
            assert sum(1 for _ in video.decode(video=0)) == case.arguments["num_frames"]


@pytest.mark.parametrize(("key", "dtype"), [("flux", ""), ("flux", "-bfloat16"), ("wan-2.1", "")])
def test_snippets_of_the_package_run_unchanged(
    key: str, dtype: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {key for key, _ in snippets(REMOTE_VAE)} == {"flux", "wan-2.1"}
    variables = run_snippets(REMOTE_VAE, key, f"{service.url}/{key}{dtype}")
    assert len(variables["images"]) == 2 if key == "flux" else Path("video.mp4").read_bytes()[4:8] == b"ftyp"


def test_the_first_example_runs(dtype: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it with a small pipeline instead of FLUX.1, without text encoders."""
    case = next(case for case in CASES if case.pipeline == "FluxPipeline")
    make(case, None).save_pretrained(tmp_path)
    text = next(block for block in code(README) if "FluxPipeline" in block)
    text = text.replace("black-forest-labs/FLUX.1-dev", str(tmp_path)).replace(
        "https://....endpoints.huggingface.cloud", f"{service.url}/flux{dtype}"
    )
    call, load = diffusers.FluxPipeline.__call__, diffusers.FluxPipeline.from_pretrained
    without = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", partial(load, **without))
    monkeypatch.setattr(diffusers.FluxPipeline, "__call__", lambda pipe, prompt: call(pipe, **case.arguments, **QUICK))
    exec(text, namespace := {})
    assert namespace["image"].size == (64, 64)


def test_variables_of_make_serve_reach_the_server() -> None:
    variables = ["MODEL=flux", "HOST=::", "PORT=9", "DEVICE=cpu", "DTYPE=float32", "WEIGHTS=random"]
    result = subprocess.run(
        ["make", "-n", "--no-print-directory", "serve", *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    command = " ".join(result.stdout.splitlines()[-1].split())
    names = ("MODEL", "PORT", "HOST", "WEIGHTS", "DEVICE", "DTYPE")
    options = " ".join(f'--{name.lower()}="${name}"' for name in names)
    assert command.endswith(f"-m scripts.serve {options}")


@pytest.mark.parametrize("command", COMMANDS)
def test_make_accepts_each_documented_command(command: str) -> None:
    """Check its variables as the Makefile does. tests/test_makefile.py runs `make`."""
    target, *variables = shlex.split(command)[1:]
    make_options.check([target], dict(variable.split("=", 1) for variable in variables))


@pytest.mark.slow
def test_make_has_each_documented_target() -> None:
    targets = {shlex.split(command)[1] for command in COMMANDS}
    subprocess.run(["make", "-n", *sorted(targets)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    """Check that each link leads to a file of this project, and each anchor to a heading of that document."""
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", document.read_text()):
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), file
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


def test_the_index_links_every_document() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)", index.read_text())}
    documents = [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / name for name in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ]
    assert {path.resolve() for path in documents} - {index.resolve()} <= linked


FIGURES = [
    (figure, source)
    for row in re.findall(r"^\|.*\*\*.*$", README, re.MULTILINE)
    for source in re.findall(r"\]\(([^)#]+)", row)
    for figure in re.findall(r"\*\*\D*([\d.]+)[^*]*\*\*", row)
]


@pytest.mark.parametrize(("figure", "source"), FIGURES)
def test_each_figure_of_the_readme_is_in_the_linked_file(figure: str, source: str) -> None:
    assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\.?\d)", (ROOT / source).read_text())


def test_the_readme_names_every_model() -> None:
    listed = README[README.index("## Models") : README.index("[docs/models.md]")]
    assert set(re.findall(r"`([^`]+)`", listed)) - {"MODEL"} == set(MODELS)


def test_models_table_matches_the_code() -> None:
    table = MODELS_PAGE[MODELS_PAGE.index("|---") : MODELS_PAGE.index("## Adding one")]
    rows = re.findall(r"^\| (`.*?`) \| .* \| `?(.*?)`? \| (.*?) ?\|$", table, re.MULTILINE)
    listed = {key: (latents, sent) for keys, latents, sent in rows for key in re.findall(r"`(\S+)`", keys)}
    assert listed.keys() == MODELS.keys()
    for key, (latents, sent) in listed.items():
        model = MODELS[key]
        if latents == "packed":
            assert model.pipeline_layout == "packed"
            assert "`height`, `width`" in sent
        else:
            assert sorted(latents.strip("[]").split(", ")) == sorted(models.latents(model).strip("[]").split(", "))
            frames_first = latents.split(", ")[1] in ("F", f"(F-1)/{model.frame_factor}+1")
            assert frames_first == (model.pipeline_layout == "BFCHW")
        factors = {name: float(value) for name, value in re.findall(r"(\w+_factor)=([-\d.]+)", sent)}
        own = models.scaling_factors(model)
        assert factors == ({} if own.get("scaling_factor") == 1 else own)
        assert (sent == "`do_scaling=False`") == models.gives_raw_latents(model)


@pytest.mark.slow
def test_models_are_printed() -> None:
    command = [sys.executable, "-m", "scripts.models"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^flux .* 0.3611, 0.1159 ", result.stdout, re.MULTILINE)


def test_documented_limits_match_the_code() -> None:
    table = OPERATING[OPERATING.index("## Limits") : OPERATING.index("## Health")]
    rows = re.findall(r"^\| (`VAE_.*?) \| .* \| ([\d., ]+) \|$", table, re.MULTILINE)
    shown = {
        name: default
        for names, defaults in rows
        for name, default in zip(re.findall(r"VAE_(\w+)", names), defaults.split(", "), strict=True)
    }
    assert shown == {name.upper(): str(field.default) for name, field in Limits.model_fields.items()}


def test_documented_metrics_match_the_code() -> None:
    text = metrics.exposition().decode()
    exported = set(re.findall(r"^# TYPE ((?:vae|inf)_\w+)", text, re.MULTILINE))
    table = OPERATING[OPERATING.index("## Metrics") : OPERATING.index("## Log")]
    assert set(re.findall(r"(?:vae|inf)_\w+", table)) == exported


def test_the_texts_of_503_responses_are_those_of_the_code() -> None:
    section = OPERATING.partition("## Responses with 503")[2].partition("\n## ")[0]
    texts = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    paths = [*(ROOT / "handlers" / "serving").rglob("*.py"), ROOT / "scripts" / "connections.py"]
    code = "".join(path.read_text() for path in paths)
    assert len(texts) > 8
    for text in texts:
        assert re.search(re.sub(r"\d", r"\\{\\w+\\}", text), code), text
    dynamic = "; try again soon"  # after the problem of a device, which has rows of its own
    for error in re.findall(r"RequestError\(([^()]*(?:\([^()]*\)[^()]*)*)\b503\b", code):
        message = "".join(re.findall(r'"([^"]*)"', error))
        assert "stream" in message or message.endswith(f"problem}}{dynamic}") or any(text in message for text in texts)
