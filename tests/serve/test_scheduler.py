"""The scheduler: batched is alone, whoever comes when; nobody waits for a long prompt; what is let go of is free."""

import pytest
import torch
from family_of_three import COUNT, LENGTHS, PROMPTS, SIZES, finish, request, stocks, views
from hypothesis import given
from hypothesis import strategies as st

from nestling.errors import NestlingError
from nestling.infer.sampling import Row
from nestling.serve.room import Room
from nestling.serve.scheduler import Request, Scheduler

PLENTY = 10**8

arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # step
        st.sampled_from(sorted(SIZES)),
        st.integers(0, len(LENGTHS) - 1),
        st.integers(1, COUNT),
        st.sampled_from([0.0, 1.0]),
        st.sampled_from("ab"),
        st.sampled_from([None, None, 0, 3]),  # cancelled so many steps after it came
    ),
    min_size=1,
    max_size=9,
)


def alone(size: str, prompt: int, limit: int, temperature: float) -> list[int]:
    if not temperature:
        return stocks(size, prompt)[:limit]
    one, scheduler = request(size, prompt, limit, temperature), Scheduler(cache_bytes=PLENTY)
    scheduler.submit(one)
    finish(scheduler)
    return one.row.tokens


@given(arrivals, st.integers(3, 50), st.sampled_from([60_000, PLENTY]), st.integers(1, 9))
def test_in_any_company_a_request_gets_what_it_gets_alone(
    planned: list[tuple], chunk: int, cache_bytes: int, rows: int
) -> None:
    scheduler = Scheduler(cache_bytes=cache_bytes, chunk=chunk, rows=rows)
    requests = [request(size, prompt, limit, heat, who) for _, size, prompt, limit, heat, who, _ in planned]
    heard: dict[Request, list[int]] = {one: [] for one in requests}
    for now in range(1000):
        for (came, *_, leaves), one in zip(planned, requests, strict=True):
            if came == now:
                scheduler.submit(one)
            if leaves is not None and came + leaves == now:
                scheduler.cancel(one)
        for said in scheduler.step():
            heard[said.request].append(said.token)
        assert scheduler.held_bytes <= scheduler.room.needed(scheduler.active) <= cache_bytes
        assert len(scheduler.active) <= rows
        if now > 15 and scheduler.idle:
            break
    assert scheduler.idle
    assert scheduler.held_bytes == 0
    for (_, size, prompt, limit, heat, *_), one in zip(planned, requests, strict=True):
        wanted = alone(size, prompt, limit, heat)
        assert heard[one] == one.row.tokens == wanted[: len(one.row.tokens)]
        assert one.row.reason == "cancelled" or len(one.row.tokens) == limit


def test_everyone_gets_a_token_per_step_while_a_long_prompt_is_read() -> None:
    scheduler = Scheduler(cache_bytes=PLENTY, chunk=64)
    others = [request(size, 2, 200) for size in SIZES]
    for other in others:
        scheduler.submit(other)
    for _ in range(4):
        scheduler.step()
    assert all(len(other.row.tokens) > 1 for other in others)
    long = Request(views()["large"], Row([3, 5, 7, 9] * 512, 2))
    scheduler.submit(long)
    steps = 0
    while not long.row.tokens:
        heard = [said.request for said in scheduler.step()]
        assert all(heard.count(other) == 1 for other in others)
        steps += 1
    assert steps == 2048 // 64
    short = request("large", 3)
    for _ in range(3):
        scheduler.submit(Request(views()["large"], Row([3] * 2048, 2)))
    scheduler.submit(short)
    assert next(step for step in range(1, 9) if any(said.request is short for said in scheduler.step())) <= 4


def test_requests_of_one_size_share_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(cache_bytes=PLENTY)
    for prompt in (1, 2, 3, 1, 2):
        scheduler.submit(request("small", prompt))
    scheduler.submit(request("large", 1))
    rows: list[int] = []
    hook = views()["large"].model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        for _ in range(4):
            scheduler.step()
    finally:
        hook.remove()
    assert rows == [5, 5, 1, 5, 1, 5, 1, 5, 1]  # read small, go on; read large, go on with both; …


def test_prompts_side_by_side_are_no_more_than_a_chunk() -> None:
    scheduler = Scheduler(cache_bytes=PLENTY, chunk=20)
    for _ in range(6):
        scheduler.submit(request("small", 2))  # five tokens each
    begun = []
    for _ in range(2):
        scheduler.step()
        begun.append(sum(bool(one.row.tokens) for one in scheduler.active))
    assert begun == [4, 6]


def test_clients_take_turns() -> None:
    scheduler = Scheduler(cache_bytes=PLENTY, rows=1)
    many = [request("small", 0, 1, client="many") for _ in range(4)]
    few = request("small", 0, 1, client="few")
    for one in (*many, few):
        scheduler.submit(one)
    order = [said.request for _ in range(5) for said in scheduler.step()]
    assert order == [many[0], few, *many[1:]]


def test_what_can_never_fit_is_refused_and_what_fits_later_waits() -> None:
    one = request("large", 5)
    need = Room(0).needed([one])
    with pytest.raises(NestlingError, match="36 tokens .* need .* of cache, and there are"):
        Scheduler(cache_bytes=need - 1).submit(one)
    scheduler = Scheduler(cache_bytes=need)
    scheduler.submit(one)
    second = request("large", 5)
    scheduler.submit(second)
    small = request("small", 0)
    scheduler.submit(small)  # fits no sooner than the one before it: nobody is starved
    scheduler.step()
    assert (scheduler.active, scheduler.queued) == ([one], 2)
    finish(scheduler)
    assert second.row.tokens == one.row.tokens == stocks("large", 5)


def test_the_cancelled_are_free_within_a_step() -> None:
    scheduler = Scheduler(cache_bytes=PLENTY, chunk=8)
    waiting, reading, going = request("small", 1), request("large", 6), request("large", 1)
    scheduler.submit(going)
    scheduler.submit(reading)
    scheduler.step()
    scheduler.step()
    assert {reading, going} == set(scheduler.active)
    scheduler.submit(waiting)
    for one in (waiting, reading, going):
        scheduler.cancel(one)
    assert scheduler.step() == []
    assert scheduler.idle
    assert scheduler.held_bytes == 0
    assert waiting.row.tokens == []


def test_an_end_token_ends_and_is_not_heard() -> None:
    free = stocks("middle", 3)
    one = request("middle", 3)
    one.row.ends = frozenset([free[4]])
    scheduler = Scheduler(cache_bytes=PLENTY)
    scheduler.submit(one)
    heard = []
    while not scheduler.idle:
        heard += [said.token for said in scheduler.step()]
    assert heard == [*free[: free.index(free[4])], None]
    assert one.row.reason == "stop"


def test_log_probabilities_are_stocks() -> None:
    one, other = request("middle", 3), request("middle", 2)
    one.top = 3
    scheduler = Scheduler(cache_bytes=PLENTY)
    scheduler.submit(other)
    scheduler.submit(one)
    heard = []
    while not scheduler.idle:
        heard += [said for said in scheduler.step() if said.request is one]
    text = torch.tensor([[*PROMPTS[3], *one.row.tokens]])
    wanted = views()["middle"](text).logits[0].log_softmax(-1)[len(PROMPTS[3]) - 1 :]
    for said, expected in zip(heard, wanted, strict=False):
        assert said.logprob == pytest.approx(float(expected[said.token]), abs=1e-3)  # the prompt's dt has a floor
        assert [token for token, _ in said.top] == expected.topk(3).indices.tolist()
        assert said.top[0][1] == pytest.approx(float(expected.max()), abs=1e-3)
