"""The command `remote-vae`."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from remote_vae.client import Client, RemoteVAEError
from remote_vae.text import visible

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)

Url = Annotated[str, typer.Argument(help="Of the endpoint.", show_default=False)]
Token = Annotated[
    str | None,
    typer.Option(
        help="Of a protected endpoint; better in the variable. Default: the Hugging Face login, for its hosts.",
        envvar="REMOTE_VAE_TOKEN",
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Latents are the VAE's own, not normalised as pipelines have them.")]


NEEDED = {"torch": "torch", "cv2": "opencv-python-headless"}
"""Modules that some commands need beside the package, and what brings them."""


def say_error(message: str) -> None:
    console.print(f"error: {visible(message)}", style="red", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    status = 0
    try:
        app()
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except (RemoteVAEError, ValueError, OSError) as error:
        say_error(str(error))
        status = 1
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        say_error(f"this command needs {error.name}, which is not installed: pip install {NEEDED[error.name]}")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads may wait for an endpoint, and what is written is written


def print_version(value: bool) -> None:
    if value:
        try:
            print(version("remote-vae"))
        except PackageNotFoundError:
            raise ValueError("this checkout is not installed, so it has no version: make install") from None
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="The version of this package.")
    ] = False,
) -> None:
    """Decode and encode on a remote VAE endpoint, whose URL is the first argument of every command."""


@app.command()
def info(url: Url, token: Token = None) -> None:
    """What an endpoint serves."""
    about = Client(url, token).config()
    latents, pixels = about["latents"], about["pixels"]
    table = Table(show_header=False, box=None)
    for name, value in {
        "model": about["model"],
        "checkpoint": about["checkpoint"],
        "class": f"{about['vae_class']} (diffusers {about['diffusers']})",
        "runs in": f"{about['dtype']} on {about['device']}",
        "latents": f"{latents['layout']}, {latents['channels']} channels, 1/{latents['vae_scale_factor']} of the side",
        "of its pipelines": latents["pipeline_layout"],
        "frames": ", ".join(map(str, pixels["frame_counts"])) + ", ..." if about["kind"] == "video" else "",
        "limits": ", ".join(f"{name} {value}" for name, value in about["limits"].items()),
        "version": about["version"],
    }.items():
        if value:
            table.add_row(name, escape(visible(str(value))))
    Console().print(table)


@app.command()
def check(url: Url, token: Token = None) -> None:
    """Whether an endpoint works: a small picture is encoded and decoded, and has to come back."""
    from remote_vae.check import check

    with console.status("encoding and decoding a picture"):
        result = check(url, token, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    print(result)


@app.command()
def decode(
    url: Url,
    file: Annotated[Path, typer.Argument(help="Latents: .safetensors, .npy, or .pt (weights alone).")],
    out: Annotated[
        Path, typer.Argument(help="A picture (.png, .jpg, .webp) or .mp4; of a batch, -0, -1, ... are added.")
    ],
    token: Token = None,
    raw: Raw = False,
    height: Annotated[int | None, typer.Option(help="Of packed latents, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Of packed latents, in pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Of packed latents of a video.")] = None,
    fps: Annotated[float | None, typer.Option(help="Of an MP4.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write an MP4 as it is decoded; to a player with - for the file.")
    ] = False,
) -> None:
    """Latents in a file to pictures, or a video."""
    from remote_vae import files

    more = {"height": height, "width": width, "num_frames": num_frames, "fps": fps}
    client = Client(url, token)
    with console.status(f"decoding {file}"):
        written = files.decode(client, file, out, {"do_scaling": not raw, **more}, stream)
    for path in written:
        print(path)


@app.command()
def encode(
    url: Url,
    pictures: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WebP files of one size, or one MP4.")],
    out: Annotated[Path, typer.Option(help="Latents: .safetensors or .npy.")],
    token: Token = None,
    raw: Raw = False,
    layout: Annotated[str | None, typer.Option(help="Such as packed; `remote-vae info` names the pipeline's.")] = None,
    sample_mode: Annotated[str | None, typer.Option(help="argmax, sample or moments.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of a sample.")] = None,
) -> None:
    """Pictures, or a video, to latents in a file."""
    from remote_vae import files

    more = {"latents_layout": layout, "sample_mode": sample_mode, "seed": seed}
    client = Client(url, token)
    with console.status(f"encoding {len(pictures)} file" + "s" * (len(pictures) > 1)):
        shape = files.encode(client, pictures, out, {"do_scaling": not raw, **more})
    print(f"{out} {shape}")


@app.command()
def latents(
    url: Url,
    folder: Annotated[
        Path, typer.Argument(help="Folder of the images, with the folders in it.", exists=True, file_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Output folder. Kohya and ai-toolkit look in the images' own folder.")],
    format: Annotated[str, typer.Option(help="kohya, musubi, ai-toolkit or webdataset.")],
    token: Token = None,
    resolution: Annotated[str, typer.Option(help="Area to which images are resized: 1024, or 1280x720.")] = "1024",
    upscale: Annotated[bool, typer.Option(help="Enlarge smaller images; ai-toolkit never does.")] = True,
    flip: Annotated[bool, typer.Option(help="Add mirrored images.")] = False,
    sample_mode: Annotated[str | None, typer.Option(help="With webdataset: moments, sample or argmax.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of samples.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Images in flight at a time.")] = 8,
) -> None:
    """Write the latents of a data set as a trainer reads them. Run the command again to go on where it ended."""
    from remote_vae.latents.formats import FORMATS
    from remote_vae.latents.run import Run

    sides = [int(side) for side in resolution.split("x") if side.isdecimal()]
    if len(sides) not in (1, 2) or min(sides) < 64:
        raise ValueError(f"--resolution {resolution}: expected 1024, or 1280x720, of at least 64 a side")
    if format not in FORMATS:
        raise ValueError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    client = Client(url, token)
    about = client.config()
    made = FORMATS[format](about["model"], (sides[0], sides[-1]), upscale, flip, sample_mode)
    run = Run(client, about, folder, out, made, seed, workers)
    encoded = run.go(console)
    console.print(f"{encoded} encoded, {run.there} were there, {len(run.failed)} could not be", highlight=False)
    if left_out := run.what_was_left_out():
        console.print(left_out, markup=False, highlight=False, soft_wrap=True)
    if run.failed:
        raise ValueError(f"{len(run.failed)} images could not be encoded; {run.failed_list} says which and why")


@app.command()
def proxy(
    url: Url,
    token: Token = None,
    port: Annotated[int, typer.Option(help="To listen on.")] = 9000,
    host: Annotated[
        str, typer.Option(help="To listen on; any other than this opens your token's use to others.")
    ] = "127.0.0.1",
    patience: Annotated[float, typer.Option(help="Seconds to wait for an endpoint that starts.")] = 900,
) -> None:
    """A local address that adds the token and waits out a cold start, for clients that do neither."""
    import uvicorn

    from remote_vae.proxy import LOOPBACK, build_proxy

    client = Client(url, token, patience=patience)
    is_local = host in LOOPBACK or host.startswith("127.")
    hosts = [*LOOPBACK, host] if is_local else ["*"]
    console.print(f"http://{host}:{port} is {client.url} now; Ctrl-C ends it", highlight=False)
    uvicorn.run(
        build_proxy(client, hosts),
        host=host,
        port=port,
        log_level="warning",
        server_header=False,  # the endpoint's own pass
        date_header=False,
        timeout_graceful_shutdown=1,
    )
