"""Tests of admission: bytes in flight, slots and deadlines, without HTTP and without a model."""

import asyncio

import pytest

from handlers.serving.admission import Admission
from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits


def test_a_request_over_the_limit_is_413_or_503_and_adds_no_bytes() -> None:
    admission = Admission(Limits(max_in_flight_mb=1))
    first, second = admission.reservation(), admission.reservation()
    with second:
        with first:
            first.reserve(600_000)
            for reservation, status in ((first, 413), (second, 503)):
                with pytest.raises(RequestError) as refused:
                    reservation.reserve(500_000)
                assert refused.value.status == status
            assert admission.bytes_in_flight == 600_000
        second.reserve(500_000)
        assert admission.bytes_in_flight == 500_000
    assert admission.bytes_in_flight == 0


def test_a_thread_keeps_its_bytes_past_the_deadline_until_it_ends() -> None:
    admission = Admission(Limits())
    reservation = admission.reservation()
    with reservation:  # the thread
        with reservation:  # the request
            reservation.reserve(1000)
        reservation.reserve(2000)
        assert admission.bytes_in_flight == 3000
    assert admission.bytes_in_flight == 0


def test_slots_are_released_and_the_queue_timeout_refuses_requests() -> None:
    async def run() -> None:
        admission = Admission(Limits(max_queue=1, queue_timeout=0.01), devices=1)
        async with admission.slot(), admission.slot():
            with pytest.raises(RequestError, match=r"no slot was free within .* 1 requests wait already") as refused:
                async with admission.slot():
                    pass
            assert refused.value.status == 503
        async with admission.slot(), admission.slot():
            pass

    asyncio.run(run())


def test_a_stopping_service_ends_all_deadlines() -> None:
    async def run() -> list[str]:
        admission, ended = Admission(Limits(timeout=300)), []

        async def wait(name: str) -> None:
            try:
                with admission.deadline():
                    await asyncio.sleep(300)
            except TimeoutError:
                ended.append(name)

        waiting = [asyncio.create_task(wait(name)) for name in "ab"]
        await asyncio.sleep(0)
        admission.expire()
        await asyncio.gather(*waiting)
        return ended

    assert sorted(asyncio.run(run())) == ["a", "b"]
