"""`nestling rank` from the command line: what it records, how it is stopped and goes on, what it refuses."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import stock
from nestling import cli
from nestling.tokenizer import character_tokenizer, save_tokenizer
from nestling.train.calibration import Texts
from nestling.train.depth import planned

Rank = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    stock.save(stock.TINY, tmp_path / "model")
    save_tokenizer(character_tokenizer(), tmp_path / "model")
    rows = [{"text": f"{n}+{n}={2 * n}"} for n in range(100, 140)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "model"


@pytest.fixture
def rank(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Rank:
    """Runs `nestling rank` on the model in this process; (exit code, standard output, standard error)."""

    def run(*options: object, data: str = "texts.jsonl", out: str = "ranked") -> tuple[int, str, str]:
        capsys.readouterr()
        home = model.parent
        command = ["nestling", "rank", model, "--data", home / data, "--out", home / out, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return run


def arrays(directory: Path) -> dict[str, Any]:
    with safe_open(directory / "ranking.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def test_the_record_says_what_was_ranked_on_what_and_how(rank: Rank, model: Path) -> None:
    home = model.parent
    shutil.copy(home / "texts.jsonl", home / "b.jsonl")
    code, out, err = rank("--data", f"{home / 'b.jsonl'}=0.5", "--samples", 30, "--metric", "ffn=pre", "--length", 6)
    assert (code, out) == (0, f"{home / 'ranked'}: ranked, the same function as {model}\n")
    assert "layer passes in all" in err
    made = json.loads((home / "ranked" / "nestling.json").read_text())["provenance"]
    digest = hashlib.sha256((home / "texts.jsonl").read_bytes()).hexdigest()
    assert made["data"] == [
        {"file": str(home / "texts.jsonl"), "weight": 1.0, "samples": 20, "sha256": digest},
        {"file": str(home / "b.jsonl"), "weight": 0.5, "samples": 10, "sha256": digest},
    ]
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert made["source"]["model.safetensors"] == weights
    assert set(made["source"]) == {"config.json", "model.safetensors"}
    assert (made["samples"], made["tokens"], made["length"], made["batch"]) == (30, 180, 6, 8)
    assert made["metrics"]["ffn"] == "pre"
    assert list(made["metrics"]) == ["hidden", "ffn", "mamba_heads", "mamba_channels", "attention_heads"]
    assert made["depth"] == {"method": "iterative", "rounds": 1}
    assert made["seed"] == 0
    assert made["seconds"] >= 0
    found = arrays(home / "ranked")
    assert {"rounds", "order.layers", "score.layers", "stability.layers", "stability.d"} <= found.keys()
    assert found["rounds"].shape == (1, 3)


def test_depth_methods_and_how_many_layers_go(rank: Rank, model: Path) -> None:
    assert rank("--max-drop", 2, out="a")[0] == 0
    assert np.isnan(arrays(model.parent / "a")["rounds"]).sum(1).tolist() == [0, 1]
    code, _, err = rank("--depth", "one-shot", out="b")
    assert code == 0
    assert f"{5 * planned(3, 1)} layer passes in all" in err
    assert rank("--depth", "cosine", out="c")[0] == 0
    made = json.loads((model.parent / "c" / "nestling.json").read_text())["provenance"]
    assert made["depth"] == {"method": "cosine"}


def test_stopped_and_run_again_it_writes_the_same_bytes(
    rank: Rank, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = model.parent
    assert rank("--batch", 2, out="undisturbed")[0] == 0
    whole = Texts.__iter__

    def interrupted(self: Texts) -> Iterator[Any]:
        for index, batch in enumerate(whole(self)):
            if index == 13:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Texts, "__iter__", interrupted)
    code, out, err = rank("--batch", 2)
    assert (code, out) == (130, "")
    assert "the same command goes on where its sums were last saved\nnestling: stopped\n" in err
    names = {path.name for path in home.iterdir()}
    assert names == {"model", "texts.jsonl", "undisturbed", ".ranked.rank-state"}
    monkeypatch.setattr(Texts, "__iter__", whole)
    code, _, err = rank("--batch", 2)
    assert code == 0
    assert "going on where it was stopped (8 batches are saved)" in err
    for name in ("ranking.safetensors", "model.safetensors"):
        assert (home / "ranked" / name).read_bytes() == (home / "undisturbed" / name).read_bytes()
    assert not (home / ".ranked.rank-state").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metric", "ffn"], "--metric ffn: write AXIS=METRIC"),
        (["--metric", "ffn=pots"], "unknown metric 'pots' of axis ffn; did you mean 'post'?"),
        (["--metric", "fnn=post"], "unknown axis 'fnn'; did you mean 'ffn'?"),
        (["--metric", "n_groups=sum"], "axis 'n_groups' is fixed and cannot be ranked"),
        (["--depth", "deep"], "unknown depth method 'deep'"),
        (["--max-drop", "3"], "max_drop = 3 is outside 1 … 2"),
        (["--samples", "41"], "only 40 samples of at least two tokens, 41 were asked for"),
        (["--data", "none.jsonl"], "none.jsonl: cannot be read: No such file"),
        (["--data", "x=0"], "the weight '0' must be a number above 0"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(rank: Rank, model: Path, options: list[str], words: str) -> None:
    before = sorted(path.name for path in model.parent.iterdir())
    code, out, err = rank(*options)
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("nestling: ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in model.parent.iterdir()) == before


def test_a_mixture_of_experts_is_ranked_and_stays_the_same_function(rank: Rank, model: Path) -> None:
    shutil.rmtree(model)
    mixture = replace(stock.TINY, hybrid_override_pattern="ME*E", moe_intermediate_size=8, n_routed_experts=4)
    stock.save(replace(mixture, moe_shared_expert_intermediate_size=6), model)
    save_tokenizer(character_tokenizer(), model)
    code, _, err = rank("--metric", "expert_ffn=post", "--metric", "experts=magnitude")
    assert code == 0, err
    made = json.loads((model.parent / "ranked" / "nestling.json").read_text())["provenance"]["metrics"]
    assert (made["experts"], made["expert_ffn"]) == ("magnitude", "post")
    found = arrays(model.parent / "ranked")
    assert found["order.e.1"].shape == (4,)
    assert found["order.m.3"].shape == (4, 8)
    assert found["order.s.3"].shape == (6,)
    ids, both = stock.tokens(16), (stock.load(directory) for directory in (model, model.parent / "ranked"))
    parent, ranked = (stock.logits(stock.float64(each), ids) for each in both)
    stock.assert_same(ranked, parent)


def test_a_model_with_nans_names_the_tensor(rank: Rank, model: Path) -> None:
    broken = stock.tensors(model)
    broken["backbone.layers.1.mixer.v_proj.weight"][0] = float("nan")
    stock.write(model, json.loads((model / "config.json").read_text()), broken)
    code, _, err = rank()
    assert code == 2
    assert err.splitlines()[-1].startswith("nestling: the input of backbone.layers.1.mixer.o_proj is not finite on the")
    assert not (model.parent / "ranked").exists()
