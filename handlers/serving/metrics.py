"""Metrics of `/metrics`, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()

REQUESTS = Counter("vae_requests_total", "Responses, by route, model and HTTP status.", ["route", "model", "status"])
RECEIVED = Counter("vae_received_bytes_total", "Bytes of received bodies.")
SENT = Counter("vae_sent_bytes_total", "Bytes of sent bodies.")
STAGES = Histogram(
    "vae_stage_seconds",
    "Time of each stage of a request: payload, queue, vae, output; for a streamed video payload, queue, first, stream.",
    ["stage"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
BATCH_SIZE = Histogram("vae_batch_size", "Requests that ran as one batch.", buckets=(1, 2, 4, 8, 16, 32, 64))
PASSES = Counter("vae_passes_total", "Passes through a VAE, by mode.", ["task", "mode", "model"])
OUT_OF_MEMORY = Counter("vae_out_of_memory_total", "Passes that ran out of memory; the next mode is tried.")
UPCAST = Counter("vae_upcast_total", "Passes repeated in float32, after an overflow or without a kernel in the dtype.")
FAST = Gauge("vae_fast_pass", "1 while the fast pass is in use, with VAE_FAST.", ["task", "device", "model"])
STOPPED = Counter("vae_stopped_passes_total", "Passes that stopped early, because nobody waited for their result.")
BROKEN = Counter("vae_broken_streams_total", "Streamed videos that broke after their first bytes.")
FREE_MEMORY = Gauge("vae_device_free_bytes", "Free memory of a device.", ["device"])
TOTAL_MEMORY = Gauge("vae_device_total_bytes", "Memory of a device.", ["device"])
IN_FLIGHT = Gauge("vae_bytes_in_flight", "Bytes in flight: bodies of requests and the tensors made from them.")
RUNNING = Gauge("inf_batch_current_size", "Requests on a device; the Inference Toolkit's name.")
WAITING = Gauge("inf_queue_size", "Requests that wait for a device; the Inference Toolkit's name.")


def exposition() -> bytes:
    """Return all metrics, and those of the process (memory, CPU, open files), as text."""
    return generate_latest()
