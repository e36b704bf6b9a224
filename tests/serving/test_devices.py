import threading
import time
from collections.abc import Iterator

import pytest
import torch

from handlers.serving import devices
from handlers.serving.devices import DeviceQueue
from handlers.serving.errors import RequestError
from handlers.serving.vae.stop import PassStopped, check_wanted


class Device:
    """A device that doubles values and blocks each batch until it is released."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Semaphore(0)
        self.alive = True
        self.idle_calls = 0

    def run(self, work: list[int]) -> list[int]:
        self.batches.append(work)
        assert self.go.acquire(timeout=10)
        if 13 in work:
            raise ValueError("thirteen")
        if 666 in work:
            self.alive = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [number * 2 for number in work]

    def is_alive(self) -> bool:
        return self.alive

    def on_start(self) -> None:
        self.thread = threading.current_thread().name

    def on_idle(self) -> None:
        self.idle_calls += 1


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def device() -> Device:
    return Device()


def test_waiting_jobs_form_one_batch_in_order_within_the_limit(device: Device) -> None:
    queue = DeviceQueue([device], batch_limit=3, timeout=60)
    first = queue.submit(0, "a", 1)
    wait_until(lambda: queue.running == 1)
    futures = [queue.submit(number, key, 1) for number, key in ((1, "a"), (2, "b"), (3, "a"), (4, "a"), (5, "a"))]
    assert queue.waiting == 5
    device.go.release(4)
    assert [future.result(10) for future in (first, *futures)] == [0, 2, 4, 6, 8, 10]
    assert device.batches == [[0], [1, 3, 4], [2], [5]]
    wait_until(lambda: queue.running == 0)


def test_an_idle_device_runs_its_idle_hook_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "IDLE_SECONDS", 0.05)
    queue = DeviceQueue([device], batch_limit=0, timeout=60)
    device.go.release(2)
    for times in (1, 2):
        assert queue.submit(times, "a", 1).result(10) == 2 * times
        wait_until(lambda times=times: device.idle_calls == times)
        time.sleep(0.2)
        assert device.idle_calls == times


def test_a_job_over_the_limit_runs_alone(device: Device) -> None:
    queue = DeviceQueue([device], batch_limit=3, timeout=60)
    device.go.release(3)
    assert [queue.submit(number, "a", 9).result(10) for number in (1, 2)] == [2, 4]


def test_a_failing_job_does_not_fail_its_batch(device: Device) -> None:
    queue = DeviceQueue([device], batch_limit=3, timeout=60)
    queue.submit(0, "a", 1)
    wait_until(lambda: queue.running == 1)
    good, bad, good_too = (queue.submit(number, "a", 1) for number in (1, 13, 2))
    device.go.release(5)
    assert (good.result(10), good_too.result(10)) == (2, 4)
    with pytest.raises(ValueError, match="thirteen"):
        bad.result(10)


def test_cancelled_work_never_reaches_the_device(device: Device) -> None:
    queue = DeviceQueue([device], batch_limit=0, timeout=60)
    queue.submit(0, "a", 1)
    wait_until(lambda: queue.running == 1)
    gone, here = queue.submit(1, "a", 1), queue.submit(2, "a", 1)
    assert gone.cancel()
    device.go.release(3)
    assert here.result(10) == 4
    assert device.batches == [[0], [2]]


class Passes:
    """A device that runs a batch until it is released, and polls whether anybody waits for it, as a model does."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.alive_checked = False

    def run(self, work: list[int]) -> list[int]:
        self.batches.append(work)
        while not self.go.wait(0.001):
            check_wanted()
        return work

    def is_alive(self) -> bool:
        self.alive_checked = True
        return True


def test_each_gpu_has_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, torch.device] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.update({threading.current_thread().name: device}))
    gpus = [torch.device("cuda", index) for index in range(3)]
    devices.DevicePool(gpus, timeout=60)
    wait_until(lambda: len(used) == 3)
    assert used == {f"device-{index}": gpu for index, gpu in enumerate(gpus)}
    devices.DevicePool([torch.device("cpu")], timeout=60)  # sets nothing


class TestAbandonedWork:
    """Tests of work whose client disconnects while a device runs it."""

    @pytest.fixture
    def passes(self) -> Passes:
        return Passes()

    @pytest.fixture
    def queue(self, passes: Passes) -> DeviceQueue:
        queue = DeviceQueue([devices.Device(passes.run, passes.is_alive, lambda: None)], batch_limit=9, timeout=60)
        passes.go.set()
        assert queue.submit(0, "first", 1).result(10) == 0
        passes.go.clear()
        return queue

    def batch(self, queue: DeviceQueue, passes: Passes) -> list[devices.JobFuture[int]]:
        """Submit two jobs that run as one batch."""
        busy = queue.submit(1, "busy", 1)
        wait_until(lambda: [1] in passes.batches)
        jobs = [queue.submit(number, "batch", 1) for number in (2, 3)]
        busy.cancel()
        wait_until(lambda: [2, 3] in passes.batches)
        return jobs

    def test_a_batch_stops_when_nobody_waits(self, queue: DeviceQueue, passes: Passes) -> None:
        speed = queue._seconds_per_size
        for job in self.batch(queue, passes):
            job.cancel()
        late = queue.submit(4, "late", 1)
        wait_until(lambda: [4] in passes.batches)
        assert queue._seconds_per_size == speed  # a pass that was not interrupted
        passes.go.set()
        assert late.result(10) == 4
        assert passes.batches == [[0], [1], [2, 3], [4]]  # no further pass
        assert not passes.alive_checked
        assert queue.problem is None

    def test_a_batch_continues_for_clients_that_wait(self, queue: DeviceQueue, passes: Passes) -> None:
        gone, here = self.batch(queue, passes)
        gone.cancel()
        time.sleep(0.05)
        assert queue.running == 2
        passes.go.set()
        assert here.result(10) == 3
        assert passes.batches == [[0], [1], [2, 3]]


def test_work_is_never_compared() -> None:
    """Test that jobs are not compared, because tensors have no plain equality."""

    class Incomparable(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("ambiguous")

    queue = DeviceQueue([devices.Device(lambda work: work, lambda: True, lambda: None)], batch_limit=9, timeout=60)
    futures = [queue.submit(Incomparable(number), number % 2, 1) for number in range(20)]
    assert [int(future.result(10)) for future in futures] == list(range(20))


def test_all_devices_get_work() -> None:
    devices = [Device(), Device()]
    queue = DeviceQueue(devices, batch_limit=9, timeout=60)
    futures = [queue.submit(1, object(), 1) for _ in range(2)]
    wait_until(lambda: queue.running == 2)
    for device in devices:
        device.go.release()
    assert [future.result(10) for future in futures] == [2, 2]
    assert [device.batches for device in devices] == [[[1]], [[1]]]


def test_small_work_overtakes_large_work_without_starving_it() -> None:
    order, go = [], threading.Event()

    def run(work: list[int]) -> list[int]:
        assert go.wait(10)
        order.extend(work)
        time.sleep(work[0] * 1e-3)
        return work

    queue = DeviceQueue([devices.Device(run, lambda: True, lambda: None)], batch_limit=0, timeout=60)
    go.set()
    queue.submit(100, object(), 100).result(10)  # from here on the queue knows that a size of 1 takes a millisecond
    go.clear()
    order.clear()
    first = queue.submit(1, "first", 1)
    wait_until(lambda: queue.running == 1)
    large = queue.submit(300, "large", 300)
    small = queue.submit(2, "small", 2)
    time.sleep(0.4)
    late = queue.submit(3, "late", 3)
    go.set()
    for future in (first, large, small, late):
        future.result(10)
    assert order == [1, 2, 300, 3]


@pytest.mark.parametrize("batch_limit", [0, 9])
def test_a_lost_device_is_unhealthy_and_fails_its_jobs(device: Device, batch_limit: int) -> None:
    queue = DeviceQueue([device], batch_limit, timeout=60)
    assert queue.problem is None
    queue.submit(0, "a", 1)
    wait_until(lambda: queue.running == 1)
    futures = [queue.submit(number, "a", 1) for number in (1, 666, 2)]
    device.go.release(9)
    results = []
    for future in futures:
        try:
            results.append(future.result(10))
        except RequestError as error:
            results.append((str(error), error.status))
    lost = ("device 0 is lost; try again soon", 503)
    assert results == ([2, lost, lost] if batch_limit == 0 else [lost, lost, lost])
    assert queue.problem == "device 0 is lost"
    with pytest.raises(RequestError, match="device 0 is lost"):
        queue.submit(3, "a", 1)


def test_a_device_is_lost_when_its_thread_ends() -> None:
    def leave(work: list[int]) -> list[int]:
        raise SystemExit

    queue = DeviceQueue([devices.Device(leave, lambda: True, lambda: None)], batch_limit=0, timeout=60)
    with pytest.raises(RequestError, match="device 0 is lost"):
        queue.submit(1, "a", 1).result(10)
    assert queue.problem == "device 0 is lost"


def test_other_devices_continue() -> None:
    devices = [Device(), Device()]
    queue = DeviceQueue(devices, batch_limit=0, timeout=60)
    futures = {number: queue.submit(number, object(), 1) for number in (1, 666)}
    wait_until(lambda: queue.running == 2)
    for device in devices:
        device.go.release(9)
    assert futures[1].result(10) == 2
    with pytest.raises(RequestError, match="is lost"):
        futures[666].result(10)
    assert queue.problem in ("device 0 is lost", "device 1 is lost")
    assert [queue.submit(number, object(), 1).result(10) for number in (2, 3)] == [4, 6]


def test_a_stuck_device_is_unhealthy(device: Device) -> None:
    queue = DeviceQueue([device], batch_limit=0, timeout=0.01)
    future = queue.submit(1, "a", 1)
    wait_until(lambda: queue.problem)
    assert queue.problem == "a device is stuck"
    device.go.release()
    assert future.result(10) == 2
    wait_until(lambda: queue.problem is None)


def test_small_work_does_not_starve_large_work() -> None:
    """Give each batch the same duration, so that sizes do not predict the time."""
    go = threading.Event()

    def run(work: list[int]) -> list[int]:
        assert go.wait(10)
        time.sleep(0.002)
        return work

    queue = DeviceQueue([devices.Device(run, lambda: True, lambda: None)], batch_limit=0, timeout=2)
    go.set()
    queue.submit(1, object(), 1).result(10)
    large = queue.submit(0, "large", 10**6)
    end = time.monotonic() + 10
    while not large.done():
        small = [queue.submit(1, object(), 1) for _ in range(5)]
        small[0].result(10)
        assert time.monotonic() < end
    assert large.result() == 0


def test_a_closed_queue_refuses_new_jobs_and_finishes_the_others(device: Device) -> None:
    queue = DeviceQueue([device], batch_limit=0, timeout=60)
    futures = [queue.submit(0, "a", 1)]
    wait_until(lambda: queue.running == 1)
    queue.close()
    assert queue.problem == "the service is shutting down"
    with pytest.raises(RequestError, match="the service is shutting down; try again soon") as refused:
        queue.check_open()
    assert refused.value.status == 503
    futures.append(queue.submit(1, "a", 1))  # a request that was admitted before
    device.go.release(2)
    assert [future.result(10) for future in futures] == [0, 2]


def test_a_device_runs_its_idle_hook_while_nothing_waits(device: Device) -> None:
    queue = DeviceQueue([device], batch_limit=1, timeout=60)
    done: list[str] = []
    running, waiting = (queue.submit(number, "a", 1) for number in (1, 2))
    wait_until(lambda: queue.running == 1)

    def steps(name: str) -> Iterator[None]:
        for number in (1, 2):
            done.append(f"{name} {number}")
            yield

    for name in ("first", "second"):
        queue.when_idle(0, steps(name))
    device.go.release(1)
    running.result(10)
    wait_until(lambda: len(device.batches) == 2)
    assert done == []
    device.go.release(1)
    waiting.result(10)
    wait_until(lambda: done == ["first 1", "first 2", "second 1", "second 2"])
    device.go.release(1)
    assert queue.submit(3, "a", 1).result(10) == 6


def test_a_job_stops_the_pass_of_an_idle_task(device: Device) -> None:
    queue = DeviceQueue([device], batch_limit=1, timeout=60)
    done: list[str] = []

    def steps() -> Iterator[None]:
        try:
            done.append("begun")
            wait_until(check_wanted)  # a pass that goes on until it is stopped
        except PassStopped:
            done.append("stopped")
        yield
        done.append("again")

    queue.when_idle(0, steps())
    wait_until(lambda: done == ["begun"])
    device.go.release(1)
    assert queue.submit(3, "a", 1).result(10) == 6
    wait_until(lambda: done == ["begun", "stopped", "again"])


def test_an_idle_task_ends_with_its_device(device: Device) -> None:
    queue = DeviceQueue([device], batch_limit=1, timeout=60)

    def fail() -> Iterator[None]:
        yield
        raise SystemError("the driver is gone")

    def wait() -> Iterator[None]:
        yield

    for end in [queue.when_idle(0, steps) for steps in (wait(), fail(), wait())]:
        assert end.result(10) is None
    wait_until(lambda: queue.problem == "device 0 is lost")
    assert queue.when_idle(0, wait()).result(10) is None
