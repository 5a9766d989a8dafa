"""The plan of a family against the slices it plans and the configs they get; contexts; tables that fit a terminal."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nestling
import stock
from nestling import printout
from nestling.arch.architecture import Architecture
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import Submodel
from nestling.errors import NestlingError
from nestling.plan import figures
from nestling.units import parse_context
from nestling.weights.elastic import open_elastic, sidecar
from nestling.weights.files import write_json

DENSE = replace(stock.TINY, hybrid_override_pattern="M*-M-")
BUDGETS = {
    "100%": Submodel(),
    "75%": Submodel(hidden_size=14, mamba_num_heads=2),
    "50%": Submodel(layers=(0, 1, 2, 4), hidden_size=10, intermediate_size=16, mamba_num_heads=2),
}


def family(directory: Path, budgets: dict[str, Submodel], architecture: Architecture = DENSE) -> Path:
    stock.save(architecture, directory)
    spelled = {name: open_elastic(directory).submodel(submodel) for name, submodel in budgets.items()}
    write_json(directory / "nestling.json", sidecar(architecture, spelled, {}))
    return directory


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("plan") / "elastic", BUDGETS)


def stored_bytes(directory: Path) -> int:
    return sum(tensor.nbytes for tensor in stock.tensors(directory).values())


# ---- figures


def test_the_plan_of_a_family_is_what_its_slices_are(elastic: Path, tmp_path: Path) -> None:
    found = figures(str(elastic))
    for name, planned in found["budgets"].items():
        nestling.slice(elastic, name, tmp_path / name)
        assert planned["parameters"] == stock.numel(stock.load(tmp_path / name))
        assert planned["weight_bytes"]["fp32"] == stored_bytes(tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        sizes = {field: value for field, value in planned["shape"].items() if field != "layers"}
        assert sizes.items() <= written.items()
        cut = figures(str(tmp_path / name))
        differing = [key for key in planned if cut[key] != planned[key]]
        assert differing == (["shape"] if name == "50%" else []), "the slice counts its own layers"
    assert found["family"]["together_bytes"]["fp32"] == stored_bytes(elastic)
    assert found["family"]["separate_bytes"]["fp32"] == sum(stored_bytes(tmp_path / name) for name in BUDGETS)
    assert found["family"]["saved_bytes"]["fp32"] == sum(stored_bytes(tmp_path / name) for name in ("75%", "50%"))


def test_the_plan_of_one_size_saves_nothing() -> None:
    found = figures("nemotron-h-4b")["family"]
    assert found["separate_bytes"] == found["together_bytes"]
    assert set(found["saved_bytes"].values()) == {0}


def test_a_context_scales_what_depends_on_it(elastic: Path) -> None:
    short, long = figures(str(elastic), 1), figures(str(elastic), 1001)
    for here, there in [(short, long), *zip(short["budgets"].values(), long["budgets"].values(), strict=True)]:
        assert there["kv_bytes"] == 1001 * here["kv_bytes"]
        assert there["sequence_bytes"] - here["sequence_bytes"] == 1000 * here["kv_bytes_per_token"]
        assert there["flops_at_context"] - here["flops_at_context"] == 1000 * here["flops_per_context_token"]
        same = ("parameters", "bytes", "weight_bytes", "shape", "ssm_bytes_per_sequence", "flops_per_token")
        assert all(here[key] == there[key] for key in same)
    assert figures("nemotron-h-8b")["context"] == 131072


def test_a_published_sequence_by_hand() -> None:
    found = figures("Nemotron-Nano-12B-v2", 131072)
    assert found["kv_bytes"] == 6 * 2 * 8 * 128 * 2 * 131072  # layers, keys and values, heads, channels, bf16
    state = 28 * (128 * 80 * 128 * 4 + (128 * 80 + 2 * 8 * 128) * 4 * 2)  # fp32 states, four bf16 columns of window
    assert found["sequence_bytes"] == found["kv_bytes"] + state
    assert found["flops_at_context"] - found["flops_per_token"] == 6 * 4 * 40 * 128 * 131072


@pytest.mark.parametrize("name", PRESETS)
def test_a_shape_names_the_sizes_its_blocks_have_and_no_others(name: str) -> None:
    found = figures(name)["shape"]
    pattern = PRESETS[name].hybrid_override_pattern
    assert found["hybrid_override_pattern"] == pattern
    assert all(value == getattr(PRESETS[name], field) for field, value in found.items() if field != "layers")
    assert ("intermediate_size" in found) == ("-" in pattern)
    assert ("n_routed_experts" in found) == ("num_experts_per_tok" in found) == ("E" in pattern)


def test_sizes_that_differ_between_layers_are_listed(tmp_path: Path) -> None:
    submodel = Submodel(intermediate_size=(20, 8))
    found = figures(str(family(tmp_path / "model", {"100%": Submodel(), "mixed": submodel})))
    assert found["budgets"]["mixed"]["shape"]["intermediate_size"] == [20, 8]
    assert found["budgets"]["100%"]["shape"]["intermediate_size"] == 24


# ---- contexts


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1", 1), ("4096", 4096), ("8k", 8192), (" 128K ", 131072), ("1M", 1048576), ("1024m", 2**30)],
)
def test_contexts_are_counted_in_units_of_1024(text: str, tokens: int) -> None:
    assert parse_context(text) == tokens


@given(st.integers(1, 2**30))
def test_a_number_is_itself(tokens: int) -> None:
    assert parse_context(str(tokens)) == tokens


@pytest.mark.parametrize("text", ["", "long", "-1", "1.5k", "1e5", "8kB", "8 k 8", "٤", "9" * 5000, "k"])
def test_what_is_no_number_is_no_context(text: str) -> None:
    with pytest.raises(NestlingError, match="is not a number of tokens; write 4096, 8k, 128k or 1M"):
        parse_context(text)


@pytest.mark.parametrize("text", ["0", "0k", "1025M", "1073741825", "999999999999M"])
def test_absurd_contexts_are_refused(text: str) -> None:
    with pytest.raises(NestlingError, match="allowed: 1 … 1,073,741,824"):
        parse_context(text)


# ---- what cannot be planned


def config(**changed: Any) -> dict[str, Any]:
    return DENSE.to_config({}) | changed


def refused(target: object, *words: str) -> None:
    with pytest.raises(NestlingError) as error:
        figures(str(target))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("{", "broken JSON"),
        ("[]", "must hold a JSON object"),
        ('{"model_type": "llama"}', "'llama' is not supported; supported: 'nemotron_h'"),
        ("{}", "None is not supported"),
        (json.dumps(config(hidden_size="wide")), "hidden_size must be a positive integer"),
        (json.dumps(config(hidden_size=10**400)), "hidden_size is absurd; at most 1,000,000,000 is allowed"),
        (json.dumps(config(n_routed_experts=10**8)), "n_routed_experts is absurd; at most 10,000 is allowed"),
        (json.dumps(config(layers_block_type=[])), "the model has no layers"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, written: str, words: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(written)
    for target in (tmp_path, file):
        refused(target, str(file), words)


ODD = [None, True, -1, 0, 7, 1.5, "x", "", [], ["mlp"], [[1]], {}, {"a": 1}, 10**12, 10**400, float("nan")]


@given(st.sampled_from(sorted(config())), st.sampled_from(ODD))
@settings(max_examples=300)
def test_odd_configs_are_planned_or_refused(fresh: Any, key: str, value: Any) -> None:
    file = fresh() / "config.json"
    file.write_text(json.dumps(config(**{key: value})))
    assert str(file) in planned_or_refused(str(file))


def planned_or_refused(target: str) -> str:
    try:
        printout.show_plan(target, figures(target))
    except NestlingError as error:
        return str(error)
    return target


def test_budgets_without_weights_are_not_overlooked(tmp_path: Path) -> None:
    family(tmp_path, BUDGETS)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "no weights: neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "nestling.json").unlink()
    assert figures(str(tmp_path))["parameters"] == figures(str(tmp_path / "config.json"))["parameters"]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    refused(tmp_path, "b.safetensors")


def test_targets_that_are_nothing(tmp_path: Path) -> None:
    refused("nemotron-h-8", "neither a path nor a preset; did you mean 'nemotron-h-8b'?")
    refused("x" * 5000, "neither a path nor a preset; allowed: nemotron-nano-12b-v2")
    refused("", "config.json")
    refused("a\0b", "neither a path nor a preset")
    refused(tmp_path / ("x" * 300), "cannot be read")
    refused(tmp_path / "config.json", "no such file")


# ---- what is printed


def shown(capsys: pytest.CaptureFixture[str], target: object, context: int = 4096) -> str:
    capsys.readouterr()
    printout.show_plan(str(target), figures(str(target), context))
    return capsys.readouterr().out


@pytest.fixture(params=[60, 80, 160])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@pytest.mark.parametrize("name", ["nemotron-nano-12b-v2", "nemotron-3-nano-30b-a3b"])
def test_the_table_of_a_preset_is_whole(capsys: pytest.CaptureFixture[str], width: int, name: str) -> None:
    text = shown(capsys, name)
    assert max(map(len, text.splitlines())) <= width
    assert f"{figures(name)['parameters']:,}" in text
    assert ("active per token" in text) == (name == "nemotron-3-nano-30b-a3b")
    assert "in its own" not in text


def test_the_tables_of_a_family_are_whole(capsys: pytest.CaptureFixture[str], width: int, tmp_path: Path) -> None:
    more = {f"[b]size {n}": replace(BUDGETS["50%"], hidden_size=9 - n) for n in range(6)}
    directory = family(tmp_path / "model", BUDGETS | more)
    text = shown(capsys, directory)
    assert max(len(line) for line in text.splitlines() if str(directory) not in line) <= width
    for name, planned in figures(str(directory))["budgets"].items():
        assert name in text
        assert f"{planned['parameters']:,}" in text
    assert text.count(str(directory)) == text.count("hidden  ") == {60: 5, 80: 3, 160: 1}[width]
    assert "each in its own" in text


def test_units_are_spelled_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    lines = [line.split("  ") for line in shown(capsys, "nemotron-nano-12b-v2", 131072).splitlines()]
    cells = {cells[0].strip(): cells[-1].strip() for cells in lines}
    assert cells["weights, bf16"] == "24.62 GB"
    assert cells["bf16 in binary units"] == "22.93 GiB"
    assert cells["KV cache at 128k"] == "3.22 GB"
    assert cells["Mamba state"] == "149.55 MB"
    assert cells["FLOPs/token, no context"] == "23.46 GFLOP"
    assert cells["layers M/*/-/E"] == "62 = 28/6/28/0"
    assert cells["Mamba heads × dim"] == "128 × 80"
    assert cells["query / KV heads"] == "40 / 8"


def test_sizes_that_differ_are_a_range_and_a_whole_model_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mixed = {"mixed": Submodel(intermediate_size=(20, 8)), "small": Submodel(hidden_size=8, intermediate_size=8)}
    text = shown(capsys, family(tmp_path / "model", mixed))
    assert "8…20" in text
    assert "whole model" in text
    assert "whole model" not in shown(capsys, family(tmp_path / "other", BUDGETS))


def test_a_directory_whose_layers_have_sizes_of_their_own_counts_those(tmp_path: Path) -> None:
    architecture = replace(stock.TINY, hybrid_override_pattern="-M*-")
    stock.save(architecture, tmp_path / "whole")
    nestling.slice(tmp_path / "whole", {"intermediate_size": [8, 16]}, tmp_path / "cut", hetero="code")
    stored = sum(tensor.numel() for tensor in stock.tensors(tmp_path / "cut").values())
    found = figures(str(tmp_path / "cut"))
    assert found["parameters"] == found["budgets"]["100%"]["parameters"] == stored
    assert found["shape"]["intermediate_size"] == [8, 16]
