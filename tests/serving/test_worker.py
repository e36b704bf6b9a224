import threading
import time

import pytest

from handlers.serving.errors import RequestError
from handlers.serving.worker import DeviceWorkers


class Device:
    """Doubles numbers; holds each batch until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Semaphore(0)

    def __call__(self, work: list[int]) -> list[int]:
        self.batches.append(work)
        assert self.go.acquire(timeout=10)
        if 13 in work:
            raise ValueError("thirteen")
        return [number * 2 for number in work]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def device() -> Device:
    return Device()


def test_what_waits_together_goes_as_one_batch_in_order_and_within_the_limit(device: Device) -> None:
    workers = DeviceWorkers([device], batch_limit=3, queue_limit=9)
    first = workers.submit(0, "a", 1)
    wait_until(lambda: workers.running == 1)
    futures = [workers.submit(number, key, 1) for number, key in ((1, "a"), (2, "b"), (3, "a"), (4, "a"), (5, "a"))]
    assert workers.waiting == 5
    device.go.release(4)
    assert [future.result(10) for future in (first, *futures)] == [0, 2, 4, 6, 8, 10]
    assert device.batches == [[0], [1, 3, 4], [2], [5]]
    wait_until(lambda: workers.running == 0)


def test_a_job_over_the_limit_goes_alone(device: Device) -> None:
    workers = DeviceWorkers([device], batch_limit=3, queue_limit=9)
    device.go.release(3)
    assert [workers.submit(number, "a", 9).result(10) for number in (1, 2)] == [2, 4]


def test_one_that_fails_does_not_fail_its_batch(device: Device) -> None:
    workers = DeviceWorkers([device], batch_limit=3, queue_limit=9)
    workers.submit(0, "a", 1)
    wait_until(lambda: workers.running == 1)
    good, bad, good_too = (workers.submit(number, "a", 1) for number in (1, 13, 2))
    device.go.release(5)
    assert (good.result(10), good_too.result(10)) == (2, 4)
    with pytest.raises(ValueError, match="thirteen"):
        bad.result(10)


def test_cancelled_work_never_reaches_the_device(device: Device) -> None:
    workers = DeviceWorkers([device], batch_limit=0, queue_limit=9)
    workers.submit(0, "a", 1)
    wait_until(lambda: workers.running == 1)
    gone, here = workers.submit(1, "a", 1), workers.submit(2, "a", 1)
    assert gone.cancel()
    device.go.release(3)
    assert here.result(10) == 4
    assert device.batches == [[0], [2]]


def test_work_is_never_compared() -> None:
    """Tensors have no plain equality."""

    class Incomparable(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("ambiguous")

    workers = DeviceWorkers([lambda work: work], batch_limit=9, queue_limit=99)
    futures = [workers.submit(Incomparable(number), number % 2, 1) for number in range(20)]
    assert [int(future.result(10)) for future in futures] == list(range(20))


def test_every_device_works() -> None:
    devices = [Device(), Device()]
    workers = DeviceWorkers(devices, batch_limit=9, queue_limit=99)
    futures = [workers.submit(1, object(), 1) for _ in range(2)]
    wait_until(lambda: workers.running == 2)
    for device in devices:
        device.go.release()
    assert [future.result(10) for future in futures] == [2, 2]
    assert [device.batches for device in devices] == [[[1]], [[1]]]


def test_a_full_queue_says_so_and_takes_work_again_when_there_is_room(device: Device) -> None:
    workers = DeviceWorkers([device], batch_limit=0, queue_limit=2)
    workers.submit(0, "a", 1)
    wait_until(lambda: workers.running == 1)
    futures = [workers.submit(number, "a", 1) for number in (1, 2)]
    with pytest.raises(RequestError, match="2 requests are waiting already") as refused:
        workers.submit(3, "a", 1)
    assert refused.value.status == 503
    device.go.release(4)
    assert [future.result(10) for future in futures] == [2, 4]
    assert workers.submit(4, "a", 1).result(10) == 8
