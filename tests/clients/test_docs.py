"""Tests of the commands in docs/clients.md, and of the requests of the changed clients.

This repository does not contain the clients' sources. The tests have their requests, and the lines that the commands
change.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import requests
import torch

from scripts.local_server import ROOT
from tests.remote_vae.test_proxy import proxy
from tests.support.small_service import Service, as_tensor
from tests.support.values import assert_same

CLIENTS = (ROOT / "docs" / "clients.md").read_text()
COMMANDS = re.findall(r"^\$ (.*)$", CLIENTS, re.MULTILINE)
PILOT_URLS = [
    f"https://{name}.us-east-1.aws.endpoints.huggingface.cloud"
    for name in ("q1bj3bpq6kzilnsu", "x2dmsqunjd6k9prw", "whhx50ex1aryqvw6", "o7ywnmrahorts457", "qc6479g0aac6qwy9")
]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("sed ")])
def test_the_commands_replace_the_former_urls(command: str, tmp_path: Path) -> None:
    """Replace the URLs in SD.Next, kijai's nodes and Visionatrix' nodes, with and without a slash at the end."""
    file = tmp_path / shlex.split(command)[-1]
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"    'sd': '{url}',\n            endpoint = \"{url}/\"\n" for url in PILOT_URLS))
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    expected = "    'sd': 'http://127.0.0.1:9000',\n            endpoint = \"http://127.0.0.1:9000/\"\n"
    assert file.read_text() == expected * len(PILOT_URLS)


def test_every_listed_command_is_tested() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["pip", "remote-vae", "sed", "sed", "sed"]


def test_requests_of_sdnext_and_kijai_through_the_proxy(service: Service, tmp_path: Path) -> None:
    """Send SD.Next's requests for FLUX.1, packed and unbatched, and kijai's, to the documented command."""
    name, verb, url, *options = shlex.split(next(command for command in COMMANDS if "proxy" in command))
    assert (name, verb, options) == ("remote-vae", "proxy", ["--port", "9000"])
    assert url.startswith("https://")
    vae = service.model("flux")
    raw = torch.randn((1, 16, 4, 6), generator=torch.Generator().manual_seed(0))
    scaled = (raw - 0.1159) * 0.3611
    packed = scaled.view(1, 16, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 6, 64).contiguous()
    headers = {"Content-Type": "tensor/binary", "Accept": "tensor/binary"}
    common = {"dtype": "float32", "output_type": "pt", "partial_postprocess": False, "height": 32, "width": 48}
    sdnext = {**common, "input_tensor_type": "binary", "output_tensor_type": "binary"}
    sdnext |= {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    decoded = vae.decode(raw).sample
    with proxy(service.url, tmp_path) as address:

        def send(path: str, tensor: torch.Tensor, **parameters: object) -> torch.Tensor:
            parameters["shape"] = list(tensor.shape)
            return as_tensor(
                requests.post(address + path, params=parameters, data=tensor.numpy().tobytes(), headers=headers)
            ).float()

        for endpoint, error in (("/flux", 1e-5), ("/flux-float16", 0.005), ("/flux-bfloat16", 0.05)):
            for pixels in (
                send(endpoint, packed, **sdnext),
                send(endpoint, scaled[0], **sdnext),
                send(f"{endpoint}/", raw, **common, do_scaling=False),
            ):
                assert (pixels - decoded).abs().mean() < error, endpoint
        assert_same(send("/flux/", raw, **common, do_scaling=False), decoded)


def test_requests_of_visionatrix_node_through_the_proxy(service: Service, tmp_path: Path) -> None:
    """Send raw latents as ComfyUI does. For a video, the node sends frames and height as height and width."""
    headers = {"Content-Type": "tensor/binary", "Accept": "tensor/binary"}
    common = {"do_scaling": False, "output_type": "pt", "partial_postprocess": False, "dtype": "float32"}
    with proxy(service.url, tmp_path) as address:
        for key, shape in (("flux", (1, 16, 4, 6)), ("hunyuan-video", (1, 16, 2, 4, 6))):
            raw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            parameters = {**common, "shape": list(shape), "height": shape[2] * 8, "width": shape[3] * 8}
            body = raw.numpy().tobytes()
            response = requests.post(f"{address}/{key}/", params=parameters, data=body, headers=headers, timeout=60)
            assert_same(as_tensor(response), service.model(key).decode(raw).sample)
