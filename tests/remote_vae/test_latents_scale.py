"""Tests of runs over many files, in shards, with several endpoints and with faults, against services that sleep."""

from __future__ import annotations

import io
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from remote_vae import RemoteVAEError
from remote_vae import client as client_module
from remote_vae.cli import _read_shard
from remote_vae.client import Paused
from remote_vae.latents import run as run_module
from remote_vae.latents.formats import FORMATS
from remote_vae.latents.run import Run
from remote_vae.pool import ClientPool, connect
from tests.support.sleeping_service import SleepingService, sleeping_service

pytestmark = pytest.mark.slow

PAUSED = (400, "Bad Request: Invalid state")


def save_images(folder: Path, names: list[str], color: int = 0) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (color, 0, 0)).save(folder / name)


def encode(folder: Path, out: Path, urls: list[str], format: str = "kohya", **options: Any) -> Run:
    client = connect(urls, token="", retry_timeout=10, timeout=options.pop("timeout", 330), report=lambda line: None)
    config = client.config()
    cache = FORMATS[format](config["model"], (64, 64), False)
    run = Run(client, config, folder, out, cache, seed=0, workers=4, **options)
    run.encode(Console(file=io.StringIO()))
    return run


def stored(out: Path) -> set[str]:
    return {path.name.partition("_0064")[0] for path in out.rglob("*.npz")}


def test_shards_are_disjoint_and_complete(tmp_path: Path) -> None:
    """Run three shards into one folder. An image's shard does not depend on the other images."""
    names = [f"{index:02}" for index in range(30)]
    save_images(tmp_path / "images", [f"{name}.png" for name in names])
    parts = []
    with sleeping_service() as service:
        for number in (1, 2, 3):
            out = tmp_path / f"{number}"
            encode(tmp_path / "images", out, [service.url], shard=(number, 3))
            parts.append(stored(out))
            encode(tmp_path / "images", tmp_path / "all", [service.url], shard=(number, 3))
        (tmp_path / "images" / "00.png").unlink()
        encode(tmp_path / "images", tmp_path / "again", [service.url], shard=(1, 3))
        assert service.served == 60 + len(parts[0] - {"00"})
    assert min(map(len, parts)) > 4
    assert sorted(name for part in parts for name in part) == names
    assert stored(tmp_path / "all") == set(names)
    assert stored(tmp_path / "again") == parts[0] - {"00"}


def test_shards_of_a_webdataset_have_different_names(tmp_path: Path) -> None:
    """Continue a run of two shards with one of three: nothing is encoded twice."""
    save_images(tmp_path / "images", [f"{index}.png" for index in range(12)])
    with sleeping_service() as service:
        for number in (1, 2):
            encode(tmp_path / "images", tmp_path / "out", [service.url], "webdataset", shard=(number, 2))
        assert service.served == 12
        run = encode(tmp_path / "images", tmp_path / "out", [service.url], "webdataset")
    assert (run.encoded, run.already_stored) == (0, 12)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert names == ["shard-1-of-2-000000.tar", "shard-2-of-2-000000.tar"]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "/4", "a/b", "1/-4"])
def test_wrong_shards_are_refused(text: str) -> None:
    assert _read_shard("4/4") == (4, 4)
    with pytest.raises(ValueError, match="expected I/N, with I from 1 to N"):
        _read_shard(text)


def test_bad_files_and_names_do_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mix good images with broken ones, ones that the service refuses, and names that cannot be written."""
    monkeypatch.setattr(run_module, "WINDOW", 16)
    folder, out = tmp_path / "images", tmp_path / "out"
    save_images(folder, [f"good {index:03}.png" for index in range(100)])
    save_images(folder, ["refused 1.png", "refused 2.png"], color=7)
    save_images(folder, ["twice.png", "twice.bmp", "new\nline.png", f"{'n' * 250}.png", "blocked/a.png"])
    (folder / "cut.png").write_bytes((folder / "good 001.png").read_bytes()[:60])
    (folder / "empty.png").touch()
    out.mkdir()
    (out / "blocked").touch()  # a file in place of the folder
    bad = {"refused 1.png", "refused 2.png", "twice.png", "blocked/a.png", f"{'n' * 250}.png", "cut.png", "empty.png"}
    with sleeping_service() as service:
        service.refuses = b"\x07"
        run = encode(folder, out, [service.url])
        assert (run.encoded, run.already_stored, run.failures.count) == (102, 0, 7)
        listed = Path(run.failures.location).read_text().splitlines()
        assert {line.split("\t")[0] for line in listed} == bad
        run = encode(folder, out, [service.url])
        assert (run.encoded, run.already_stored, run.failures.count) == (0, 102, 7)
        service.refuses = b"\x09"
        save_images(folder, [f"refused in a row {index:02}.png" for index in range(30)], color=9)
        run = encode(folder, out, [service.url])
        assert (run.encoded, run.already_stored, run.failures.count) == (2, 102, 35)  # the two with color 7 work now
        service.error = (500, "out of order")
        with pytest.raises(RemoteVAEError, match="out of order"):
            encode(folder, out, [service.url])
    assert stored(out) >= {f"good {index:03}" for index in range(100)}


def test_a_run_goes_on_when_endpoints_fail(tmp_path: Path) -> None:
    """Use a good endpoint, one that breaks in the middle, one that is paused, and one that does not respond."""
    save_images(tmp_path / "images", [f"{index:03}.png" for index in range(120)])
    with ExitStack() as stack:
        good, breaking, paused, hanging = (stack.enter_context(sleeping_service(0.002)) for _ in range(4))
        breaking.breaks_after, paused.error, hanging.seconds = 20, PAUSED, 60
        urls = [service.url for service in (hanging, paused, breaking, good)]
        run = encode(tmp_path / "images", tmp_path / "out", urls, timeout=0.5)
        assert (run.encoded, run.failures.count) == (120, 0)
        assert breaking.served >= 20
        assert breaking.served + good.served == 120  # nothing twice
        assert len(stored(tmp_path / "out")) == 120


def test_the_load_follows_the_speed(tmp_path: Path) -> None:
    """Test that an endpoint that takes 40 times as long gets few of the images, and the run does not wait for it."""
    save_images(tmp_path / "images", [f"{index:03}.png" for index in range(150)])
    with sleeping_service(0.005) as fast, sleeping_service(0.2) as slow:
        encode(tmp_path / "images", tmp_path / "out", [slow.url, fast.url])
        assert fast.served + slow.served == 150
        assert 1 <= slow.served < 75


def test_a_paused_endpoint_ends_the_run(tmp_path: Path) -> None:
    """Test that its status 400 is not taken for a fault of the images."""
    save_images(tmp_path / "images", ["a.png"])
    with sleeping_service() as service:
        service.error = PAUSED
        with pytest.raises(Paused, match="paused endpoint"):
            encode(tmp_path / "images", tmp_path / "out", [service.url])


def test_endpoints_of_different_models_are_refused() -> None:
    with sleeping_service() as one, sleeping_service(model="flux", dtype="bfloat16") as other:
        with pytest.raises(RemoteVAEError, match=rf"{other.url} differs .* in model, dtype of /config"):
            ClientPool([one.url, other.url], token="").config()
        with pytest.raises(ValueError, match="expected different URLs"):
            ClientPool([one.url, f"{one.url}/"], token="")


def test_an_endpoint_that_starts_later_is_compared_then() -> None:
    """Test that the config of an endpoint is read before its first request, not only at the start."""
    lines: list[str] = []
    with sleeping_service() as one, sleeping_service(dtype="float16") as other:
        config, other.config = other.config, {}
        pool = ClientPool([one.url, other.url], token="", retry_timeout=1, report=lines.append)
        with pytest.raises(RemoteVAEError, match="no entry version"):
            pool.config()
        other.config = config
        with pytest.raises(RemoteVAEError, match=r"differs .* in dtype"):
            pool.config()


def test_requests_at_a_time_are_spread() -> None:
    with ExitStack() as stack:
        services: list[SleepingService] = [stack.enter_context(sleeping_service(0.3)) for _ in range(3)]
        pool = ClientPool([service.url for service in services], token="")
        pool.config()
        arguments = {"params": {"shape": [1, 64, 64, 3]}, "content": bytes(64 * 64 * 3)}
        threads = [threading.Thread(target=pool.request, args=("POST", "/encode"), kwargs=arguments) for _ in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(service.served for service in services) == 9
        assert min(service.served for service in services) >= 1


def test_an_endpoint_that_is_gone_does_not_end_the_wait_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "REFUSED_TIMEOUT", 0)
    with sleeping_service() as gone, sleeping_service() as starting:
        pool = ClientPool([gone.url, starting.url], token="", retry_timeout=20, report=lambda line: None)
        gone.shutdown()
        gone.server_close()
        pool.config()
        starting.error = (503, "the replica starts")
        threading.Timer(0.3, setattr, (starting, "error", None)).start()
        arguments = {"params": {"shape": [1, 64, 64, 3]}, "content": bytes(64 * 64 * 3)}
        assert pool.request("POST", "/encode", **arguments).status == 200


def test_many_windows_of_stored_files_come_before_the_missing_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "WINDOW", 1)
    save_images(tmp_path / "images", [f"{index:03}.png" for index in range(40)])
    with sleeping_service() as service:
        encode(tmp_path / "images", tmp_path / "out", [service.url])
        (tmp_path / "out" / "039_0064x0064_sdxl.npz").unlink()
        run = encode(tmp_path / "images", tmp_path / "out", [service.url])
    assert (run.encoded, run.already_stored) == (1, 39)


def test_all_endpoints_refuse_connections() -> None:
    with sleeping_service() as one, sleeping_service() as other:
        urls = [one.url, other.url]
    with pytest.raises(RemoteVAEError, match="cannot be reached: connection refused"):
        ClientPool(urls, token="", retry_timeout=0.1, report=lambda line: None).config()


def test_files_of_an_interrupted_shard_are_whole(tmp_path: Path) -> None:
    """Test that every file of a run can be read: the list of failures of another shard is not among them."""
    save_images(tmp_path / "images", ["a.png", "b.png"])
    (tmp_path / "images" / "c.png").touch()
    with sleeping_service() as service:
        for number in (1, 2):
            encode(tmp_path / "images", tmp_path / "out", [service.url], shard=(number, 2))
    for path in (tmp_path / "out").glob("*.npz"):
        assert np.load(path)["latents"].shape == (4, 8, 8)
    lists = sorted(path.name for path in (tmp_path / "out" / ".remote-vae").iterdir())
    assert len(lists) == 2
    assert lists[-1] == "sd-scripts-sdxl.json"
