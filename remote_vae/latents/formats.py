"""Formats by the name of their `--format`, and their own options."""

from __future__ import annotations

from typing import Any

from remote_vae.latents.ai_toolkit import AIToolkit, AIToolkitVideos
from remote_vae.latents.format import Format
from remote_vae.latents.kohya import Kohya
from remote_vae.latents.musubi import Musubi, MusubiVideos
from remote_vae.latents.simpletuner import SimpleTuner, SimpleTunerVideos
from remote_vae.latents.videos import Sampling
from remote_vae.latents.webdataset import WebDataset, WebDatasetVideos

FORMATS: dict[str, type[Format]] = {
    "kohya": Kohya,
    "musubi": Musubi,
    "ai-toolkit": AIToolkit,
    "simpletuner": SimpleTuner,
    "webdataset": WebDataset,
}
VIDEO_FORMATS: dict[str, type[Format]] = {
    "musubi": MusubiVideos,
    "ai-toolkit": AIToolkitVideos,
    "simpletuner": SimpleTunerVideos,
    "webdataset": WebDatasetVideos,
}


def check_options(name: str, sampling: Sampling | None, i2v: bool, metadata: str | None) -> None:
    """Check the options that not every format has.

    Raises:
        ValueError: there is no such format, or it has no such option.
    """
    if name not in FORMATS:
        raise ValueError(f"--format {name}: expected one of {', '.join(FORMATS)}")
    if metadata and name != "simpletuner":
        raise ValueError(f"--metadata: --format {name} has none; remove it, or use --format simpletuner")
    if sampling and name not in VIDEO_FORMATS:
        *others, last = VIDEO_FORMATS
        raise ValueError(f"--frames: --format {name} has no videos; expected {', '.join(others)} or {last}")
    if i2v and name != "musubi" and not (name == "ai-toolkit" and sampling):
        raise ValueError("--i2v: expected --format musubi, or ai-toolkit with --frames; remove the option")


def make_format(
    name: str,
    options: tuple[Any, ...],
    config: dict[str, Any],
    sampling: Sampling | None,
    i2v: bool,
    metadata: str | None,
) -> Format:
    """Make a format from checked options: of images, or of videos if there is a sampling.

    Args:
        options: values of the fields that all formats have, in their order.
        config: the endpoint's `/config`.

    Raises:
        ValueError: the format does not take these values.
    """
    own: dict[str, Any] = {"i2v": True} if i2v else {}
    if name == "simpletuner":
        own["metadata"] = metadata
    if sampling is None:
        return FORMATS[name](*options, **own)
    if name == "webdataset" and (config["kind"] != "video" or config["pixels"]["frame_counts"][:2] != [1, 5]):
        message = f"--frames: {config['model']} does not encode 1, 5, 9, ... frames"
        raise ValueError(f"{message}; expected a VAE of videos that does, such as wan-2.1")
    if name in ("ai-toolkit", "simpletuner"):
        own["frames"] = _only_length(name, sampling)
    else:
        own["sampling"] = sampling
    return VIDEO_FORMATS[name](*options, **own)


def _only_length(name: str, sampling: Sampling) -> int:
    """Return the one number of frames that ai-toolkit and SimpleTuner take of each video.

    Raises:
        ValueError: the options are those of musubi-tuner.
    """
    if len(sampling.frames) != 1 or sampling != Sampling(sampling.frames):
        raise ValueError(f"--format {name} takes one number of --frames, and no other option of frames")
    return sampling.frames[0]
