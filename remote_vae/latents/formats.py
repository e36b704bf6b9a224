"""Formats by the name of their `--format`."""

from __future__ import annotations

from remote_vae.latents.ai_toolkit import AIToolkit
from remote_vae.latents.format import Format
from remote_vae.latents.kohya import Kohya
from remote_vae.latents.musubi import Musubi
from remote_vae.latents.simpletuner import SimpleTuner
from remote_vae.latents.webdataset import WebDataset

FORMATS: dict[str, type[Format]] = {
    "kohya": Kohya,
    "musubi": Musubi,
    "ai-toolkit": AIToolkit,
    "simpletuner": SimpleTuner,
    "webdataset": WebDataset,
}
