"""nestling bench in its quick form: every row runs, results agree with float64, and the files hold what was printed.

Times are not looked at: they are of tiny work.
"""

import copy
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

from nestling.bench import agree, curve, loss  # noqa: E402
from nestling.bench import slice as slice_  # noqa: E402
from nestling.bench.figure import Figure  # noqa: E402
from nestling.bench.page import curves  # noqa: E402
from nestling.bench.table import ROWS  # noqa: E402
from nestling.bench.turns import Bench, Times  # noqa: E402
from nestling.cli import app  # noqa: E402
from nestling.errors import NestlingError  # noqa: E402
from test_cli import Nestling, run  # noqa: E402, F401 - a fixture

TIMED = [name for name in ROWS if name not in ("step", "vllm")]  # compiled forms take long; vLLM: its own test


@pytest.mark.filterwarnings("ignore")
def test_the_quick_table_runs_agrees_and_is_written(tmp_path: Path) -> None:
    files = {"--json": tmp_path / "speed.json", "--save": tmp_path / "speed.md"}
    arguments = [str(one) for pair in files.items() for one in pair]
    found = CliRunner().invoke(app, ["bench", "--quick", *TIMED, *arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    written = json.loads(files["--json"].read_text())
    assert {figure["row"] for figure in written["figures"]} >= {"scan", "loss", "view", "prefill", "decode", "startup"}
    for figure in written["figures"]:
        assert figure["reached"] is None  # tiny work reaches nothing
        assert 0 < figure["min"] <= figure["median"] <= figure["max"] or figure["row"] == "curve"
        assert figure["error"] is None or figure["error"] < (5e-2 if "bf16" in figure["case"] else 1e-4)
    assert {"date", "commit", "machine", "threads", "python", "torch", "transformers", "limits"} <= set(written)
    printed = [line for line in found.output.splitlines() if line.startswith("| ")]
    assert set(printed) <= set(files["--save"].read_text().splitlines())
    assert len(printed) == len(written["figures"]) + 1


@pytest.mark.filterwarnings("ignore")
def test_a_step_is_stocks(tmp_path: Path) -> None:
    from nestling.bench.models import random_model, stock, tokens
    from nestling.bench.step import QUICK, gradients

    ((architecture, batch, length),) = QUICK.values()
    model = random_model(architecture)
    rival, ids = stock(model).train(), tokens(architecture, batch, length, "cpu")
    exact = gradients(copy.deepcopy(rival).double(), ids)()

    def check() -> float:
        runs = {"ours": gradients(model, ids), "transformers": gradients(rival, ids)}
        return agree.agree("step, tiny", runs, exact, 1e-4)

    assert check() < 1e-4
    with torch.no_grad():
        model.on_disk()["backbone.layers.0.mixer.A_log"] += 0.1
    with pytest.raises(NestlingError, match="step, tiny: ours differs from the reference"):
        check()


def test_what_an_operation_leaves_unfilled_is_seen() -> None:
    with pytest.raises(NestlingError, match="ours differs .* by nan"):
        agree.agree("hole", {"ours": lambda: [torch.empty(3)]}, [torch.zeros(3)], 1e-4)


def test_peak_memory_of_a_device_is_what_it_says_beyond_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    device = SimpleNamespace(
        memory_allocated=lambda: 40,
        max_memory_allocated=lambda: 140 if said == ["reset", "run"] else 0,
        reset_peak_memory_stats=lambda: said.append("reset"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda name: {"cuda": device}[name])
    assert loss.peak("cuda", lambda: said.append("run")) == 100


def test_a_device_is_waited_for_before_and_after_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    device = SimpleNamespace(synchronize=lambda: said.append("wait"))
    monkeypatch.setattr(torch, "get_device_module", lambda name: {"cuda": device}[name])
    Bench("cuda", rounds=1).in_turn({"a": lambda: said.append("run")})
    assert said == ["run", "wait", "run", "wait"]
    assert (Bench("cuda").dtype, Bench().dtype) == (torch.bfloat16, torch.float32)


def test_peak_memory_is_what_was_held_at_once() -> None:
    def held() -> None:
        one = torch.ones(1000)
        two = torch.ones(500)
        del one
        three = torch.ones(400)
        del two, three

    assert loss.peak("cpu", held) == 6000


def test_a_round_is_compared_with_itself_and_targets_know_their_direction() -> None:
    calls: list[str] = []
    times = Bench(rounds=3).in_turn({name: lambda name=name: calls.append(name) for name in "ab"})
    assert "".join(calls) == "ab" + "abbaab"
    assert len(times.ratio("a", "b")) == 3
    fast = Figure("x", "", "", "× as fast", (1.0, 2.0, 4.0), reach=2.0)
    slow = Figure("x", "", "", "× the time", (1.0, 2.0, 4.0), reach=1.5)
    assert (fast.spread, fast.reached, slow.reached) == ((1.0, 2.0, 4.0), True, False)


def test_what_cannot_be_measured_is_said(run: Nestling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    run("bench", "stpe", "--quick").refused("no row; did you mean 'step'")
    run("bench", "loss", "--quick", "--json", tmp_path / "none" / "x.json").refused("there is no directory")
    run("bench", "loss", "--out", "x.json").refused("--json FILE and --save FILE")
    run("bench", "loss", "--quick", "--device", "gpu").refused("(allowed: cpu, cuda)")
    run("bench", "--latency", "--out", "x.json").refused("takes one preset")
    if not torch.cuda.is_available():
        run("bench", "loss", "--quick", "--device", "cuda").refused("finds no GPU here; leave --device out")
    monkeypatch.setattr("nestling.bench.table.find_spec", lambda name: None)
    run("bench", "scan", "--quick").refused("pip install 'nestling[hf]'")


def test_memory_is_the_commands_own_and_a_failure_has_its_words() -> None:
    """This process holds more; a child that it starts directly would be counted as large."""
    _, resident = slice_.timed([sys.executable, "-I", "-c", "held = b'x' * (64 << 20)"])
    assert 0.0625 < resident < 0.15 < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with pytest.raises(NestlingError, match="failed: .*no such thing"):
        slice_.timed([sys.executable, "-c", "import sys; sys.exit('no such thing')"])


SPOILED = """
import pathlib, subprocess, sys
subprocess.run(sys.argv[2:], check=True)
(file,) = pathlib.Path(sys.argv[1]).rglob("model.safetensors")
data = file.read_bytes()
file.write_bytes(data[: len(data) // 2] + bytes(byte ^ 1 for byte in data[len(data) // 2 :]))
"""


def test_a_cut_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = slice_.slicing

    def spoiled(work: Path, words: Sequence[str]) -> list[object]:
        return [sys.executable, "-c", SPOILED, work / "out", *right(work, words)]

    monkeypatch.setattr(slice_, "slicing", spoiled)
    with pytest.raises(NestlingError, match="is no prefix of what it was cut from; nothing was timed"):
        list(slice_.figures(Bench(rounds=1, quick=True)))


def test_an_exponent_is_of_time_against_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    works = {size: curve.Work(lambda: None, float(size) ** 2) for size in (1, 2, 4, 8)}
    taken = Times(({str(size): 5.0 * size**3 for size in works},))
    monkeypatch.setattr(Bench, "in_turn", lambda *_, **__: taken)
    figure = curve._figure(Bench(), "cubes for squares", "their size", works)
    assert figure.median == pytest.approx(1.5)
    assert figure.reached is False
    assert "8: 2.56e+03 s" in curves([figure])
    assert figure.points[-1] == (8.0, 2560.0, 64.0)
