"""Jobs are done side by side and take their turns in order, whatever takes how long and goes wrong."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.weights.turns import Job, Rest, Turn, in_turns


@given(count=st.integers(0, 60), threads=st.integers(1, 5), seed=st.integers(0, 99))
def test_turns_are_taken_one_at_a_time_in_order(count: int, threads: int, seed: int) -> None:
    draw, taken, busy = random.Random(seed), [], threading.Lock()
    spins = [draw.choice([0, 1, 3000]) for _ in range(count)]

    def job(number: int) -> Job:
        def take() -> None:
            assert busy.acquire(blocking=False)
            taken.append(number)
            busy.release()

        def make() -> Turn:
            sum(range(spins[number]))
            return take

        return make

    in_turns(map(job, range(count)), threads)
    assert taken == list(range(count))


def test_what_was_made_early_waits_for_its_turn() -> None:
    second_is_made, taken = threading.Event(), []

    def slow() -> Turn:
        assert second_is_made.wait(60)
        time.sleep(0.1)
        return lambda: taken.append("first")

    def quick() -> Turn:
        second_is_made.set()
        return lambda: taken.append("second")

    in_turns([slow, quick], 2)
    assert taken == ["first", "second"]


def nothing() -> None:
    """A turn in which nothing is to be done."""


def test_jobs_are_done_side_by_side() -> None:
    """Each waits for the other to have begun."""
    together = threading.Barrier(2, timeout=60)

    def job() -> Turn:
        together.wait()
        return nothing

    in_turns([job] * 6, 2)


def test_what_a_turn_leaves_to_do_is_done_side_by_side_after_it() -> None:
    """Each waits for the other, of which one has its turn later."""
    together, done = threading.Barrier(2, timeout=60), []

    def job(number: int) -> Job:
        def rest() -> None:
            together.wait()
            done.append(number)

        return lambda: lambda: rest

    in_turns(map(job, range(6)), 2)
    assert sorted(done) == list(range(6))


def failing(number: int, bad: int) -> int:
    if number >= bad:
        raise ValueError(str(number))
    return number


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_after_a_turn_is_raised(threads: int) -> None:
    def job(number: int) -> Job:
        def rest() -> None:
            if number == 7:
                failing(number, 7)

        return lambda: lambda: rest

    with pytest.raises(ValueError, match="^7$"):
        in_turns(map(job, range(20)), threads)


@pytest.mark.parametrize("where", ["jobs", "job", "turn"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [0, 5, 39])
def test_the_first_error_in_order_is_raised_and_no_turn_after_it_is_taken(where: str, threads: int, bad: int) -> None:
    taken: list[int] = []

    def job(number: int) -> Job:
        def take() -> None:
            taken.append(failing(number, bad) if where == "turn" else number)

        def make() -> Turn:
            failing(number, bad if where == "job" else 40)
            return take

        return make

    def jobs() -> Iterator[Job]:
        for number in range(40):
            yield job(failing(number, bad) if where == "jobs" else number)

    with pytest.raises(ValueError, match=f"^{bad}$"):
        in_turns(jobs(), threads)
    assert taken == list(range(bad))


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_is_asked_for_than_threads_work_on(threads: int) -> None:
    asked, done = [], []

    def job(number: int) -> Turn:
        assert len(asked) <= len(done) + threads

        def rest() -> None:
            done.append(number)

        return lambda: rest

    def jobs() -> Iterator[Job]:
        for number in range(30):
            asked.append(number)
            yield lambda number=number: job(number)

    in_turns(jobs(), threads)
    assert len(done) == 30


@pytest.mark.parametrize("threads", [1, 3])
def test_a_signal_ends_the_work_before_it_is_raised(threads: int) -> None:
    """No thread works on after it, and what was made then takes no turn."""
    taken: list[int] = []
    working = threading.active_count()

    def job(number: int) -> Turn:
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)  # which the main thread hears
        if number >= 5:
            time.sleep(0.2)
        return lambda: taken.append(number)

    def jobs() -> Iterator[Job]:
        number = 0
        while True:
            yield lambda number=number: job(number)
            number += 1

    with pytest.raises(KeyboardInterrupt):
        in_turns(jobs(), threads)
    assert threading.active_count() == working
    assert taken == list(range(5))


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_done_is_let_go(threads: int) -> None:
    """Memory of one job can be used for the next one of the same thread."""
    alive = 0

    class Made:
        def __init__(self) -> None:
            nonlocal alive
            alive += 1
            assert alive <= threads

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

        def rest(self) -> None:
            """Writes it."""

        def take(self) -> Rest:
            return self.rest

    in_turns((lambda: Made().take for _ in range(50)), threads)
    assert alive == 0
