"""What `/metrics` shows, in Prometheus's format."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()

REQUESTS = Counter("vae_requests_total", "Answers, by path, model and HTTP status.", ["route", "model", "status"])
RECEIVED = Counter("vae_received_bytes_total", "Bytes of bodies that came.")
SENT = Counter("vae_sent_bytes_total", "Bytes of bodies that went.")
STAGES = Histogram(
    "vae_stage_seconds",
    "Time of a request's stages: payload, queue, vae, output; of a streamed video payload, queue, first, stream.",
    ["stage"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
BATCH_SIZE = Histogram("vae_batch_size", "Requests that ran as one batch.", buckets=(1, 2, 4, 8, 16, 32, 64))
PASSES = Counter("vae_passes_total", "Passes through a VAE, by the mode it ran in.", ["task", "mode", "model"])
OUT_OF_MEMORY = Counter("vae_out_of_memory_total", "Passes that ran out of memory and were tried one step down.")
UPCAST = Counter("vae_upcast_total", "Passes that overflowed, or had no kernel in their dtype, and ran in float32.")
FAST = Gauge("vae_fast_pass", "Whether the fast pass is in use (1), once it was wanted.", ["task", "device", "model"])
STOPPED = Counter("vae_stopped_passes_total", "Passes that were ended early, as nobody waited for their result.")
BROKEN = Counter("vae_broken_streams_total", "Videos whose first bytes were sent, and whose last could not be.")
FREE_MEMORY = Gauge("vae_device_free_bytes", "Memory that is free on a device.", ["device"])
TOTAL_MEMORY = Gauge("vae_device_total_bytes", "Memory of a device.", ["device"])
IN_FLIGHT = Gauge("vae_bytes_in_flight", "Bytes of requests in the service: their bodies, and what is made of them.")
RUNNING = Gauge("inf_batch_current_size", "Requests on a device; the Inference Toolkit's name.")
WAITING = Gauge("inf_queue_size", "Requests that wait for a device; the Inference Toolkit's name.")


def exposition() -> bytes:
    """All of them, and the process's own (memory, CPU, open files), as text."""
    return generate_latest()
