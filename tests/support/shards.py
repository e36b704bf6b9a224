"""Shards as webdataset's own loader reads them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from webdataset import WebDataset


def read_shards(*shards: str) -> list[dict[str, Any]]:
    """Return the samples of shards, decoded."""
    with shards_left_open():
        return list(WebDataset(list(shards), shardshuffle=False).decode())


@contextmanager
def shards_left_open() -> Iterator[None]:
    """Ignore the warnings about shards that webdataset leaves open, until they are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
