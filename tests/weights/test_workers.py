"""Results are made side by side and used in order, whatever takes how long and goes wrong."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.weights.workers import Workers


@given(count=st.integers(0, 60), threads=st.integers(1, 5), seed=st.integers(0, 99))
def test_results_are_used_one_at_a_time_in_order(count: int, threads: int, seed: int) -> None:
    draw, used, busy = random.Random(seed), [], threading.Lock()
    spins = [draw.choice([0, 1, 3000]) for _ in range(count)]

    def make(number: int) -> int:
        sum(range(spins[number]))
        return number

    def use(number: int) -> None:
        assert busy.acquire(blocking=False)
        used.append(number)
        busy.release()

    with Workers(threads) as workers:
        for number in range(count):
            workers.submit(lambda number=number: make(number), use)
    assert used == list(range(count))


def test_what_was_made_early_waits_for_its_turn() -> None:
    second_is_made, used = threading.Event(), []

    def slow() -> str:
        assert second_is_made.wait(60)
        time.sleep(0.1)
        return "first"

    def quick() -> str:
        second_is_made.set()
        return "second"

    with Workers(2) as workers:
        workers.submit(slow, used.append)
        workers.submit(quick, used.append)
    assert used == ["first", "second"]


def test_results_are_made_side_by_side() -> None:
    """Each waits for the other to have begun."""
    together = threading.Barrier(2, timeout=60)
    with Workers(2) as workers:
        for _ in range(6):
            workers.submit(together.wait)


def test_what_a_turn_leaves_to_do_is_done_side_by_side_after_it() -> None:
    """Each waits for the other, of which one has its turn later."""
    together, done = threading.Barrier(2, timeout=60), []
    with Workers(2) as workers:
        for number in range(6):
            workers.submit(lambda: None, lambda made, number=number: lambda: done.append((together.wait(), number)))
    assert sorted(number for _, number in done) == list(range(6))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_after_a_turn_is_raised(threads: int) -> None:
    with pytest.raises(ValueError, match="^7$"), Workers(threads) as workers:  # noqa: PT012
        for number in range(20):
            workers.submit(lambda: None, lambda made, number=number: lambda: failing(number, 7) if number == 7 else 0)


@pytest.mark.parametrize("ahead", [2, 5])
def test_no_more_is_asked_for_than_may_wait(ahead: int) -> None:
    go, asked = threading.Event(), []

    def ask() -> None:
        with Workers(2, ahead) as workers:
            for number in range(20):
                workers.submit(lambda: go.wait(60))
                asked.append(number)

    asking = threading.Thread(target=ask)
    asking.start()
    while len(asked) < 2 * (1 + ahead):
        time.sleep(0.01)
    asking.join(0.1)
    assert len(asked) == 2 * (1 + ahead)
    go.set()
    asking.join()
    assert len(asked) == 20


def failing(number: int, bad: int) -> int:
    if number >= bad:
        raise ValueError(str(number))
    return number


@pytest.mark.parametrize("where", ["make", "use"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [0, 5, 39])
def test_the_first_error_in_order_is_raised_and_nothing_after_it_is_used(where: str, threads: int, bad: int) -> None:
    used: list[int] = []

    def use(number: int) -> None:
        used.append(failing(number, bad) if where == "use" else number)

    def asked(number: int) -> Callable[[], int]:
        return lambda: failing(number, bad) if where == "make" else number

    def ask() -> None:
        with Workers(threads) as workers:
            for number in range(40):
                workers.submit(asked(number), use)

    with pytest.raises(ValueError, match=f"^{bad}$"):
        ask()
    assert used == list(range(bad))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_whoever_asks_is_his_and_what_waits_is_dropped(threads: int) -> None:
    made: list[Any] = []
    go = threading.Event()

    def make() -> None:
        made.append(go.wait(60))

    def ask() -> None:
        with Workers(threads, ahead=2) as workers:
            for _ in range(threads * 3):
                workers.submit(make)
            threading.Timer(0.2, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask()
    assert len(made) <= threads
