"""What the pilot's announcement measured: decoding at float16, seconds and percent of the GPU's memory."""

from __future__ import annotations

from typing import NamedTuple


class Seed(NamedTuple):
    model: str
    gpu: str
    memory_gb: int
    """The GPU's own, from its vendor; the announcement has percents only."""
    size: int
    seconds: float
    memory_percent: float
    tiled_seconds: float
    tiled_memory_percent: float

    @property
    def memory_mb(self) -> float:
        return self.memory_percent / 100 * self.memory_gb * 1024


SEEDS = [
    Seed("sd-v1", "RTX 4090", 24, 512, 0.031, 5.6, 0.031, 5.6),
    Seed("sd-v1", "RTX 4090", 24, 1024, 0.148, 20.0, 0.301, 5.6),
    Seed("sd-v1", "RTX 4080", 16, 512, 0.05, 8.4, 0.05, 8.4),
    Seed("sd-v1", "RTX 4080", 16, 1024, 0.224, 30.0, 0.356, 8.4),
    Seed("sd-v1", "RTX 4070 Ti", 12, 512, 0.066, 11.3, 0.066, 11.3),
    Seed("sd-v1", "RTX 4070 Ti", 12, 1024, 0.284, 40.5, 0.454, 11.4),
    Seed("sd-v1", "RTX 3090", 24, 512, 0.062, 5.2, 0.062, 5.2),
    Seed("sd-v1", "RTX 3090", 24, 1024, 0.253, 18.5, 0.464, 5.2),
    Seed("sd-v1", "RTX 3080", 10, 512, 0.07, 12.8, 0.07, 12.8),
    Seed("sd-v1", "RTX 3080", 10, 1024, 0.286, 45.3, 0.466, 12.9),
    Seed("sd-v1", "RTX 3070", 8, 512, 0.102, 15.9, 0.102, 15.9),
    Seed("sd-v1", "RTX 3070", 8, 1024, 0.421, 56.3, 0.746, 16.0),
    Seed("sdxl", "RTX 4090", 24, 512, 0.057, 10.0, 0.057, 10.0),
    Seed("sdxl", "RTX 4090", 24, 1024, 0.256, 35.5, 0.257, 35.5),
    Seed("sdxl", "RTX 4080", 16, 512, 0.092, 15.0, 0.092, 15.0),
    Seed("sdxl", "RTX 4080", 16, 1024, 0.406, 53.3, 0.406, 53.3),
    Seed("sdxl", "RTX 4070 Ti", 12, 512, 0.121, 20.2, 0.12, 20.2),
    Seed("sdxl", "RTX 4070 Ti", 12, 1024, 0.519, 72.0, 0.519, 72.0),
    Seed("sdxl", "RTX 3090", 24, 512, 0.107, 10.5, 0.107, 10.5),
    Seed("sdxl", "RTX 3090", 24, 1024, 0.459, 38.0, 0.46, 38.0),
    Seed("sdxl", "RTX 3080", 10, 512, 0.121, 25.6, 0.121, 25.6),
    Seed("sdxl", "RTX 3080", 10, 1024, 0.524, 93.0, 0.524, 93.0),
    Seed("sdxl", "RTX 3070", 8, 512, 0.183, 31.8, 0.183, 31.8),
    Seed("sdxl", "RTX 3070", 8, 1024, 0.794, 96.4, 0.794, 96.4),
]
