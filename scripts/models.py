"""Prints the table of models: `make models`."""

import sys

from rich.console import Console
from rich.table import Table

from handlers import MODELS
from handlers.model import Model


def main() -> None:
    table = Table(box=None, header_style="bold")
    for column in ("model", "checkpoint", "class", "dtype", "latents", "scaling", "also for"):
        table.add_column(column, overflow="fold")
    for key, model in MODELS.items():
        checkpoint = "models/tiny" if key == "tiny" else "/".join(filter(None, (model.checkpoint, model.subfolder)))
        table.add_row(key, checkpoint, model.vae_class, model.dtype, latents(model), scaling(model), model.shared_by)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def latents(model: type[Model]) -> str:
    """The shape of a batch."""
    factor, frames = model.frame_factor, ""
    if model.kind == "video":
        frames = f"(F-1)/{factor}+1, " if factor > 1 else "F, "
    return f"[B, {model.latent_channels}, {frames}H/{model.vae_scale_factor}, W/{model.vae_scale_factor}]"


def scaling(model: type[Model]) -> str:
    """What a client sends for the latents of the model's pipeline."""
    if gives_raw_latents(model):
        return "none, do_scaling=False"
    return ", ".join(f"{value:g}" for value in scaling_factors(model).values()) or "none, do_scaling"


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
