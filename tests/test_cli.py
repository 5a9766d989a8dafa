"""The command line: every verb's help, figures as JSON, and bad input of every kind as one line and exit code 2."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import nestling
import stock
from nestling import cli
from nestling.arch.cost import cost, parameters
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import Submodel
from nestling.tokenizer import character_tokenizer, save_tokenizer
from nestling.weights.elastic import open_elastic, sidecar
from nestling.weights.files import write_json

TINY = replace(stock.TINY, hybrid_override_pattern="M*-M-")
HALF = Submodel(layers=(0, 1, 2, 4), hidden_size=10, intermediate_size=16, mamba_num_heads=2)
PROJECT = (Path(__file__).parent.parent / "pyproject.toml").read_text()
VERBS = ["plan", "data", "pretrain", "rank", "train", "slice", "bench", "verify"]
VERBS += ["eval", "generate", "serve", "report", "run"]
FIGURES = [
    "parameters",
    "active_parameters",
    "bytes",
    "kv_bytes_per_token",
    "ssm_bytes_per_sequence",
    "flops_per_token",
]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def refused(self, *words: object) -> None:
        """Exit code 2, nothing on standard output, one line on standard error that has these words."""
        assert self.code == 2, self
        assert self.out == "", self
        assert re.fullmatch(r"nestling: [^\n]+\n", self.err), self.err
        assert "Traceback" not in self.err
        for word in words:
            assert str(word) in self.err, f"{word!r} is not in {self.err!r}"


Nestling = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Nestling]:
    """Runs the command line in this process, in a directory where nothing can be hurt."""
    handler = signal.getsignal(signal.SIGTERM)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["nestling", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(ended.value.code, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_what_cannot_be_printed_is_one_line() -> None:
    for command in (["plan", "nemotron-nano-12b-v2", "--json"], ["--help"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "nestling", *command], stdout=full, stderr=subprocess.PIPE)
        said = "nestling: what is printed cannot be written: No space left on device"
        assert (done.returncode, done.stderr.decode().splitlines()) == (2, [said])


def test_a_terminal_without_a_character_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = process("-m", "nestling", "plan", "nemotron-nano-12b-v2")
    assert (done.code, done.err) == (0, "")
    assert "Mamba heads ? dim" in done.out


def process(*command: object, **options: Any) -> Done:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, **options
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`elastic`, a checkpoint with two budgets and a tokenizer; `texts.jsonl`; never written to."""
    directory = tmp_path_factory.mktemp("home")
    elastic = directory / "elastic"
    stock.save(TINY, elastic)
    save_tokenizer(character_tokenizer(), elastic)
    budgets = {"100%": Submodel(), "50%": open_elastic(elastic).submodel(HALF)}
    write_json(elastic / "nestling.json", sidecar(TINY, budgets, {}))
    (directory / "texts.jsonl").write_text('{"text": "1+2=3"}\n{"text": "10-5=5"}\n')
    return directory


@pytest.fixture
def elastic(home: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be broken."""
    return shutil.copytree(home / "elastic", tmp_path / "elastic")


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def spelled(tmp_path: Path, value: Any) -> Path:
    file = tmp_path / "size.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


# ---- help


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_says_what_it_reads_and_writes_and_shows_an_example(run: Nestling, verb: str) -> None:
    done = run(verb, "--help")
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    about = text.split("Options:")[0]
    assert re.search(r"Reads? ", about), about
    assert re.search(r"[Ww]rites? |Prints? ", about), about
    assert f"Example: nestling {verb} " in about
    assert "  --help" in done.out


def test_every_verb_is_listed_and_the_examples_are_commands(run: Nestling) -> None:
    done = run("--help")
    assert done.code == 0
    listed = re.findall(r"^  ([a-z]+)  ", done.out.split("Commands:")[1], re.M)
    assert sorted(listed) == sorted(VERBS)
    for verb in listed:
        text = " ".join(run(verb, "--help").out.split())
        options = re.findall(
            r"--[a-z-]+", re.search(rf"Example: (nestling {verb} .*?) (?:Arguments|Options):", text)[1]
        )
        assert all(re.search(f"{option}[ ,]", text.split("Options:")[1]) for option in options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["slicee"], "Did you mean 'slice'?"),
        (["slice"], "directory"),
        (["slice", "x", "--bogus", "1"], "--bogus"),
        (["slice", "x"], "--out"),
        (["generate", "x", "--prompt", "1", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "x", "--prompt", "1", "--temperature", "-1"], "--temperature"),
        (["generate", "x", "--prompt", "1", "--stop", ""], "--stop '' is empty"),
        (["run", "x", "--seed", "-1"], "--seed"),
        (["eval", "x", "--task", "chain_sum", "--problems", "many"], "--problems"),
    ],
)
def test_a_wrong_command_is_one_line_too(run: Nestling, arguments: list[str], words: str) -> None:
    run(*arguments).refused(words)


def test_no_command_at_all_shows_the_help(run: Nestling) -> None:
    done = run()
    assert "Commands:" in done.out + done.err
    assert "Traceback" not in done.err


def test_the_version_is_the_packages(run: Nestling) -> None:
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"nestling {nestling.__version__}\n", "")
    assert f'version = "{nestling.__version__}"' in PROJECT


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    process("-m", "nestling", "slice", tmp_path / "none", "--out", tmp_path / "out", "--budget", "50%").refused(
        tmp_path / "none", "no such directory"
    )


# ---- plan


def plan(run: Nestling, target: object) -> dict[str, Any]:
    done = run("plan", target, "--json")
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


def own(found: dict[str, Any]) -> dict[str, Any]:
    """The target's own figures."""
    return {key: value for key, value in found.items() if key not in ("budgets", "family")}


@pytest.mark.parametrize("name", PRESETS)
def test_the_plan_of_a_preset_has_every_figure_at_the_top_and_per_budget(run: Nestling, name: str) -> None:
    found = plan(run, name)
    assert set(FIGURES) <= found.keys()
    assert list(found["budgets"]) == ["100%"]
    assert found["budgets"]["100%"] == own(found)
    assert found["bytes"] == 2 * found["parameters"]
    assert all(type(found[key]) is int and found[key] > 0 for key in FIGURES)


def test_the_plan_of_the_published_model(run: Nestling) -> None:
    found = plan(run, "Nemotron-Nano-12B-v2")
    assert found["parameters"] == found["active_parameters"] == 12_310_001_152
    assert found["kv_bytes_per_token"] == 6 * 2 * 8 * 128 * 2
    assert plan(run, "nemotron-3-nano-30b-a3b")["parameters"] == 31_577_937_344


def test_the_plan_of_a_directory_has_its_budgets(run: Nestling, home: Path) -> None:
    found = plan(run, home / "elastic")
    assert list(found["budgets"]) == ["100%", "50%"]
    assert found["parameters"] == stock.numel(stock.load(home / "elastic"))
    assert found["budgets"]["50%"].items() >= asdict(cost(TINY, HALF)).items()
    assert found["budgets"]["50%"].keys() == own(found).keys()
    assert all(set(FIGURES) <= budget.keys() for budget in found["budgets"].values())
    table = run("plan", home / "elastic").out
    assert f"{parameters(TINY, HALF):,}" in table
    assert "50%" in table


def test_the_plan_of_a_config_needs_no_weights(run: Nestling, home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "elastic" / "config.json", tmp_path)
    wanted = own(plan(run, home / "elastic"))
    for target in (tmp_path, tmp_path / "config.json"):
        assert own(plan(run, target)) == wanted


def test_a_plan_at_a_context_length(run: Nestling, home: Path) -> None:
    assert plan(run, "nemotron-h-8b")["context"] == 131072
    done = run("plan", home / "elastic", "--context", "8k", "--json")
    assert json.loads(done.out)["budgets"]["50%"]["context"] == 8192
    for given in ("many", "-5", "1.5k", "0", "9999M"):
        run("plan", home / "elastic", "--context", given).refused("context", given)


def test_the_tables_of_the_paper(run: Nestling) -> None:
    done = run("plan", "--paper", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["averages"][3]["computed"] == 75.59
    assert "75.99 (75.59) / 77.38" in run("plan", "--paper").out


def test_a_plan_is_of_a_target_or_of_the_paper(run: Nestling) -> None:
    run("plan").refused("name one: --paper, or a TARGET", "star-elastic-12b-a2b")
    run("plan", "nemotron-h-8b", "--paper").refused("name one: --paper, or a TARGET")
    run("plan", "--paper", "--context", "8k").refused("--context does not apply to --paper")


def test_a_plan_of_nothing_is_refused(run: Nestling, tmp_path: Path) -> None:
    run("plan", "nemotron-nano-12b").refused("neither a path nor a preset; did you mean 'nemotron-nano-12b-v2'?")
    run("plan", tmp_path / "none").refused(tmp_path / "none")
    run("plan", tmp_path).refused("config.json")
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h"')
    run("plan", tmp_path / "config.json").refused("config.json", "broken JSON")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    run("plan", tmp_path / "config.json").refused("'llama' is not supported; supported: 'nemotron_h'")


# ---- directories that cannot be read


def break_path(elastic: Path) -> str:
    shutil.rmtree(elastic)
    return "no such directory"


def break_to_file(elastic: Path) -> str:
    shutil.rmtree(elastic)
    elastic.write_text("x")
    return "not a directory"


def break_architecture(elastic: Path) -> str:
    written = json.loads((elastic / "config.json").read_text())
    (elastic / "config.json").write_text(json.dumps(written | {"model_type": "llama"}))
    return "config.json: model_type 'llama' is not supported; supported: 'nemotron_h'"


def break_config(elastic: Path) -> str:
    (elastic / "config.json").write_text("{oops")
    return "config.json: line 1: broken JSON"


def break_no_config(elastic: Path) -> str:
    (elastic / "config.json").unlink()
    return "no config.json"


def into_shards(elastic: Path) -> list[Path]:
    """The same checkpoint in two shards, as Hugging Face writes them."""
    stored = stock.tensors(elastic)
    (elastic / "model.safetensors").unlink()
    names, where, shards = sorted(stored), {}, []
    for number, part in ((1, names[::2]), (2, names[1::2])):
        shards.append(elastic / f"model-{number:05}-of-00002.safetensors")
        save_file({name: stored[name] for name in part}, shards[-1], metadata={"format": "pt"})
        where |= dict.fromkeys(part, shards[-1].name)
    (elastic / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return shards


def break_missing_shard(elastic: Path) -> str:
    into_shards(elastic)[1].unlink()
    return "names model-00002-of-00002.safetensors, which is missing"


def break_truncated_shard(elastic: Path) -> str:
    shard = into_shards(elastic)[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    return f"{shard.name}: truncated"


def break_truncated_file(elastic: Path) -> str:
    file = elastic / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "model.safetensors: truncated"


def break_missing_tensor(elastic: Path) -> str:
    stored = stock.tensors(elastic)
    del stored["backbone.layers.2.mixer.up_proj.weight"]
    save_file(stored, elastic / "model.safetensors")
    return "tensor backbone.layers.2.mixer.up_proj.weight of shape [24, 16] is missing"


def break_shape(elastic: Path) -> str:
    stored = stock.tensors(elastic)
    stored["backbone.norm_f.weight"] = stored["backbone.norm_f.weight"][:-1].clone()
    save_file(stored, elastic / "model.safetensors")
    return "backbone.norm_f.weight has shape [15]; config.json implies [16]"


def break_into_pickle(elastic: Path) -> str:
    (elastic / "model.safetensors").rename(elastic / "pytorch_model.bin")
    return "'pytorch_model.bin' is a pickle, only safetensors and JSON are read"


def break_no_weights(elastic: Path) -> str:
    (elastic / "model.safetensors").unlink()
    return "no weights"


def break_sidecar(elastic: Path) -> str:
    (elastic / "nestling.json").write_text('{"format": 9}')
    return "nestling.json: format 9 cannot be read"


BREAKS = {name.removeprefix("break_"): value for name, value in globals().items() if name.startswith("break_")}


@pytest.mark.parametrize("breakage", BREAKS)
def test_a_directory_that_cannot_be_read_is_refused_by_every_verb(
    run: Nestling, elastic: Path, home: Path, tmp_path: Path, breakage: str
) -> None:
    words, out = BREAKS[breakage](elastic), tmp_path / "out"
    run("slice", elastic, "--budget", "50%", "--out", out).refused(elastic, words)
    run("rank", elastic, "--data", home / "texts.jsonl", "--out", out).refused(elastic, words)
    run("generate", elastic, "--prompt", "1+1=").refused(elastic, words)
    foreign = breakage == "architecture"  # stock transformers may know it: then it says itself what is wrong
    run("eval", elastic, "--task", "chain_sum").refused(elastic, *([] if foreign else [words]))
    run("verify", elastic).refused(elastic, words)
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_shards_are_read_like_one_file(run: Nestling, elastic: Path, home: Path, tmp_path: Path) -> None:
    into_shards(elastic)
    for source, out in ((elastic, "a"), (home / "elastic", "b")):
        assert run("slice", source, "--budget", "50%", "--out", tmp_path / out).code == 0
    assert files(tmp_path / "a")["model.safetensors"] == files(tmp_path / "b")["model.safetensors"]


# ---- slice


def test_a_slice_is_written_whole_and_loads_in_stock_transformers(run: Nestling, home: Path, tmp_path: Path) -> None:
    done = run("slice", home / "elastic", "--budget", "50%", "--out", tmp_path / "deep" / "half")
    count = parameters(TINY, HALF)
    assert (done.code, done.out) == (
        0,
        f"{tmp_path / 'deep' / 'half'}: {count:,} parameters, {4 * count / 1000:.2f} kB\n",
    )
    by_size = run("slice", home / "elastic", "--submodel", spelled(tmp_path, HALF.to_json()), "--out", tmp_path / "b")
    assert by_size.code == 0
    assert files(tmp_path / "b")["model.safetensors"] == files(tmp_path / "deep" / "half")["model.safetensors"]
    ids = stock.tokens(16)
    sliced = stock.logits(stock.load(tmp_path / "b"), ids)
    stock.assert_same(nestling.load(home / "elastic")["50%"](ids).logits.detach(), sliced, 1e-5)
    assert (tmp_path / "b" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"mamba_num_heads": 3}, "mamba_num_heads = 3 cannot be shared by n_groups = 2; nearest: 2, 4"),
        ({"hidden_size": 17}, "hidden_size = 17 is outside 1 … 16, the size in the whole model"),
        ({"intermediate_size": 0}, "intermediate_size = 0 is outside"),
        ({"hidden_sizes": 8}, "unknown key 'hidden_sizes'; did you mean 'hidden_size'?"),
        ({"hidden_size": "8"}, "hidden_size must be an integer, not '8'"),
        ({"layers": [0, 1, 5]}, "layer 5 does not exist; the model has layers 0 … 4"),
        ({"layers": []}, "layers must be ascending indices"),
        ({"layers": 3}, "layers must be a list of layer indices, not 3"),
        ({"intermediate_size": [8, 9, 10]}, "intermediate_size lists 3 sizes; the kept layers have 2 of kind mlp"),
        ({"intermediate_size": [8, 16]}, "intermediate_size differs between layers"),
        ({"n_routed_experts": 2}, "n_routed_experts does not apply"),
        ("{oops", "line 1: broken JSON"),
        ("[8]", "must hold a JSON object, holds a list"),
        ("", "broken JSON"),
    ],
)
def test_a_size_that_the_model_cannot_have_is_refused(
    run: Nestling, home: Path, tmp_path: Path, spec: Any, words: str
) -> None:
    done = run("slice", home / "elastic", "--submodel", spelled(tmp_path, spec), "--out", tmp_path / "out")
    done.refused(words)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_an_unknown_budget_and_two_wishes_or_none_are_refused(
    run: Nestling, home: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "out", home / "elastic"
    run("slice", source, "--submodel", tmp_path / "none.json", "--out", out).refused("none.json: no such file")
    run("slice", source, "--budget", "400%", "--out", out).refused("budget '400%' asks for", "the whole model has")
    run("slice", source, "--budget", "5O%", "--out", out).refused("did you mean '50%'?")
    run("generate", source, "--budget", "x", "--prompt", "1").refused("has no budget 'x'", "100%, 50%")
    run("eval", source, "--budget", "x", "--task", "chain_sum").refused("has no budget 'x'")
    run("slice", source, "--out", out).refused("--budget", "--submodel")
    size = spelled(tmp_path, HALF.to_json())
    run("slice", source, "--budget", "50%", "--submodel", size, "--out", out).refused("--budget", "--submodel")
    run("slice", source, "--budget", "50%", "--hetero", "no", "--out", out).refused("one of auto, pad, code, not 'no'")
    assert not out.exists()


def test_several_sizes_are_cut_at_once_into_directories_of_their_names(
    run: Nestling, home: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "family" / "{budget}", home / "elastic"
    done = run("slice", source, "--budget", "100%", "--budget", "50%", "--out", out, "--dtype", "bf16", "--verify")
    assert done.code == 0, done.err
    assert done.out.count("logits in stock transformers equal the view's") == 2
    assert sorted(path.name for path in (tmp_path / "family").iterdir()) == ["100%", "50%"]
    assert json.loads((tmp_path / "family" / "50%" / "config.json").read_text())["dtype"] == "bfloat16"
    assert run("verify", tmp_path / "family" / "50%", "--inside", source).code == 0
    run("slice", source, "--budget", "100%", "--budget", "50%", "--out", tmp_path / "x").refused(
        "is one directory for 2 sizes; write --out", "x/{budget}"
    )
    run("slice", source, "--budget", "50%", "--budget", "50%", "--out", out).refused("names a size twice")
    size = spelled(tmp_path, HALF.to_json())
    run("slice", source, "--submodel", size, "--out", out).refused("{budget} stands for the name of a --budget")
    assert sorted(path.name for path in (tmp_path / "family").iterdir()) == ["100%", "50%"]


def test_a_wish_is_cut_and_bad_types_and_shards_are_refused(run: Nestling, home: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", home / "elastic"
    assert run("slice", source, "--budget", "70%", "--shard-size", "2kB", "--out", out).code == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert 0.98 * 0.7 <= stock.numel(stock.load(out)) / parameters(TINY) <= 0.7
    other = ("--out", tmp_path / "other")
    run("slice", source, "--budget", "50%", "--dtype", "f32", *other).refused("did you mean 'fp32'?")
    run("slice", source, "--budget", "50%", "--shard-size", "big", *other).refused("--shard-size", "write it as 5GB")
    run("slice", source, "--budget", "0.1%", *other).refused("'0.1%' is too small", "can be cut has")
    run("slice", source, "--budget", "5ms", *other).refused("needs a table of latencies")
    assert not (tmp_path / "other").exists()


def test_an_output_that_exists_is_replaced_only_if_asked_and_only_if_it_is_ours(
    run: Nestling, home: Path, tmp_path: Path
) -> None:
    command = ("slice", home / "elastic", "--budget", "50%", "--out", tmp_path / "out")
    assert run(*command).code == 0
    before = files(tmp_path / "out")
    run(*command).refused("exists; choose another --out or pass --overwrite")
    assert files(tmp_path / "out") == before
    whole = ("slice", home / "elastic", "--budget", "100%", "--out", tmp_path / "out", "--overwrite")
    assert run(*whole).code == 0
    assert stock.numel(stock.load(tmp_path / "out")) == parameters(TINY)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = files(tmp_path / "out")
    run(*command, "--overwrite").refused("not replaced, 'notes.txt' is not ours")
    assert files(tmp_path / "out") == before
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("five years")
    run("slice", home / "elastic", "--budget", "50%", "--out", tmp_path / "theirs", "--overwrite").refused(
        "not replaced"
    )
    assert files(tmp_path / "theirs") == {"thesis.txt": b"five years"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "out", "theirs"]


def test_an_output_inside_a_file_is_refused(run: Nestling, home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        run("slice", home / "elastic", "--budget", "50%", "--out", out).refused(tmp_path / "file", "not a directory")


# ---- rank


def test_ranking_keeps_the_function_and_says_so(run: Nestling, home: Path, tmp_path: Path) -> None:
    texts = ("--data", home / "texts.jsonl", "--batch", 1)
    done = run("rank", home / "elastic", *texts, "--out", tmp_path / "ranked")
    assert (done.code, done.out) == (0, f"{tmp_path / 'ranked'}: ranked, the same function as {home / 'elastic'}\n")
    ids = stock.tokens(16)
    ranked, parent = (stock.logits(stock.load(path), ids) for path in (tmp_path / "ranked", home / "elastic"))
    stock.assert_same(ranked, parent, 1e-5)
    with safe_open(tmp_path / "ranked" / "ranking.safetensors", framework="np") as file:
        orders = {key: file.get_tensor(key) for key in file.keys() if key.startswith("order.")}  # noqa: SIM118
    assert any((order != np.arange(order.shape[-1])).any() for order in orders.values())
    heads = r"(mamba|attention)_heads of layer \d, the mean over its (SSM|KV) groups"
    part = rf"(hidden|layers|(ffn|mamba_channels) of layer \d|{heads})"
    assert re.search(rf"least stable between halves of the data: {part}, Spearman -?\d\.\d\d\n", done.err)
    written = json.loads((tmp_path / "ranked" / "nestling.json").read_text())
    assert list(written["budgets"]) == ["100%"]
    assert written["provenance"]["samples"] == 2
    run("rank", home / "elastic", "--data", home / "texts.jsonl", "--out", tmp_path / "ranked").refused("exists")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no text of at least two tokens"),
        ("\n\n", "has no text of at least two tokens"),
        ('{"text": "1+1"}\n{"text": 1+1}\n', "line 2: not valid JSON"),
        ('{"text": "1+1"}\n\n{"txt": "1+1"}\n', 'line 3: needs an object with a "text" string'),
        ('["1+1"]\n', "line 1: needs an object"),
    ],
)
def test_calibration_text_that_cannot_be_used_is_refused(
    run: Nestling, home: Path, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    run("rank", home / "elastic", "--data", tmp_path / "bad.jsonl", "--out", tmp_path / "out").refused(
        "bad.jsonl", words
    )
    run("rank", home / "elastic", "--data", tmp_path / "no.jsonl", "--out", tmp_path / "out").refused("cannot be read")
    assert not (tmp_path / "out").exists()


# ---- generate and eval


def test_a_continuation_is_the_budgets_own(run: Nestling, home: Path) -> None:
    done = run("generate", home / "elastic", "--budget", "50%", "--prompt", "1+2=", "--max-tokens", "5")
    assert done.code == 0
    assert done.out.endswith("\n")
    assert run("generate", home / "elastic", "--budget", "50%", "--prompt", "1+2=", "--max-tokens", "5").out == done.out
    assert re.search(r"\d+ tokens, \d+ tokens/s", done.err)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("2*3=", "characters that the model's tokenizer does not know: '*'; it knows '"), ("", "the prompt is empty")],
)
def test_a_prompt_that_cannot_be_read_is_refused(run: Nestling, home: Path, prompt: str, words: str) -> None:
    run("generate", home / "elastic", "--prompt", prompt).refused(words)


@pytest.mark.parametrize(
    "verb",
    [["generate", "--prompt", "1+1="], ["serve", "--port", "0"], ["eval", "--task", "chain_sum"]],
    ids=lambda v: v[0],
)
def test_a_device_that_is_not_there_is_refused(run: Nestling, home: Path, verb: list[str]) -> None:
    asked = [verb[0], home / "elastic", *verb[1:], "--device"]
    run(*asked, "gpu").refused("--device 'gpu' is unknown", "auto, cpu, cuda")
    if not torch.cuda.is_available():
        run(*asked, "cuda").refused("--device 'cuda'", "finds no GPU here; 'cpu' is allowed")


def test_text_needs_a_tokenizer(run: Nestling, elastic: Path, home: Path, tmp_path: Path) -> None:
    (elastic / "tokenizer.json").unlink()
    words = "has no tokenizer"
    run("generate", elastic, "--prompt", "1+1=").refused(elastic, words)
    run("rank", elastic, "--data", home / "texts.jsonl", "--out", tmp_path / "out").refused(elastic, words)
    run("eval", elastic, "--task", "chain_sum", "--budget", "50%").refused(elastic, words)
    (elastic / "tokenizer_config.json").unlink()
    run("eval", elastic, "--task", "chain_sum").refused(elastic, words)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_printed_and_written(run: Nestling, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    task = "chain_sum:min_terms=2,max_terms=2,max_digits=1"
    command = ["eval", home / "elastic", "--tasks", task, "--problems", 5, "--max-tokens", 3]
    for wish, names in (
        (["--budget", "all"], ["100%", "50%"]),
        ([], ["elastic"]),
        (["--backend", "transformers"], None),
    ):
        done = run(*command, *wish, "--out", tmp_path / str(len(wish)) / str(names))
        assert done.code == 0, done
        line = r"(\S+)  chain_sum:\S+ pass@1 \d+\.\d% \(95 % interval \d+\.\d% … \d+\.\d%\).*"
        said = [re.fullmatch(line, text) for text in done.out.splitlines()]
        assert [match and match[1] for match in said] == (names or ["elastic"])
    written = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("chain_sum*.json"))]
    assert sorted(one["model"]["backend"] for one in written) == ["nestling"] * 3 + ["transformers"]
    assert all(
        len((file.with_suffix(".jsonl")).read_text().splitlines()) == 6 for file in tmp_path.rglob("chain*.json")
    )


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("chain_sums", "unknown task 'chain_sums'; did you mean 'chain_sum'?"),
        ("chain_sum:terms=2", "terms"),
        ("chain_sum:min_terms=x", "'min_terms' needs an integer"),
    ],
)
def test_an_unknown_task_is_refused(run: Nestling, home: Path, task: str, words: str) -> None:
    pytest.importorskip("reasoning_gym")
    run("eval", home / "elastic", "--task", task, "--problems", 3).refused(words)


# ---- recipes


@pytest.mark.parametrize("verb", ["run", "train", "pretrain"])
def test_a_recipe_that_cannot_be_read_is_refused(run: Nestling, tmp_path: Path, verb: str) -> None:
    demo = Path(__file__).parent.parent / "runs" / "demo.toml"
    run(verb, tmp_path / "none.toml").refused("none.toml: no such recipe")
    (tmp_path / "bad.toml").write_text("title = \n")
    run(verb, tmp_path / "bad.toml", "--out", tmp_path / "out").refused("bad.toml: not valid TOML")
    (tmp_path / "bad.toml").write_text(demo.read_text().replace("[rank]\nbatches", "[rank]\nbatchs"))
    run(verb, tmp_path / "bad.toml", "--out", tmp_path / "out").refused("'rank.batchs'; did you mean 'batches'?")
    assert not (tmp_path / "out").exists()


def test_a_report_needs_a_run(run: Nestling, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    run("report", tmp_path).refused("run.json is missing")


# ---- stopped

IMPORTING = """
import os, runpy, signal, sys

where, how, start = sys.argv[1:4]
sys.argv[1:4] = []

class Stopping:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), getattr(signal, how))

sys.meta_path.insert(0, Stopping())
if start == "-m":
    runpy.run_module("nestling", run_name="__main__")
else:
    module, _, name = start.partition(":")
    sys.exit(getattr(__import__(module, fromlist=[name]), name)())
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("where", ["typer", "numpy", "torch"])
def test_stopped_while_it_imports_it_says_only_that(home: Path, where: str, how: str) -> None:
    (script,) = [entry.split('"')[1] for entry in PROJECT.splitlines() if entry.startswith("nestling = ")]
    for start in ("-m", script):
        done = process("-c", IMPORTING, where, how, start, "generate", home / "elastic", "--prompt", "1+1=")
        assert (done.code, done.out, done.err) == (130, "", "nestling: stopped\n")


INTERRUPTED = """
import os, signal, sys
from nestling import cli
from nestling.weights import transform

how = sys.argv.pop(1)
readings, seen = transform.readings, []

def stopping(*given, **named):
    seen.append(given)
    if len(seen) == 5:
        os.kill(os.getpid(), getattr(signal, how))
    return readings(*given, **named)

transform.readings = stopping
cli.main()
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_a_slice_that_is_stopped_leaves_nothing(home: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "deep" / "out"
    done = process("-c", INTERRUPTED, how, "slice", home / "elastic", "--budget", "50%", "--out", out)
    assert (done.code, done.out, done.err) == (130, "", "nestling: stopped\n")
    assert not list(tmp_path.iterdir())


def test_a_slice_that_is_stopped_leaves_the_one_that_was_there(run: Nestling, home: Path, tmp_path: Path) -> None:
    command = ("slice", home / "elastic", "--budget", "100%", "--out", tmp_path / "out")
    assert run(*command).code == 0
    before = files(tmp_path / "out")
    done = process("-c", INTERRUPTED, "SIGINT", *command[:2], "--budget", "50%", *command[4:], "--overwrite")
    assert (done.code, done.err) == (130, "nestling: stopped\n")
    assert files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "out"]


# ---- generate in a stream, and serve


def test_a_continuation_ends_before_a_stop_string(run: Nestling, home: Path) -> None:
    asked = ("generate", home / "elastic", "--budget", "50%", "--prompt", "1+2=", "--max-tokens", "12")
    whole = run(*asked).out.rstrip("\n")
    stop = whole[3:5]
    assert run(*asked, "--stop", "no", "--stop", stop).out == whole[: whole.index(stop)] + "\n"
    drawn = run(*asked, "--temperature", "1", "--top-p", "0.9", "--top-k", "5", "--seed", "3").out
    assert run(*asked, "--temperature", "1", "--top-p", "0.9", "--top-k", "5", "--seed", "3").out == drawn


def test_a_chat_needs_a_template(run: Nestling, home: Path) -> None:
    run("generate", home / "elastic", "--prompt", "1+2=", "--chat").refused("has no chat template")
    run("generate", home / "elastic", "--prompt", "1+2=", "--top-p", "0").refused("top_p = 0.0")


def test_serving_to_others_needs_a_key(run: Nestling, home: Path) -> None:
    pytest.importorskip("fastapi")
    run("serve", home / "elastic", "--host", "0.0.0.0").refused("--host 0.0.0.0", "NESTLING_API_KEY", "--insecure")
    run("serve", home / "elastic", "--pin", "90q").refused("no budget '90q'")
    run("serve", home / "elastic", "--cache", "much").refused("--cache: 'much' is not a number of bytes")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run("serve", home / "elastic", "--port", port).refused(f"cannot listen on 127.0.0.1 port {port}", "--port")
