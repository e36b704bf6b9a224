"""The table of models, `make models`, and their properties for endpoints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from handlers import MODELS
from handlers.model import Model
from scripts.console import note
from scripts.instances import dollars, table_price

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
WIDE = 260
"""Columns of the table. A narrower terminal gets a few lines for each model."""


def main() -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
    if console.width >= WIDE:
        print_table(console)
    else:
        print_list(console)


def print_table(console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "latents", "scaling", "checkpoint", "class", "dtype", "endpoint"):
        table.add_column(column, no_wrap=True)
    table.add_column("also for", overflow="fold")
    for key, model in MODELS.items():
        columns = (declared(model, "vae_class"), declared(model, "dtype"), instance(key), model.shared_by)
        table.add_row(key, *map(escape, (latents(model), scaling(model), checkpoint(model), *columns)))
    console.print(table)


def print_list(console: Console) -> None:
    """Print a model and its checkpoint on a line each, which can be copied whole, and wrap the rest."""
    for key, model in MODELS.items():
        console.print(f"[bold]{key}[/]  {escape(latents(model))}  {scaling(model)}")
        described = f"{declared(model, 'vae_class')}, {declared(model, 'dtype')} on a GPU; endpoint: {instance(key)}"
        for line in (checkpoint(model), described, model.shared_by and f"also for {model.shared_by}"):
            if line:
                console.print(Padding(escape(line), (0, 0, 0, 2)))


def declared(model: type[Model], name: str) -> str:
    """Return an attribute of a model, or `?` where a model does not declare it."""
    return str(getattr(model, name, "?"))


def instance(key: str) -> str:
    """Return the instance of the model's endpoint and its price by the list of `instances.AS_OF`."""
    if MODELS[key].download:
        return "none: its weights are not on the Hub"
    needs_image = " with IMAGE" if why_not_deployable(key) else ""
    return f"{MODELS[key].instance}, {dollars(table_price('aws', MODELS[key].instance, 'x1'))}/h{needs_image}"


def checkpoint(model: type[Model]) -> str:
    """Return the location of the weights: on the Hub, or in this project."""
    folder = Path(declared(model, "checkpoint"))
    if folder.is_absolute():
        return f"{folder.parent.name}/{folder.name}"
    return "/".join(filter(None, (str(folder), model.subfolder)))


def why_not_deployable(model: str, image: str | None = None, weights: str | None = None) -> str | None:
    """Return why an endpoint cannot run the model, or None.

    requirements.txt bounds the diffusers of the stock Inference Toolkit. A container image has the newest one.
    """
    handler, bound = MODELS[model], re.search(r"^diffusers\b.*<([\d.]+)", REQUIREMENTS.read_text(), re.MULTILINE)
    if handler.download and not weights:
        return (
            f"{model} cannot be deployed: its weights are not on the Hub, only at {handler.download}; "
            f"download that file and name it in WEIGHTS"
        )
    needed, below = ([int(number) for number in version.split(".")] for version in (handler.diffusers, bound[1]))
    if needed < below or image:
        return None
    vae_class = declared(handler, "vae_class")
    return (
        f"{model} cannot run in the stock Inference Toolkit: its {vae_class} needs diffusers {handler.diffusers} or "
        f"later, and the toolkit has one before {bound[1]}; IMAGE=... deploys a container image of this project "
        f"instead, and `make serve MODEL={model}` runs it on a machine of your own"
    )


def is_shipped(model: str) -> bool:
    """Return whether the model's weights are in this project."""
    return Path(MODELS[model].checkpoint).is_absolute()


def published_models(image: str | None) -> list[str]:
    """Return the models with weights on the Hub that an endpoint can run, and note why it cannot run the others."""
    reasons = {key: why_not_deployable(key, image) for key in MODELS if not is_shipped(key)}
    for reason in filter(None, reasons.values()):
        note(reason)
    return [key for key, reason in reasons.items() if not reason]


def license_link(model: str) -> str:
    return MODELS[model].license_link or f"https://huggingface.co/{MODELS[model].checkpoint}"


def latents(model: type[Model]) -> str:
    """Return the shape of a batch of latents."""
    factor, frames = model.frame_factor, ""
    if model.clip:
        frames = f"{model.clip}*(F-5)/{model.decoded_frames(model.clip)}+2, "
    elif model.kind == "video":
        frames = f"(F-1)/{factor}+1, " if factor > 1 else "F, "
    scale = model.vae_scale_factor
    return f"[B, {declared(model, 'latent_channels')}, {frames}H/{scale}, W/{scale}]"


def scaling(model: type[Model]) -> str:
    """Return the scaling parameters that a client sends with the latents of the model's pipeline."""
    if gives_raw_latents(model):
        return "do_scaling=False"
    return ", ".join(f"{value:g}" for value in scaling_factors(model).values()) or "do_scaling"


def gives_raw_latents(model: type[Model]) -> bool:
    """Return whether the latents of the model's own pipeline are not scaled, and the VAE takes them so."""
    return (
        not model.takes_scaled
        and (model.pipeline_layout or ("BCFHW" if model.kind == "video" else "BCHW")) in model.raw_layouts
    )


def scaling_factors(model: type[Model]) -> dict[str, float]:
    """Return `scaling_factor` and `shift_factor`; empty where the model's scaling also has a mean or deviations."""
    config = model.published_config
    if "scaling_factor" not in config or "latents_mean" in config:
        return {}
    return {name: config[name] for name in ("scaling_factor", "shift_factor") if config.get(name)}


if __name__ == "__main__":
    main()
