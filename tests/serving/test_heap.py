import os
import platform

import pytest

from handlers.serving.errors import RequestError
from handlers.serving.vae import heap
from handlers.serving.vae.heap import HOLES, LARGE_BLOCK, MAX_KERNELS, SMALL_BLOCK, Heap, map_gpu_memory
from tests.support import forked

pytestmark = pytest.mark.slow

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")


def run(code: str, *arguments: str) -> int:
    """Run code in its own process, whose heap it changes. Return the value that it prints."""
    status, output, errors = forked.run("-c", code, *arguments, VAE_FAST="0")
    assert status == 0, errors
    return int(output)


@glibc
def test_freed_memory_is_reused_without_new_page_faults() -> None:
    code = """
import resource, threading, torch
from handlers.serving.vae.heap import HEAP
HEAP.configure(keep_pages=True)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with HEAP.settle():
        HEAP.make_room(64 * 2**20)
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def run():
    print(min(faults() for _ in range(10)))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    assert run(code) < 200  # with 16384 pages


LOADED = """
import resource, torch
from handlers import MODELS
from handlers.serving.devices import JobFuture
from handlers.serving.pipeline import load_pipelines
from handlers.serving.vae.heap import HEAP

class Passes:
    vaes = [None]
    def forward(self, vae, batch):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with HEAP.settle():
            HEAP.make_room(80 * 2**20)
            torch.ones(20 * 2**20)
        return [resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before for _ in batch]

pool = load_pipelines({"tiny": MODELS["tiny"]}, "")["tiny"].devices
print(min(pool.submit(Passes(), None, 0, 1, JobFuture()).result() for _ in range(10)))
"""


@glibc
def test_the_thread_of_a_device_has_the_heap_of_the_process() -> None:
    """Its own heap would be a part of 64 MB, and map each larger tensor anew."""
    assert run(LOADED) < 200  # with 20480 pages


PASSES = """
import random, sys, threading
import psutil, torch
from handlers import MODELS
from handlers.serving.settings import Settings
from handlers.serving.vae.vae import VAE

torch.set_num_threads(2)
vae = VAE.load(MODELS["tiny"], "", Settings(fast=False), "cpu")
rng = random.Random(0)
shapes = [(rng.choice("de"), rng.randint(1, 4), rng.randint(16, 64), rng.randint(16, 64)) for _ in range(25)]
largest = max((shape for shape in shapes if shape[0] == "d"), key=lambda shape: shape[1] * shape[2] * shape[3])

def run():
    kept = []  # results stay for a while, as responses do
    for task, batch, height, width in [largest] if sys.argv[1] == "largest" else [*shapes, largest, *shapes]:
        if task == "d":
            result, _ = vae.decode(torch.zeros(batch, 8, height, width))
        else:
            result, _ = vae.encode(torch.zeros(batch, 3, height * 4, width * 4))
        kept = [*kept[-3:], result[..., ::4, ::4].clone()]

thread = threading.Thread(target=run)
thread.start()
thread.join()
print(psutil.Process().memory_info().rss)
"""


@glibc
def test_many_shapes_leave_no_more_memory_than_the_largest() -> None:
    """Compare the memory of many shapes with that of the largest.

    On a busy computer threads can fragment the heap, so one of three runs must pass.
    """
    assert any(run(PASSES, "all") < 1.2 * run(PASSES, "largest") for _ in range(3))


IDLE = """
import sys, time
import psutil, torch
from handlers.serving import devices
from handlers.serving.devices import DevicePool, JobFuture
from handlers.serving.vae.heap import HEAP

class Passes:
    vaes = [None]
    def forward(self, vae, batch):
        with HEAP.settle():
            HEAP.make_room(64 * 2**20)
            return [torch.ones(16 * 2**20).sum() for _ in batch]

HEAP.configure(keep_pages=True)
devices.IDLE_SECONDS = float(sys.argv[1])
pool = DevicePool([torch.device("cpu")], 300)
before = psutil.Process().memory_info().rss
for _ in range(3):
    pool.submit(Passes(), None, 0, 1, JobFuture()).result()
time.sleep(1)
print(psutil.Process().memory_info().rss - before)
"""


@glibc
def test_an_idle_server_returns_its_free_pages() -> None:
    assert run(IDLE, "60") > 60 * 2**20  # of 64; other pages may have gone meanwhile
    assert run(IDLE, "0.1") < 16 * 2**20


SHAPES = """
import sys, torch
from handlers.serving.vae.heap import HEAP
HEAP.configure(keep_pages=True)
for size in map(int, sys.argv[1:]):
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        torch.nn.functional.conv2d(torch.ones(2, 16, size, 16), torch.ones(16, 16, 3, 3))
    print("size", size, flush=True)
"""


def test_the_cache_of_onednn_is_bounded() -> None:
    first, recent = range(4, MAX_KERNELS + 50), range(MAX_KERNELS, MAX_KERNELS + 50)
    status, output, errors = forked.run("-c", SHAPES, *first, *recent, *first)
    assert status == 0, errors
    passes = output.split("size ")[:-1]
    compiled = ["cache_miss" in text for text in passes]
    assert len(compiled) == 2 * len(first) + len(recent)
    assert all(compiled[: len(first)])
    assert not any(compiled[len(first) : -len(first)])
    assert compiled[-len(first)]


class FakeHeap(Heap):
    """A heap on a computer with `resident` bytes in use by this process and `available` bytes free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, resident: int, available: int) -> None:
        super().__init__()
        self.resident, self.total, self.live, self.trims = resident, resident + available, resident, 0
        self.block = LARGE_BLOCK
        monkeypatch.setattr(heap, "_resident", lambda: self.resident)
        monkeypatch.setattr(heap, "_available", lambda: self.total - self.resident)
        monkeypatch.setattr(heap, "_mallopt", lambda _, value: setattr(self, "block", value))

    def trim(self) -> None:
        self.trims += 1
        self.resident = self.base = self.live
        self.floor = min(self.floor, self.base)

    def run(self, grows: int, needed: int = 0) -> int:
        """Run a pass that takes `grows` more bytes, of a new shape unless `needed` is the same.

        Returns:
            How often the heap was trimmed.
        """
        before = self.trims
        with self.settle():
            self.make_room(needed or self.needed + 1)
            self.resident += grows
        return self.trims - before


def test_a_heap_is_trimmed_when_it_outgrows_the_largest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHeap(monkeypatch, resident=1000, available=100_000)
    assert fake.run(500) == 1  # the first trim only measures the state before the first pass
    assert [fake.run(0) for _ in range(10)] == [0] * 10
    assert (fake.run(40), fake.resident) == (0, 1540)
    assert (fake.run(40), fake.resident) == (1, 1000)
    assert (fake.run(700), fake.run(60), fake.resident) == (0, 0, 1760)
    assert (fake.run(60), fake.resident) == (1, 1000)


def test_a_heap_is_not_trimmed_while_a_shape_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHeap(monkeypatch, resident=1000, available=100_000)
    fake.run(500, needed=50)
    assert [fake.run(grows, needed=50) for grows in (100, 90, 0)] == [0, 0, 0]
    assert (fake.run(0, needed=20), fake.resident) == (1, 1000)


def test_a_heap_keeps_no_more_than_it_leaves_available(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHeap(monkeypatch, resident=1000, available=1000)
    assert (fake.run(400, needed=9), fake.run(0, needed=9), fake.resident) == (1, 0, 1400)
    assert (fake.run(200, needed=9), fake.resident) == (1, 1000)


def test_a_heap_is_trimmed_before_memory_becomes_scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    for needed, trims, block in (
        (600 // HOLES, 0, LARGE_BLOCK),
        (1000 // HOLES, 1, LARGE_BLOCK),
        (1000 // HOLES + 1, 1, SMALL_BLOCK),
    ):
        fake = FakeHeap(monkeypatch, resident=1000, available=1000)
        fake.resident += 400
        fake.make_room(needed)
        assert (fake.trims, fake.block, fake.resident) == (trims, block, 1000 if trims else 1400)
        fake.make_room(1)
        assert fake.block == LARGE_BLOCK


def test_memory_for_requests_in_flight_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHeap(monkeypatch, resident=400, available=1600)
    monkeypatch.setattr(heap, "total_memory", lambda device: 2000)
    fake.reserve = 250
    fake.trim()
    assert (fake.available(), fake.capacity()) == (1350, 1350)
    fake.resident = fake.live = 900  # memory of other requests at the time of a trim
    fake.trim()
    assert (fake.available(), fake.capacity()) == (850, 1350)


def test_a_claim_that_is_not_free_now_is_503_and_one_that_never_is_422(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHeap(monkeypatch, resident=400, available=1600)
    monkeypatch.setattr(heap, "total_memory", lambda device: 2000)
    fake.reserve = 250
    fake.trim()
    with fake.claim(1600):
        for size, status in ((1600, 503), (1601, 422)):
            with pytest.raises(RequestError) as refused, fake.claim(size):
                pass
            assert refused.value.status == status
    with fake.claim(1600):
        pass


def test_another_allocator_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    other = Heap()
    other.configure(keep_pages=True)
    with other.settle():
        other.make_room(2**62)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (None, "", "expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64", "max_split_size_mb:64"),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64", None),
    ],
)
def test_explicit_gpu_memory_settings_stay(
    name: str | None, value: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")  # restores the variable after the test
        monkeypatch.delenv(variable)
    if name:
        monkeypatch.setenv(name, value)
    map_gpu_memory()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
