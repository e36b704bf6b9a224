"""Prints the table of models: `make models`."""

import sys

from rich.console import Console
from rich.table import Table

from handlers import MODELS
from handlers.serving.layout import vae_scale_factor


def main() -> None:
    table = Table(box=None, header_style="bold")
    for column in ("model", "checkpoint", "class", "dtype", "latents", "scaling", "shift"):
        table.add_column(column, overflow="fold")
    for key, model in MODELS.items():
        config = model.published_config
        scale = vae_scale_factor(config)
        frames = f"F/{config['temporal_compression_ratio']}, " if model.kind == "video" else ""
        checkpoint = "models/tiny" if key == "tiny" else "/".join(filter(None, (model.checkpoint, model.subfolder)))
        latents = f"[B, {config['latent_channels']}, {frames}H/{scale}, W/{scale}]"
        scaling, shift = config["scaling_factor"], config.get("shift_factor") or 0
        table.add_row(key, checkpoint, model.vae_class, model.dtype, latents, f"{scaling:g}", f"{shift:g}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
