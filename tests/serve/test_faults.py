"""Whatever clients do, the server stays up, says so in OpenAI's form, and nothing leaks."""

import asyncio
import contextlib
import hmac
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")


from served import Served, save_family, serving  # noqa: E402

from nestling.serve.http import _event  # noqa: E402
from nestling.serve.scheduler import Scheduler  # noqa: E402
from nestling.serve.server import Server  # noqa: E402

GIVEN = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "temperature": 0}

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("faults")
    save_family(made)
    return made


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Served]:
    with serving(directory, max_tokens=5000, prompt_tokens=2000, open=12, body_bytes=20_000) as running:
        yield running
        assert running.empties()


@pytest.fixture
def http(served: Served) -> Iterator[object]:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client
        assert served.empties()  # who hung up last may not have been let go of yet
        assert client.post("/v1/completions", json=GIVEN).json()["choices"][0]["text"] == served.text(None, "hello", 5)
        assert served.empties()


def error(answer: object, status: int) -> str:
    assert answer.status_code == status, answer.text
    told = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return told["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"model": 3}', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 9000]
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_is_not_a_request_is_refused(http, body: bytes, path: str) -> None:
    error(http.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"}), 400)


def test_a_body_that_is_not_json_is_told_where(http) -> None:
    answer = http.post("/v1/completions", content=b'{"model":', headers={"content-type": "application/json"})
    assert error(answer, 400) == "the body is not JSON: Expecting value at character 9"


@pytest.mark.parametrize(
    "key", ["prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logprobs"]
)
@pytest.mark.parametrize("value", [{}, [[]], "no", -5, [None], 1e400, {"a": [1]}])
def test_wrong_types_and_values_are_refused_or_understood(http, key: str, value: object) -> None:
    body = json.dumps(GIVEN | {key: value})
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        error(answer, 400)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_completion_tokens": 5001}, "max_completion_tokens = 5001 is more than"),
        ({"chat_template_kwargs": {"chat_template": "{% for i in range(9) %}x{% endfor %}"}}, "chat_template cannot"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, None),
    ],
)
def test_a_chat_that_asks_for_too_much_is_refused(http, more: dict[str, object], words: str | None) -> None:
    """Among them a template of the client's own, which is a program."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1} | more
    answer = http.post("/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    if words is None:
        assert answer.status_code == 200
    else:
        assert words in error(answer, 400)


def test_unknown_paths_and_methods(http) -> None:
    error(http.get("/v2"), 404)
    error(http.get("/v1/completions"), 405)
    error(http.get("/v1/models/tiny@%00"), 404)


def test_too_large_a_body_is_not_read(http, served: Served) -> None:
    error(http.post("/v1/completions", json=GIVEN | {"prompt": "x" * 20_001}), 413)

    def endless() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    error(http.post("/v1/completions", content=endless(), headers={"content-type": "application/json"}), 413)


def test_other_host_names_are_refused(http) -> None:
    error(http.get("/v1/models", headers={"host": "evil.example"}), 403)
    error(http.get("/v1/models", headers={"host": "5"}), 403)
    assert http.get("/v1/models", headers={"host": "localhost:9"}).status_code == 200


def test_a_full_house_says_come_again_and_those_inside_are_served(http, served: Served) -> None:
    long = GIVEN | {"max_tokens": 5000, "stream": True, "n": 12}
    with http.stream("POST", "/v1/completions", json=long) as stream:
        lines = stream.iter_lines()
        next(lines)
        refused = http.post("/v1/completions", json=GIVEN)
        assert "12 requests are in hand" in error(refused, 429)
        assert refused.headers["retry-after"] == "1"
        assert next(line for line in lines if line).startswith("data: ")


def test_a_burst_is_never_more_than_fits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at the same moment: what has been let in counts from then on, whether it has begun or not."""
    inside: list[int] = []
    check = served.service._asking

    def watched(*given: object) -> object:
        try:
            return check(*given)
        finally:
            inside.append(len(served.service.following))

    monkeypatch.setattr(served.service, "_asking", watched)

    async def burst() -> list[object]:
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            bodies = [GIVEN | {"max_tokens": 60, "stream": place % 2 == 0} for place in range(40)]
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    answers = asyncio.run(burst())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        error(answer, 429)
    assert max(inside) == 12
    assert served.empties()


def test_more_connections_than_can_be_answered_are_told_so_in_openais_form(directory: Path) -> None:
    """Among them those that send half a request and then nothing."""
    with (
        serving(directory, open=1) as served,
        httpx.Client(base_url=served.url) as http,
        contextlib.ExitStack() as held,
    ):
        for _ in range(4):
            raw = held.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            raw.sendall(f"{HEAD}100\r\n\r\nx".encode())
        for _ in range(100):
            answer = http.get("/v1/models")
            if answer.status_code != 200:
                break
        assert "4 requests are open" in error(answer, 503)
        assert answer.headers["retry-after"] == "1"
        held.close()
        for _ in range(100):
            if http.get("/v1/models").status_code == 200:
                break
        else:
            pytest.fail("those that have gone are still counted")


def test_who_hangs_up_is_free_and_the_others_go_on(http, served: Served) -> None:
    chance = random.Random(0)
    scheduler = served.service.engine.scheduler
    with http.stream("POST", "/v1/completions", json=GIVEN | {"max_tokens": 40, "stream": True}) as steady:
        lines = steady.iter_lines()
        for _ in range(6):
            given = GIVEN | {"max_tokens": 5000, "stream": chance.random() < 0.5, "model": "tiny@small"}
            body = json.dumps(given).encode()
            with socket.create_connection(("127.0.0.1", served.port)) as raw:
                head = f"{HEAD}{len(body)}\r\n\r\n"
                raw.sendall(head.encode() + body[: len(body) if chance.random() < 0.8 else 9])
                if chance.random() < 0.5:
                    raw.settimeout(0.2)
                    with contextlib.suppress(TimeoutError):
                        raw.recv(100)
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line[6:] not in ("", "[DONE]")]
    assert "".join(texts) == served.text(None, "hello", 40)
    assert served.empties()
    assert scheduler.queued == 0


@pytest.mark.parametrize("turns", range(6))
def test_who_hangs_up_as_a_token_comes_is_free(served: Served, turns: int) -> None:
    async def hang_up() -> None:
        queue: asyncio.Queue = asyncio.Queue()
        waiting = asyncio.ensure_future(served.service._next(queue, time.monotonic()))
        await asyncio.sleep(0.01)
        queue.put_nowait(object())
        for _ in range(turns):
            await asyncio.sleep(0)
        if waiting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(hang_up())


def test_a_slow_reader_holds_nobody_up(http, served: Served) -> None:
    with http.stream("POST", "/v1/completions", json=GIVEN | {"max_tokens": 3000, "stream": True}) as slow:
        assert http.post("/v1/completions", json=GIVEN).status_code == 200
        assert sum(line.startswith("data: ") for line in slow.iter_lines()) > 100


def test_a_step_that_fails_fails_those_in_hand_only(http, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from nestling.serve import scheduler

    def fails(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(scheduler, "start", fails)
        assert "the model failed" in error(http.post("/v1/completions", json=GIVEN), 500)


def test_a_request_that_takes_too_long_is_given_up(directory: Path) -> None:
    with (
        serving(directory, cache_bytes=2**24, seconds=0.05, max_tokens=30000) as served,
        httpx.Client(base_url=served.url) as http,
    ):
        long = GIVEN | {"max_tokens": 30000}
        assert "longer than the server's limit of 0.05 s" in error(http.post("/v1/completions", json=long), 503)
        lines = [line for line in http.post("/v1/completions", json=long | {"stream": True}).text.split("\n\n") if line]
        assert "error" in json.loads(lines[-2][6:])
        assert lines[-1] == "data: [DONE]"
        assert served.empties()


def test_a_key_is_needed_where_there_is_one(directory: Path) -> None:
    with serving(directory, api_key="sesame") as served, httpx.Client(base_url=served.url) as http:
        assert http.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer Sesame"}, {"authorization": "sesame"}):
            error(http.get("/v1/models", headers=headers), 401)
        for scheme in ("Bearer", "bearer"):
            assert http.get("/v1/models", headers={"authorization": f"{scheme} sesame"}).status_code == 200


def test_keys_are_compared_in_constant_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    with serving(directory, api_key="sesame") as served, httpx.Client(base_url=served.url) as http:
        for told in ("s", "sesam", "sesame"):
            http.get("/v1/models", headers={"authorization": f"Bearer {told}"})
    assert compared == [(told, b"sesame") for told in (b"s", b"sesam", b"sesame")]


def test_a_line_of_a_stream_is_one_line_to_every_client() -> None:
    """httpx and others split lines wherever Unicode does."""
    (line,) = _event({"text": "a\u2028b\u0085c"}).split("\n\n")[:1]
    assert line.splitlines() == [line]
    assert json.loads(line.removeprefix("data: ")) == {"text": "a\u2028b\u0085c"}


def test_the_lowest_temperature_there_is_fails_nobody(http) -> None:
    answer = http.post("/v1/completions", json=GIVEN | {"temperature": 5e-324, "seed": 1})
    assert answer.json()["choices"][0]["text"]


def test_metrics_look_at_the_scheduler_in_its_own_thread(http, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queues change under whoever looks from another."""
    looked = []
    held = Scheduler.held_bytes.fget
    monkeypatch.setattr(
        Scheduler, "held_bytes", property(lambda self: looked.append(threading.current_thread().name) or held(self))
    )
    http.post("/v1/completions", json=GIVEN)
    assert "nestling_cache_bytes 0.0" in http.get("/metrics").text
    assert set(looked) == {"nestling-engine"}
    monkeypatch.undo()


def test_metrics_can_be_read_by_prometheus(http) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    http.post("/v1/completions", json=GIVEN)
    found = {family.name for family in text_string_to_metric_families(http.get("/metrics").text)}
    wanted = {"requests", "prompt_tokens", "generated_tokens", "first_token_seconds", "cache_bytes", "active_sequences"}
    assert {f"nestling_{name}" for name in wanted} <= found


def test_whatever_a_schema_allows_is_answered_as_it_says(served: Served) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    schema = schemathesis.openapi.from_dict(served.app.openapi())
    operations = [operation.ok() for operation in schema.get_all_operations()]

    @settings(max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(data.draw(st.sampled_from(operations)).as_strategy())
        if isinstance(case.body, dict):
            case.body["model"] = data.draw(st.sampled_from([case.body.get("model"), "tiny@small"]))
            case.body["max_tokens"] = case.body["max_completion_tokens"] = data.draw(st.integers(1, 3))
        answer = case.call(base_url=served.url)
        assert answer.status_code < 500, (case.body, answer.text)

    check()
    assert served.empties()


def test_told_to_stop_under_load_it_finishes_what_runs_and_exits(directory: Path) -> None:
    command = [sys.executable, "-m", "nestling", "serve", str(directory), "--port", "0", "--name", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        url = said.split("/v1 ")[0]
        assert "tiny, tiny@large, tiny@middle, tiny@small" in said
        given = GIVEN | {"stream": True, "max_tokens": 200}
        with (
            httpx.Client(base_url=url, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=given) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def test_what_still_runs_when_its_time_is_up_is_told_and_cut_off(directory: Path) -> None:
    """Many streams that would go on for minutes, one of which nobody reads."""
    command = [
        sys.executable,
        "-m",
        "nestling",
        "serve",
        str(directory),
        "--port",
        "0",
        "--name",
        "tiny",
        "--grace",
        "1",
        "--max-tokens",
        "30000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split("/v1 ")[0]
        given = GIVEN | {"stream": True, "max_tokens": 30000, "prompt": "hello"}
        with contextlib.ExitStack() as streams, httpx.Client(base_url=url, timeout=60) as http:
            lines = [
                streams.enter_context(
                    http.stream("POST", "/v1/completions", json=given | {"model": f"tiny@{size}"})
                ).iter_lines()
                for size in ("middle", "small") * 6  # which say nothing that ends soon
            ]
            assert all(next(line).startswith("data: {") for line in lines)
            process.send_signal(signal.SIGTERM)
            for line in lines:
                *_, told, done = [said for said in line if said]
                assert json.loads(told.removeprefix("data: "))["error"]["message"].startswith("the server is stopping")
                assert done == "data: [DONE]"
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert err == "12 answers were not finished 1 s after the stop and are cut off\n"


def test_who_does_not_read_does_not_keep_the_server_from_stopping(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream whose buffers are full cannot be told; it is closed, and nothing odd is said."""
    served = Served(directory)
    server = Server(served.app, served.service, grace=0)
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    body = json.dumps(GIVEN | {"stream": True, "max_tokens": 200, "logprobs": 5, "n": 4, "temperature": 1})
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(listening.getsockname())
        client.sendall(f"{HEAD}{len(body)}\r\n\r\n{body}".encode())
        client.recv(100)
        for state in (False, True):  # at work, done
            while served.service.engine.scheduler.idle != state:
                time.sleep(0.001)
        assert served.service.following  # all is computed, and waits for the client
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    assert not served.service.following
    assert not [record for record in caplog.records if record.exc_info]
    assert "are cut off" in caplog.text
