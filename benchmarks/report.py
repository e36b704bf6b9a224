"""The results of a benchmark as tables and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from scripts.instances import AS_OF, HOURLY

PASSES = {
    "plain": ("plain diffusers", "--s"),
    "project": ("this project", "-o"),
    "fast": ("fast pass", "-.d"),
    "reduced": ("reduced memory", ":^"),
}
"""The name and the style of each pass in the plots."""

Results = dict[str, Any]
Rows = list[dict[str, Any]]


def write(results: Results, folder: Path) -> None:
    """Write `results.json` and `README.md`."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "README.md").write_text(readme(results))


def plots(results: Results, folder: Path) -> None:
    """Write `time.png` and `memory.png`, for decodes of images."""
    rows = [row for row in results["forward"] if row["task"] == "decode" and row["size"][2] is None]
    plot(folder / "time.png", "seconds", "seconds", rows)
    plot(folder / "memory.png", "peak, MB", "peak_mb", rows)


def readme(results: Results) -> str:
    about = results["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    rates = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in about["matrix_tflops"].items())
    served = "as it is served by default" if about["kind"] == "cpu" else "as it is served with `VAE_FAST=1`"
    return f"""# Benchmark: {about["device"]}

Written by `make bench` on {about["date"]}, at commit {about["commit"]}, in {about["seconds"]} s. {versions}.
{about["threads"]} torch threads; the load average of the system was {about["load_average"]:.1f} at the start.
Large matrix products: {rates}. Weights are random, with a seed (`tiny`: its own).

## The VAE: plain diffusers and this project

Four passes take turns in one run: plain diffusers, this project {served} ("here"), its fast pass, and its
reduced-memory pass. Plain diffusers is in seconds (the median) and MB. The others are ratios to it (the median of the
ratios of the turns). Memory is the peak that a call allocates, with the workspaces of kernels and without the weights.
PSNR is against plain diffusers in float32, and empty where nothing differs. The floor is the arithmetic of diffusers'
pass at the rate above. The last column is the share of the fast pass's time that the floor takes.

{forward_table(results["forward"])}

{openvino_table(results["openvino"])}
{fake_table(results["fake_peaks"])}
## Time and memory on this device

{device_table(results["forward"])}

![Time of a decode](time.png)

![Peak memory of a decode](memory.png)

{cost_section(about, results["forward"])}## The service

The clients run on the same machine and take some of it: "clients' CPU" is their share of all cores. The bare loop
decodes in the benchmark's own process, in turns with the service.

{throughput_table(results["throughput"])}

Latency with one client, in turns with the bare call of the VAE. "Beside the VAE" is the time of a request without the
VAE stage of the same request (`Server-Timing`). It does not change with the load of the machine.

{latency_table(results["latency"])}

## Clients

The queue (`decode_async`) against decoding in place, where generating is a wait as long as a decode:

{queue_table(results["queue"])}

`remote-vae latents` against a loop of `remote_encode` from diffusers, and against the service with as many clients:

{data_set_table(results["data_set"])}
"""


def forward_table(rows: Rows) -> str:
    sides = ("project", "fast", "reduced")
    names = ("here", "fast", "reduced")
    head = ("model", "task", "pixels", "dtype", "diffusers, s", *names)
    head += ("diffusers, MB", *names, "PSNR diffusers, dB", *names, "share of floor")
    return table(
        head,
        [
            (
                row["model"],
                row["task"],
                pixels(row["size"]),
                row["dtype"],
                f"{row['seconds']['plain']:.3f}",
                *(f"x {row['time_ratio'][side]:.2f}" for side in sides),
                f"{row['peak_mb']['plain']:.0f}",
                *(f"x {row['peak_ratio'][side]:.2f}" for side in sides),
                *(decibels(row["psnr_db"][side]) for side in ("plain", *sides)),
                f"{row['share_of_floor']:.2f}",
            )
            for row in rows
        ],
    )


def openvino_table(rows: Rows) -> str:
    if not rows:
        return ""
    cells = [
        (
            row["model"],
            row["task"],
            pixels(row["size"]),
            row["dtype"],
            f"{row['seconds']:.3f}",
            *(f"x {row['time_ratio'][side]:.3f}" for side in ("openvino", "fast")),
            f"{row['time_ratio']['fast'] / row['time_ratio']['openvino']:.2f}",
            *(decibels(row["psnr_db"][side]) for side in ("openvino", "fast")),
        )
        for row in rows
    ]
    head = ("model", "task", "pixels", "dtype", "diffusers in float32, s", "OpenVINO", "fast pass", "fast / OpenVINO")
    return f"""## Against OpenVINO

OpenVINO runs the same weights in the same dtype, with as many threads. Times are ratios of minima to diffusers' in
float32; the three take turns. A model without a fast pass runs diffusers' own in float32.

{table((*head, "PSNR OpenVINO, dB", "fast"), cells)}
"""


def fake_table(rows: Rows) -> str:
    if not rows:
        return ""
    cells = [
        (
            row["model"],
            row["task"],
            pixels(row["size"]),
            f"{row['peak_mb']['plain']:.0f}",
            f"{row['peak_mb']['reduced']:.0f}",
            f"{row['peak_ratio']['reduced']:.2f}",
        )
        for row in rows
    ]
    return (
        "Peaks in float32 at sizes that take this device too long. They are computed from the sizes of the tensors:\n\n"
        + table(("model", "task", "pixels", "diffusers, MB", "reduced, MB", "peak ratio"), cells)
        + "\n"
    )


def decibels(psnr: float | None) -> str:
    """Return rounded decibels, or "" where nothing differs."""
    return "" if psnr is None else f"{psnr:.0f}"


def device_table(rows: Rows) -> str:
    return table(
        ("model", "task", "pixels", "time, s", "memory", "tiled time, s", "tiled memory"),
        [
            (
                row["model"],
                row["task"],
                pixels(row["size"]),
                f"{row['seconds']['project']:.3f}",
                f"{row['memory_percent']:.1f} %",
                f"{row['tiled_seconds']:.3f}" if "tiled_seconds" in row else "one tile",
                f"{row['tiled_memory_percent']:.1f} %" if "tiled_seconds" in row else "",
            )
            for row in rows
        ],
    )


def cost_section(about: Results, rows: Rows) -> str:
    """Return the cost of images on CPU instances; "" for a GPU, whose price depends on the instance that it is in."""
    if about["kind"] != "cpu":
        return ""
    cores, sizes = about["threads"], {int(size[1:]): price for size, price in HOURLY["intel-spr"].items()}
    others = [count for count in sizes if count > cores]
    head = ("model", "task", "pixels", "images an hour, measured", "USD for 1,000 images")
    cells = [
        (
            row["model"],
            row["task"],
            pixels(row["size"]),
            f"{3600 / row['seconds']['project']:,.0f}",
            f"{1000 * row['seconds']['project'] / 3600 * sizes[1] * cores:.3f}",
            *(f"{3600 / row['seconds']['project'] * count / cores:,.0f}" for count in others),
        )
        for row in rows
        if row["size"][2] is None
    ]
    return f"""## Cost on a CPU

Images an hour of this processor's {cores} cores, from the times above. Prices are those of `intel-spr` on {AS_OF}:
${sizes[1]:.3f} an hour for a core. Its processor is another one than this, and faster where it has instructions for
bfloat16. The last columns are scaled by the number of cores, not measured.

{table((*head, *(f"x{count}, scaled" for count in others)), cells)}

"""


def throughput_table(rows: Rows) -> str:
    head = ("model", "pixels", "format", "clients", "requests", "per second", "bare loop", "ratio")
    head += ("p50, ms", "p95", "p99", "/health p99, ms", "clients' CPU")
    return table(
        head,
        [
            (
                row["model"],
                pixels(row["size"]),
                row["format"],
                row["clients"],
                row["count"],
                f"{row['per_second']:.3g}",
                f"{row['bare_per_second']:.3g}",
                f"{row['ratio']:.3f}",
                *(f"{row['latency_ms'][p]:.0f}" for p in ("p50", "p95", "p99")),
                f"{row['health_ms']['p99']:.1f}",
                f"{row['client_cpu']:.1%}",
            )
            for row in rows
        ],
    )


def latency_table(rows: Rows) -> str:
    head = ("model", "pixels", "format", "requests", "over HTTP p50, ms", "p95", "p99", "bare p50, ms", "p95", "p99")
    return table(
        (*head, "difference of p50", "beside the VAE, p50"),
        [
            (
                row["model"],
                pixels(row["size"]),
                row["format"],
                row["count"],
                *(f"{row['http_ms'][p]:.1f}" for p in ("p50", "p95", "p99")),
                *(f"{row['bare_ms'][p]:.1f}" for p in ("p50", "p95", "p99")),
                f"{row['difference_ms']:.1f}",
                f"{row['overhead_ms']:.1f}",
            )
            for row in rows
        ],
    )


def queue_table(rows: Rows) -> str:
    return table(
        ("model", "pixels", "images", "in place, s", "queued, s", "ratio"),
        [
            (
                row["model"],
                pixels(row["size"]),
                row["count"],
                *(", ".join(f"{s:.2f}" for s in row[side]) for side in ("in_place_seconds", "queued_seconds")),
                f"{row['ratio']:.2f}",
            )
            for row in rows
        ],
    )


def data_set_table(rows: Rows) -> str:
    sides = ("loop", "latents", "service")
    return table(
        ("model", "pixels", "images", "loop, a second", "latents", "service", "against the loop", "the service"),
        [
            (
                row["model"],
                pixels(row["size"]),
                row["count"],
                *(", ".join(f"{rates[side]:.1f}" for rates in row["per_second"]) for side in sides),
                f"{row['against_loop']:.2f}",
                f"{row['against_service']:.2f}",
            )
            for row in rows
        ],
    )


def pixels(size: Sequence[int | None]) -> str:
    """Return `512x320, 61 frames` for a height, a width and frames."""
    height, width, frames = size
    return f"{width}x{height}" + (f", {frames} frames" if frames else "")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "Not measured in this run."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plot(path: Path, label: str, key: str, rows: Rows) -> None:
    """Plot a figure of each model and pass against resolution, on logarithmic axes."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in rows))
    handles = []
    for index, model in enumerate(models):
        points = sorted((row for row in rows if row["model"] == model), key=lambda row: row["size"][0])
        # Models of one architecture have the same figures, so their points are moved apart.
        sizes = [row["size"][0] * 1.04 ** (index - (len(models) - 1) / 2) for row in points]
        for name, (_, style) in PASSES.items():
            values = [row[key][name] for row in points]
            axes.plot(sizes, values, style, color=f"C{index}", markersize=7, fillstyle="none", markeredgewidth=1.5)
        handles.append(Patch(color=f"C{index}", label=model))
    for name, style in PASSES.values():
        handles += axes.plot([], [], style, color="0.2", markersize=7, fillstyle="none", label=name)
    ticks = sorted({row["size"][0] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="height and width, pixels", ylabel=label, title="Decoding")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    figure.legend(handles=handles, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)
