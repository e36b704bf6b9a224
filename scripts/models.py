"""The models as a table, `make models`, and what an endpoint has to know of them."""

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
WIDE = 226
"""Columns that the table needs; a narrower terminal gets a few lines for each model."""


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
        words = (word(model, "vae_class"), word(model, "dtype"), instance(key), model.shared_by)
        table.add_row(key, *map(escape, (latents(model), scaling(model), checkpoint(model), *words)))
    console.print(table)


def print_list(console: Console) -> None:
    """The model and its checkpoint in a line each, which can be copied whole; all else is wrapped."""
    for key, model in MODELS.items():
        console.print(f"[bold]{key}[/]  {escape(latents(model))}  {scaling(model)}")
        described = f"{word(model, 'vae_class')}, {word(model, 'dtype')} on a GPU; endpoint: {instance(key)}"
        for line in (checkpoint(model), described, model.shared_by and f"also for {model.shared_by}"):
            if line:
                console.print(Padding(escape(line), (0, 0, 0, 4)))


def word(model: type[Model], name: str) -> str:
    """What a model declares; `?` where it leaves out what has no default."""
    return str(getattr(model, name, "?"))


def instance(key: str) -> str:
    """What an endpoint of it runs on, and its price by the list of `instances.AS_OF`."""
    if cannot_run(key):
        return f"none: it needs diffusers {MODELS[key].diffusers}"
    return f"{MODELS[key].instance}, {dollars(table_price('aws', MODELS[key].instance, 'x1'))}/h"


def checkpoint(model: type[Model]) -> str:
    """Where its weights are: on the Hub, or in this project."""
    folder = Path(word(model, "checkpoint"))
    if folder.is_absolute():
        return f"{folder.parent.name}/{folder.name}"
    return "/".join(filter(None, (str(folder), model.subfolder)))


def cannot_run(model: str) -> str | None:
    """Why an endpoint cannot run it; None where it can. requirements.txt bounds diffusers there, and not elsewhere."""
    handler, bound = MODELS[model], re.search(r"^diffusers\b.*<([\d.]+)", REQUIREMENTS.read_text(), re.MULTILINE)
    needed, below = ([int(part) for part in version.split(".")] for version in (handler.diffusers, bound[1]))
    if needed < below:
        return None
    its_class = word(handler, "vae_class")
    return (
        f"{model} cannot run on an endpoint: its {its_class} needs diffusers {handler.diffusers} or later, and "
        f"endpoints have one before {bound[1]}; `make serve MODEL={model}` runs it on a machine of your own"
    )


def is_shipped(model: str) -> bool:
    """Whether the model's weights are part of this project."""
    return Path(MODELS[model].checkpoint).is_absolute()


def published_models() -> list[str]:
    """Those that an endpoint can run, and whose weights are on the Hub; says which of them it cannot run, and why."""
    reasons = {key: cannot_run(key) for key in MODELS if not is_shipped(key)}
    for reason in filter(None, reasons.values()):
        note(reason)
    return [key for key, reason in reasons.items() if not reason]


def license_link(model: str) -> str:
    return MODELS[model].license_link or f"https://huggingface.co/{MODELS[model].checkpoint}"


def latents(model: type[Model]) -> str:
    """The shape of a batch."""
    factor, frames = model.frame_factor, ""
    if model.kind == "video":
        frames = f"(F-1)/{factor}+1, " if factor > 1 else "F, "
    scale = model.vae_scale_factor
    return f"[B, {word(model, 'latent_channels')}, {frames}H/{scale}, W/{scale}]"


def scaling(model: type[Model]) -> str:
    """What a client sends for the latents of the model's pipeline."""
    if gives_raw_latents(model):
        return "do_scaling=False"
    return ", ".join(f"{value:g}" for value in scaling_factors(model).values()) or "do_scaling"


def gives_raw_latents(model: type[Model]) -> bool:
    """Whether what the model's own pipeline gives is not scaled."""
    return (model.pipeline_layout or ("BCFHW" if model.kind == "video" else "BCHW")) in model.raw_layouts


def scaling_factors(model: type[Model]) -> dict[str, float]:
    """`scaling_factor` and `shift_factor` where they are all of the model's scaling; else `do_scaling` says more."""
    config = model.published_config
    if "scaling_factor" not in config or "latents_mean" in config:
        return {}
    return {name: config[name] for name in ("scaling_factor", "shift_factor") if config.get(name)}


if __name__ == "__main__":
    main()
