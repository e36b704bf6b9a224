"""The results as tables and plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from benchmarks.seeds import SEEDS, Seed

SIDES = {
    "plain": ("plain diffusers", "--s"),
    "project": ("here", "-o"),
    "fast": ("here, the fast pass", "-.d"),
    "reduced": ("here, reduced memory", ":^"),
}
"""Their names and styles in the plots."""

Results = dict[str, Any]
Rows = list[dict[str, Any]]


def write(results: Results, folder: Path) -> None:
    """`results.json` and `README.md`."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "README.md").write_text(readme(results))


def plots(results: Results, folder: Path) -> None:
    """`time.png` and `memory.png`, of pictures' decodes."""
    rows = [row for row in results["forward"] if row["task"] == "decode" and row["size"][2] is None]
    plot(folder / "time.png", "seconds", rows, lambda row, side: row["seconds"][side], lambda seed: seed.seconds)
    plot(folder / "memory.png", "peak, MB", rows, lambda row, side: row["peak_mb"][side], lambda seed: seed.memory_mb)


def readme(results: Results) -> str:
    about = results["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    rates = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in about["matrix_tflops"].items())
    return f"""# Benchmark: {about["device"]}

Written by `make bench` on {about["date"]}, at commit {about["commit"]}, in {about["seconds"]} s. {versions}.
{about["threads"]} torch threads; the system's load average was {about["load_average"]:.1f} when it began.
Large matrix products: {rates}. Weights are random, with a seed (`tiny`: its own).

## Targets

{targets_table(results)}

## The VAE: plain diffusers and this project

Four sides by turns in one run: plain diffusers as published, this project as it is {served_by(results)} ("here"), its
fast pass, and its reduced-memory pass, which it takes where neither fits. Plain diffusers is in seconds (the median)
and MB, the others are against it (the median of the turns' ratios). Memory is the peak of what a call allocates,
workspaces of kernels included, weights not. PSNR is against plain diffusers in float32; where nothing differs there is
none. The floor is the arithmetic of diffusers' pass at the rate above, and the share is that of the fast pass.

{forward_table(results["forward"])}

{fake_table(results["fake_peaks"])}
## Ways to run the forward pass

Each on a copy of the model, by turns with plain diffusers' eager pass in the same dtype; below 1 is better. PSNR is
against float32 eager. The first call includes what it prepares, compilers from an empty cache.

{ways_table(results["ways"])}

## The announcement's tables, on this device

{seeds_table(results["forward"])}

![Time of a decode](time.png)

![Peak memory of a decode](memory.png)

## The service

The clients run on the same machine and take some of it: "clients' CPU" is the share of all cores. The bare loop decodes
in the benchmark's own process, by turns with the service.

{throughput_table(results["throughput"])}

A plain single-threaded handler, as the pilot was (parse, VAE, PIL's PNG in a row on the event loop):

{throughput_table(results["pilot"])}

Latency with one client, against the bare call of the VAE by turns. "Beside the VAE" is what a request took less the VAE
stage of the same request (`Server-Timing`); it is the target's figure, as it does not change with the machine's load.

{latency_table(results["latency"])}

## Videos as they are decoded

An MP4 with `stream=true`, over HTTP: seconds to its first bytes, to bytes from which a frame can be decoded, and to its
last. The model has few channels, so that encoding and sending are a larger part of it than of a published one.

{stream_table(results["stream"])}

## Clients

The queue (`decode_async`) against decoding in place, where generating is a wait as long as a decode:

{queue_table(results["queue"])}

`remote-vae latents` against a loop of the released `remote_encode`, and against what the service takes from as many
clients by themselves:

{data_set_table(results["data_set"])}
"""


def served_by(results: Results) -> str:
    return "served with `VAE_FAST=1`" if results["about"]["fast"] else "by default"


def targets_table(results: Results) -> str:
    gpu = "cuda" in results["about"]["kind"]
    rows = []
    for what, target, needs_gpu, at_least, measure in targets(results):
        value = measure() if gpu or not needs_gpu else None
        if value is None:
            rows.append((what, target, "", f"not yet measured{' (needs a GPU)' if needs_gpu and not gpu else ''}"))
        else:
            threshold = float(target.split()[2])
            met = value >= threshold if at_least else value <= threshold
            rows.append((what, target, f"{value:.3g}", "met" if met else "**not met**"))
    return table(("what", "target", "measured here", ""), rows)


def targets(results: Results) -> list[tuple[str, str, bool, bool, Callable[[], float | None]]]:
    """What, target, whether it is one for GPUs, whether more is better, and its figure in these results."""

    def served(key: str, model: str, size: int, image_format: str, clients: int, rows: str = "throughput") -> Any:
        wanted = (model, size, image_format, clients)
        for row in results[rows]:
            if (row["model"], row["size"][0], row["format"], row["clients"]) == wanted:
                return row[key]
        return None

    def quotient(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    def worst(values: Iterable[float], of: Callable[..., float]) -> float | None:
        values = list(values)
        return of(values) if values else None

    def decodes(models: tuple[str, ...], key: str, side: str | None = None) -> list[float]:
        rows = [row for row in results["forward"] if row["task"] == "decode" and row["size"][0] == 1024]
        return [row[key][side] if side else row[key] for row in rows if row["model"] in models]

    def way(model: str, name: str) -> float | None:
        rows = [row for row in results["ways"] if (row["model"], row["way"]) == (model, name)]
        return rows[0].get("time_ratio") if rows else None

    gpu = "cuda" in results["about"]["kind"]
    images = ("sd-v1", "sdxl", "flux")
    cpu = [
        row["time_ratio"]["fast"]
        for row in results["forward"]
        if not gpu and row["task"] == "decode" and row["model"] in ("sd-v1", "flux") and row["size"][0] in (256, 512)
    ]
    fake = [r["peak_ratio"]["reduced"] for r in results["fake_peaks"] if r["task"] == "decode" and r["size"][0] == 1024]
    gpu_png = served("per_second", "sd-v1", 512, "png", 8)
    on_gpu, anywhere, at_least, at_most = True, False, True, False
    return [
        (
            "time against plain diffusers, fast pass, GPU, SD v1 / SDXL / Flux / FLUX.2 decode 1024x1024",
            "at most 0.30",
            on_gpu,
            at_most,
            lambda: worst(decodes((*images, "flux2"), "time_ratio", "fast"), max),
        ),
        (
            "share of the arithmetic floor, fast pass, 1024x1024 decode, GPU",
            "at least 0.5",
            on_gpu,
            at_least,
            lambda: worst(decodes((*images, "flux2"), "share_of_floor"), min),
        ),
        (
            "peak memory against plain diffusers, fast pass, 1024x1024 decode, GPU",
            "at most 0.5",
            on_gpu,
            at_most,
            lambda: worst(decodes((*images, "flux2"), "peak_ratio", "fast"), max),
        ),
        (
            "Wan 2.1 decode, 33 frames 480x832, against plain diffusers, GPU, bit-identical pass",
            "at most 0.6",
            on_gpu,
            at_most,
            lambda: way("wan-2.1", "data movement only"),
        ),
        ("the same, fast pass", "at most 0.45", on_gpu, at_most, lambda: way("wan-2.1", "fast")),
        (
            "time against plain diffusers, fast pass, CPU, float32, SD v1 / Flux decode 256x256 and 512x512",
            "at most 0.90",
            anywhere,
            at_most,
            lambda: worst(cpu, max),
        ),
        (
            "throughput at 8 clients over a bare loop of the VAE, sd-v1 256x256 JPEG on CPU",
            "at least 0.97",
            anywhere,
            at_least,
            lambda: served("ratio", "sd-v1", 256, "jpg", 8),
        ),
        (
            "the same on a GPU, over a bare loop of the fast pass, 512x512 JPEG, batching on",
            "at least 1.2",
            on_gpu,
            at_least,
            lambda: served("ratio", "sd-v1", 512, "jpg", 8),
        ),
        (
            "PNG answers: throughput against JPEG answers, GPU, 1024x1024, 8 clients",
            "at least 0.9",
            on_gpu,
            at_least,
            lambda: quotient(
                served("per_second", "sd-v1", 1024, "png", 8), served("per_second", "sd-v1", 1024, "jpg", 8)
            ),
        ),
        (
            "latency over HTTP less the pass itself, 1024x1024, uint8 and JPEG, one client, ms",
            "at most 8",
            anywhere,
            at_most,
            lambda: worst((row["overhead_ms"] for row in results["latency"] if row["size"][0] == 1024), max),
        ),
        (
            "`/health` while the device is saturated, p99, ms",
            "at most 50",
            anywhere,
            at_most,
            lambda: worst((row["health_ms"]["p99"] for row in results["throughput"]), max),
        ),
        (
            "`remote-vae latents` against the service's own throughput, as many at a time",
            "at least 0.95",
            anywhere,
            at_least,
            lambda: worst((row["against_service"] for row in results["data_set"]), min),
        ),
        (
            "first byte of a streamed video of 61 frames at 512x320, against its last",
            "at most 0.25",
            False,
            False,
            lambda: worst((row["first_byte_share"] for row in results["stream"]), max),
        ),
        (
            "throughput against the plain single-threaded handler, GPU, PNG, 8 clients",
            "at least 3",
            on_gpu,
            at_least,
            lambda: quotient(gpu_png, served("per_second", "sd-v1", 512, "png", 8, "pilot")),
        ),
        (
            "peak memory against plain diffusers, full frame, same pixels, 1024x1024 decode: of the reduced-memory "
            "pass, which the service runs where the plain one does not fit",
            "at most 0.6",
            anywhere,
            at_most,
            lambda: worst(decodes(images, "peak_ratio", "reduced") or fake, max),
        ),
    ]


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
        "Peaks in float32 at sizes that take this device too long, from the sizes of all tensors of the same code, "
        "which does not compute them:\n\n"
        + table(("model", "task", "pixels", "diffusers, MB", "reduced, MB", "peak ratio"), cells)
        + "\n"
    )


def ways_table(rows: Rows) -> str:
    head = ("model", "pixels", "dtype", "way", "time, s", "time ratio", "peak, MB", "peak ratio", "PSNR, dB")
    cells: list[tuple[str, ...]] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ways = [row for row in rows if row["model"] == model]
        about = (model, pixels(ways[0]["size"]), ways[0]["dtype"])
        if seconds := [row["eager_seconds"] for row in ways if "failed" not in row]:
            figures = (f"{statistics.median(seconds):.3f}", "", f"{ways[0]['eager_peak_mb']:.0f}", "")
            cells.append((*about, "eager", *figures, decibels(ways[0]["eager_psnr_db"]), ""))
        for row in ways:
            if "failed" in row:
                failed = row["failed"].replace("|", "\\|")
                cells.append((*about, row["way"], f"failed: {failed}", "", "", "", "", ""))
                continue
            cells.append(
                (
                    *about,
                    row["way"],
                    f"{row['seconds']:.3f}",
                    f"{row['time_ratio']:.2f}",
                    f"{row['peak_mb']:.0f}",
                    f"{row['peak_ratio']:.2f}",
                    decibels(row["psnr_db"]),
                    f"{row['first_call_seconds']:.1f}",
                )
            )
    return table((*head, "first call, s"), cells)


def decibels(psnr: float | None) -> str:
    """Nothing for what does not differ."""
    return "" if psnr is None else f"{psnr:.0f}"


def seeds_table(rows: Rows) -> str:
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


def throughput_table(rows: Rows) -> str:
    head = ("model", "pixels", "answer", "clients", "requests", "per second", "bare loop", "ratio")
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
    head = ("model", "pixels", "answer", "requests", "over HTTP p50, ms", "p95", "p99", "bare p50, ms", "p95", "p99")
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
        ("model", "pixels", "pictures", "in place, s", "queued, s", "ratio"),
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
        ("model", "pixels", "pictures", "loop, a second", "latents", "service", "against the loop", "the service"),
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


def stream_table(rows: Rows) -> str:
    times = ("whole_seconds", "first_byte_seconds", "first_frame_seconds", "last_byte_seconds")
    return table(
        ("model", "pixels", "not streamed, s", "first byte", "first frame", "last byte", "first byte / last byte"),
        [
            (
                row["model"],
                pixels(row["size"]),
                *(f"{row[time]:.2f}" for time in times),
                f"{row['first_byte_share']:.2f}",
            )
            for row in rows
        ],
    )


def pixels(size: Sequence[int | None]) -> str:
    height, width, frames = size
    return f"{width}x{height}" + (f", {frames} frames" if frames else "")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "Not measured in this run."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plot(
    path: Path, label: str, rows: Rows, value: Callable[[Any, str], float], of_seed: Callable[[Seed], float]
) -> None:
    """Against resolution, with logarithmic axes: this device in colours, the announcement's GPUs as grey bands."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in rows))
    handles = []
    for place, model in enumerate(models):
        points = sorted((row for row in rows if row["model"] == model), key=lambda row: row["size"][0])
        # side by side, as models of one architecture give the same figures
        sizes = [row["size"][0] * 1.04 ** (place - (len(models) - 1) / 2) for row in points]
        for side, (_, style) in SIDES.items():
            values = [value(row, side) for row in points]
            axes.plot(sizes, values, style, color=f"C{place}", markersize=7, fillstyle="none", markeredgewidth=1.5)
        handles.append(Patch(color=f"C{place}", label=model))
    for name, style in SIDES.values():
        handles += axes.plot([], [], style, color="0.2", markersize=7, fillstyle="none", label=name)
    for model, hatch in (("sd-v1", "///"), ("sdxl", "\\\\\\")):
        seeds = [seed for seed in SEEDS if seed.model == model]
        sizes = sorted({seed.size for seed in seeds})
        values = [[of_seed(seed) for seed in seeds if seed.size == size] for size in sizes]
        lowest, highest = list(map(min, values)), list(map(max, values))
        largest = sorted((seed for seed in seeds if seed.size == sizes[-1]), key=of_seed)
        name = f"{model}, {largest[0].gpu} to {largest[-1].gpu}"
        style = {"facecolor": "none", "edgecolor": "0.65", "hatch": hatch, "linewidth": 0.8, "zorder": 0}
        handles.append(axes.fill_between(sizes, lowest, highest, label=name, **style))
    ticks = sorted({row["size"][0] for row in rows} | {seed.size for seed in SEEDS})
    axes.set(xscale="log", yscale="log", xlabel="height and width, pixels", ylabel=label)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set_title("Decoding; grey: plain diffusers in float16 on the announcement's six GPUs", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(handles=handles, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)
