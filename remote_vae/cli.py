"""The command `remote-vae`."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from remote_vae.client import Client, RemoteVAEError
from remote_vae.text import visible

if TYPE_CHECKING:  # torch is imported by the commands that need it
    from remote_vae.latents.videos import Sampling

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)

Url = Annotated[str, typer.Argument(help="URL of the endpoint.", show_default=False)]
Token = Annotated[
    str | None,
    typer.Option(
        help="Token of a protected endpoint; better set the variable. Default: the Hugging Face login, for its hosts.",
        envvar="REMOTE_VAE_TOKEN",
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Use the VAE's own latents, without the pipeline's normalization.")]

PACKAGES = {"torch": "torch", "cv2": "opencv-python-headless", "av": "av", "fsspec": "fsspec"}
"""Modules that some commands need in addition, and their packages."""


def print_error(message: str) -> None:
    console.print(f"error: {visible(message)}", style="red", markup=False, highlight=False, soft_wrap=True)


def print_line(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


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
        print_error(str(error))
        status = 1
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        print_error(f"this command needs {error.name}, which is not installed: pip install {PACKAGES[error.name]}")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads may still wait for an endpoint


def print_version(value: bool) -> None:
    if value:
        try:
            print(version("remote-vae"))
        except PackageNotFoundError:
            raise ValueError("this checkout is not installed, so it has no version: run `make install`") from None
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Decode and encode on a remote VAE endpoint. Its URL is the first argument of every command."""


@app.command()
def info(url: Url, token: Token = None) -> None:
    """Show what an endpoint serves."""
    config = Client(url, token).config()
    latents, pixels = config["latents"], config["pixels"]
    table = Table(show_header=False, box=None)
    for name, value in {
        "model": config["model"],
        "checkpoint": config["checkpoint"],
        "class": f"{config['vae_class']} (diffusers {config['diffusers']})",
        "runs in": f"{config['dtype']} on {config['device']}",
        "latents": f"{latents['layout']}, {latents['channels']} channels, 1/{latents['vae_scale_factor']} of the side",
        "pipeline layout": latents["pipeline_layout"],
        "frames": ", ".join(map(str, pixels["frame_counts"])) + ", ..." if config["kind"] == "video" else "",
        "limits": ", ".join(f"{name} {value}" for name, value in config["limits"].items()),
        "version": config["version"],
    }.items():
        if value:
            table.add_row(name, escape(visible(str(value))))
    Console().print(table)


@app.command()
def check(url: Url, token: Token = None) -> None:
    """Check that an endpoint works: encode a small image, decode its latents, and compare."""
    from remote_vae.check import check

    with console.status("encoding and decoding an image"):
        result = check(url, token, print_line)
    print(result)


@app.command()
def decode(
    url: Url,
    file: Annotated[Path, typer.Argument(help="File of latents: .safetensors, .npy, .pt (weights only), or .latent.")],
    out: Annotated[
        Path, typer.Argument(help="Image (.png, .jpg, .webp) or .mp4. A batch becomes files with -0, -1, ...")
    ],
    token: Token = None,
    raw: Raw = False,
    height: Annotated[int | None, typer.Option(help="Height in pixels, for packed latents.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels, for packed latents.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames, for packed latents of a video.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of an MP4.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of an image, for a model of layers.")] = None,
    background: Annotated[
        str | None, typer.Option(help="Color under a transparent image: white, black or #rrggbb. JPEG needs it.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write an MP4 while it is decoded; with - as the file, to a player.")
    ] = False,
) -> None:
    """Decode the latents in a file to images or a video."""
    from remote_vae import files

    sizes = {"height": height, "width": width, "num_frames": num_frames, "fps": fps, "layers": layers}
    parameters = {"do_scaling": not raw, "background": background, **sizes}
    client = Client(url, token)
    with console.status(f"decoding {file}"):
        written = files.decode(client, file, out, parameters, stream)
    for path in written:
        print(path)


@app.command()
def encode(
    url: Url,
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WebP files of one size, or one MP4.")],
    out: Annotated[Path, typer.Option(help="File of latents: .safetensors or .npy.")],
    token: Token = None,
    raw: Raw = False,
    layout: Annotated[
        str | None, typer.Option(help="Layout of the latents, such as packed. `remote-vae info` shows the pipeline's.")
    ] = None,
    sample_mode: Annotated[str | None, typer.Option(help="argmax, sample or moments.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of a sample.")] = None,
) -> None:
    """Encode images or a video to a file of latents."""
    from remote_vae import files

    parameters = {"do_scaling": not raw, "latents_layout": layout, "sample_mode": sample_mode, "seed": seed}
    client = Client(url, token)
    with console.status(f"encoding {len(images)} file" + "s" * (len(images) > 1)):
        shape = files.encode(client, images, out, parameters)
    print(f"{out} {shape}")


def _read_shard(text: str) -> tuple[int, int]:
    """Return the number of a shard, from 1, and the number of shards."""
    number, slash, shards = text.partition("/")
    if not (slash and number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise ValueError(f"--shard {text}: expected I/N, with I from 1 to N, such as 3/8")
    return int(number), int(shards)


def _read_frames(text: str) -> tuple[int, ...]:
    """Return the lengths of clips."""
    lengths = text.split(",")
    if not all(length.strip().isdecimal() for length in lengths):
        raise ValueError(f"--frames {text}: expected lengths of clips, such as 1,25,45")
    return tuple(map(int, lengths))


def _read_resolution(text: str) -> tuple[int, int]:
    sides = [int(side) for side in text.split("x") if side.isdecimal()]
    if len(sides) not in (1, 2) or min(sides) < 64:
        raise ValueError(f"--resolution {text}: expected 1024, or 1280x720, with sides of 64 or more")
    return sides[0], sides[-1]


def _read_sampling(frames: str | None, extraction: str, *options: int | float | None) -> Sampling | None:
    """Return the way to take clips from videos; None for images."""
    from remote_vae.latents.videos import Sampling

    if frames or extraction == "full":
        return Sampling(_read_frames(frames or "1"), extraction, *options)  # type: ignore[arg-type]
    if (extraction, *options) != ("head", 1, 1, 129, None):
        raise ValueError("options of frames without --frames: add lengths of clips, such as --frames 1,25,45")
    return None


@app.command()
def latents(
    url: Url,
    images: Annotated[
        str,
        typer.Argument(help="Folder of images with its subfolders, its URL, or shards ('shards/*.tar')."),
    ],
    out: Annotated[
        str, typer.Option(help="Output folder, or its URL. Kohya and ai-toolkit look in the images' own folder.")
    ],
    format: Annotated[str, typer.Option(help="kohya, musubi, ai-toolkit, simpletuner or webdataset.")],
    token: Token = None,
    arch: Annotated[str | None, typer.Option(help="Trained model, if several use it: lumina, z_image, krea2.")] = None,
    resolution: Annotated[str, typer.Option(help="Area to which images are resized: 1024, or 1280x720.")] = "1024",
    upscale: Annotated[bool, typer.Option(help="Enlarge smaller images; ai-toolkit never does.")] = True,
    flip: Annotated[bool, typer.Option(help="Add mirrored images.")] = False,
    sample_mode: Annotated[str | None, typer.Option(help="With webdataset: moments, sample or argmax.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of samples.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Images in flight at a time.")] = 8,
    more_urls: Annotated[
        list[str], typer.Option("--url", help="URL of one more endpoint of the model, to share the load. Repeatable.")
    ] = [],  # noqa: B006
    frames: Annotated[
        str | None,
        typer.Option(help="Encode videos: lengths of clips, such as 1,25,45; one with ai-toolkit and simpletuner."),
    ] = None,
    frame_extraction: Annotated[str, typer.Option(help="head, chunk, slide, uniform or full, as in musubi.")] = "head",
    frame_stride: Annotated[int, typer.Option(help="With slide.")] = 1,
    frame_sample: Annotated[int, typer.Option(help="With uniform.")] = 1,
    max_frames: Annotated[int, typer.Option(help="With full.")] = 129,
    source_fps: Annotated[
        float | None, typer.Option(help="Frame rate of the videos, to convert it to the model's as musubi does.")
    ] = None,
    i2v: Annotated[
        bool,
        typer.Option("--i2v", help="Add latents of the first frame, as musubi's --i2v and ai-toolkit's do_i2v do."),
    ] = False,
    metadata: Annotated[
        str | None, typer.Option(help="With simpletuner: its aspect_ratio_bucket_metadata_<id>.json of the images.")
    ] = None,
    shard: Annotated[str, typer.Option(help="Part of the images for this machine, such as 1/8 to 8/8.")] = "1/1",
) -> None:
    """Write the latents of a data set as a trainer reads them. Run the command again to continue an interrupted run."""
    from remote_vae.latents.formats import check_options, make_format
    from remote_vae.latents.run import Run
    from remote_vae.pool import connect

    size = _read_resolution(resolution)
    sampling = _read_sampling(frames, frame_extraction, frame_stride, frame_sample, max_frames, source_fps)
    check_options(format, sampling, i2v, metadata)
    client = connect([url, *more_urls], token)
    config = client.config()
    options = (config["model"], size, upscale, flip, sample_mode, arch)
    cache = make_format(format, options, config, sampling, i2v, metadata)
    run = Run(client, config, images, out, cache, seed, workers, _read_shard(shard))
    run.encode(console)
    print_line(f"{run.encoded} encoded, {run.already_stored} already stored, {run.failures.count} failed")
    if skipped := run.skipped_summary():
        print_line(skipped)
    if run.failures.count:
        raise ValueError(f"{run.failures.count} images could not be encoded; {run.failures.location} has the reasons")


@app.command()
def proxy(
    url: Url,
    token: Token = None,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9000,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any other than this lets other machines use your token.")
    ] = "127.0.0.1",
    retry_timeout: Annotated[float, typer.Option(help="Seconds to wait for an endpoint that starts.")] = 900,
) -> None:
    """Serve an endpoint at a local address that adds the token and waits for replicas, for clients that do neither."""
    import uvicorn

    from remote_vae.proxy import LOOPBACK, build_proxy

    client = Client(url, token, retry_timeout=retry_timeout)
    is_local = host in LOOPBACK or host.startswith("127.")
    hosts = [*LOOPBACK, host] if is_local else ["*"]
    print_line(f"http://{host}:{port} forwards to {client.url}; press Ctrl-C to stop")
    uvicorn.run(
        build_proxy(client, hosts),
        host=host,
        port=port,
        log_level="warning",
        server_header=False,  # the endpoint's own header is forwarded
        date_header=False,
        timeout_graceful_shutdown=1,
    )
