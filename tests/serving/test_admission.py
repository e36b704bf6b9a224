"""The bytes in flight of requests, and of threads that a deadline left behind."""

import pytest

from handlers.serving.admission import BytesInFlight
from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits

LIMITS = Limits(max_held_mb=1)


def test_too_much_alone_is_413_and_beside_others_503_and_neither_is_counted() -> None:
    in_flight = BytesInFlight()
    first, second = in_flight.reservation(LIMITS), in_flight.reservation(LIMITS)
    first.hold(600_000)
    for reservation, status in ((first, 413), (second, 503)):
        with pytest.raises(RequestError) as refused:
            reservation.hold(500_000)
        assert refused.value.status == status
    assert in_flight.total == 600_000
    first.release()
    second.hold(500_000)
    assert in_flight.total == 500_000


def test_a_thread_that_is_left_behind_keeps_what_it_made_until_it_ends() -> None:
    in_flight = BytesInFlight()
    reservation = in_flight.reservation(LIMITS)
    reservation.hold(1000)
    with reservation.reading():
        reservation.hold(5000)
        reservation.release()
        assert in_flight.total == 5000
        reservation.hold(2000)
        assert in_flight.total == 7000
    assert in_flight.total == 0


def test_a_thread_that_ends_in_time_leaves_all_to_the_exchange() -> None:
    in_flight = BytesInFlight()
    reservation = in_flight.reservation(LIMITS)
    reservation.hold(1000)
    with reservation.reading():
        reservation.hold(5000)
    assert in_flight.total == 6000
    reservation.release()
    assert in_flight.total == 0
