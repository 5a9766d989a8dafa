"""`nestling slice`: complete directories in every form, several at once, and nothing lost when it goes wrong."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nestling
import stock
from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.submodel import Submodel, complete
from nestling.errors import NestlingError
from nestling.weights import gather, slicing, transform
from nestling.weights.elastic import open_elastic
from nestling.weights.slicing import plan_slices
from nestling.weights.verify import verify
from strategies import architectures, submodels

Fresh = Callable[[], Path]

MODEL = replace(stock.HYBRID, use_bias=False, mlp_bias=False)
LARGE = Submodel(hidden_size=20, intermediate_size=16, num_attention_heads=6)
SMALL = Submodel(layers=(0, 1, 3, 4), hidden_size=12, intermediate_size=10, mamba_num_heads=4, num_attention_heads=4)
MIXED = Submodel(layers=(0, 1, 3, 4, 5), hidden_size=20, intermediate_size=(18, 7), num_attention_heads=(2, 6))


@pytest.fixture
def elastic(tmp_path: Path) -> Path:
    """A checkpoint that passes for a ranked one with three sizes."""
    directory = tmp_path / "elastic"
    stock.save(MODEL, directory)
    budgets = {"100%": Submodel(), "Large": LARGE, "Small": SMALL}
    written = {name: {"submodel": submodel.to_json()} for name, submodel in budgets.items()}
    (directory / "nestling.json").write_text(json.dumps({"format": 1, "budgets": written}))
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---- several sizes in one pass


def test_several_sizes_in_one_pass_are_each_as_alone_and_each_byte_is_read_once(elastic: Path, tmp_path: Path) -> None:
    wishes = {"all": "100%", "large": "large", "small": "Small", "own": {"hidden_size": 8, "layers": [2, 5]}}
    plan = plan_slices(elastic, {tmp_path / "many" / name: wish for name, wish in wishes.items()})
    told: list[int] = []
    with mock.patch.object(gather, "read_into", side_effect=gather.read_into) as read:
        plan.write(told.append)
    assert sum(told) == plan.nbytes
    seen = [byte for c in read.call_args_list for byte in range(c.args[2], c.args[2] + len(c.args[3]))]
    weights = (elastic / "model.safetensors").stat().st_size
    assert (
        len(seen)
        == len(set(seen))
        == sum(e.nbytes for e in open_elastic(elastic).checkpoint.entries.values())
        < weights
    )
    for name, wish in wishes.items():
        nestling.slice(elastic, wish, tmp_path / "alone" / name)
    assert files(tmp_path / "many") == files(tmp_path / "alone")
    assert verify(tmp_path / "many" / "small", tmp_path / "many" / "large")


@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_sizes_in_one_pass(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    """Also such as do not lie inside one another, of which each takes what the others leave."""
    architecture, directory = data.draw(architectures(needs="M*-")), fresh()
    cuts = data.draw(st.lists(submodels(architecture, layers=True), min_size=2, max_size=3))
    stock.save(architecture, directory / "whole", seed)
    plan_slices(directory / "whole", {directory / f"many{i}": cut for i, cut in enumerate(cuts)}).write()
    for i, cut in enumerate(cuts):
        nestling.slice(directory / "whole", cut, directory / f"alone{i}")
        assert files(directory / f"many{i}") == files(directory / f"alone{i}")


def test_when_one_of_several_fails_none_appears(elastic: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    with pytest.raises(NestlingError, match="exists; choose another --out"):
        plan_slices(elastic, {tmp_path / "a": "large", tmp_path / "b": "small"}).write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "elastic"]
    assert files(tmp_path / "b") == {"mine": b"x"}


# ---- sizes that differ between layers, with custom code


def load_code(directory: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True, dtype="auto"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 99))
def test_custom_code_is_the_view_with_its_own_sizes(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    architecture, directory = data.draw(architectures(needs="*-", kinds="M*-", least=2)), fresh()
    submodel = data.draw(
        submodels(architecture, per_layer=("intermediate_size", "num_attention_heads"), layers=data.draw(st.booleans()))
    )
    stock.save(architecture, directory / "whole", seed)
    spelled = nestling.slice(directory / "whole", submodel, directory / "cut", hetero="code")
    mixed = any(isinstance(value, tuple) for key, value in spelled.given().items() if key != "layers")
    found = load_code(directory / "cut") if mixed else stock.load(directory / "cut")
    ids = stock.tokens(architecture.vocab_size, seed=seed)
    view = nestling.load(directory / "whole")[submodel]
    stock.assert_same(stock.logits(found, ids), view(ids).logits, 1e-5)
    assert stock.numel(found) == parameters(architecture, submodel)
    assert verify(directory / "cut", directory / "whole")


def test_a_directory_with_sizes_of_its_own_is_verified_and_says_what_it_cannot(elastic: Path, tmp_path: Path) -> None:
    nestling.slice(elastic, MIXED, tmp_path / "code", hetero="code")
    assert len(verify(tmp_path / "code", elastic)) == 4
    assert open_elastic(tmp_path / "code").whole.intermediate_size == (18, 7)
    for refused in (
        lambda: nestling.slice(tmp_path / "code", {"hidden_size": 8}, tmp_path / "x"),
        lambda: nestling.load(tmp_path / "code"),
    ):
        with pytest.raises(NestlingError, match="sizes of its own per layer"):
            refused()
    nestling.slice(tmp_path / "code", None, tmp_path / "copy", hetero="code")
    assert files(tmp_path / "copy")["model.safetensors"] == files(tmp_path / "code")["model.safetensors"]


def test_the_default_names_both_ways(elastic: Path, tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match="--hetero pad .* --hetero code"):
        nestling.slice(elastic, MIXED, tmp_path / "cut")


@pytest.mark.parametrize("hetero", ["pad", "code"])
def test_a_changed_value_is_found_in_either_form(elastic: Path, tmp_path: Path, hetero: str) -> None:
    nestling.slice(elastic, MIXED, tmp_path / "cut", hetero=hetero)
    assert verify(tmp_path / "cut", elastic)
    stored = load_file(tmp_path / "cut" / "model.safetensors")
    stored["backbone.layers.3.mixer.down_proj.weight"][0, -1] += 1  # where the form pad has a zero
    save_file(stored, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    record = tmp_path / "cut" / "nestling-slice.json"
    record.write_text(record.read_text().replace('"xxh3_128"', '"was"'))
    with pytest.raises(NestlingError, match=r"layers\.3\.mixer\.down_proj\.weight is not the prefix of .*layers\.4"):
        verify(tmp_path / "cut", elastic)


@pytest.mark.parametrize("chunk", [1, 50])
def test_pieces_of_any_size_make_the_same_file(
    elastic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Padding that is longer than what is read at a time, too."""
    nestling.slice(elastic, MIXED, tmp_path / "whole", hetero="pad")
    monkeypatch.setattr(transform, "readings", partial(transform.readings, chunk_bytes=chunk))
    nestling.slice(elastic, MIXED, tmp_path / "pieces", hetero="pad")
    whole, pieces = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert pieces == whole


def test_the_zeros_of_a_padded_slice_are_no_width_of_what_is_cut_out_of_it(elastic: Path, tmp_path: Path) -> None:
    nestling.slice(elastic, MIXED, tmp_path / "pad", hetero="pad")
    padded = open_elastic(tmp_path / "pad")
    own = stock.numel(stock.prune(stock.load(elastic), stock.picks(MODEL, MIXED)))
    assert parameters(padded.architecture, padded.submodel("100%")) == own < parameters(padded.architecture)
    assert nestling.load(tmp_path / "pad")["100%"].parameters == own
    smaller = {"layers": [0, 1, 3, 4], "intermediate_size": 15, "num_attention_heads": 4}  # of (18, 7) and (2, 6)
    spelled = nestling.slice(tmp_path / "pad", smaller, tmp_path / "again", hetero="pad")
    assert (spelled.intermediate_size, spelled.num_attention_heads) == ((15, 7), 4)
    direct = {"layers": [0, 1, 4, 5], "hidden_size": 20, "intermediate_size": [15, 7], "num_attention_heads": 4}
    by_hand = stock.prune(stock.load(elastic), stock.picks(MODEL, Submodel.from_json(direct)))
    record = json.loads((tmp_path / "again" / "nestling-slice.json").read_text())
    assert record["parameters"] == stock.numel(by_hand)
    ids = stock.tokens(31)
    stock.assert_same(stock.logits(stock.load(tmp_path / "again"), ids), stock.logits(by_hand, ids), 1e-5)
    assert verify(tmp_path / "again", tmp_path / "pad")
    with pytest.raises(NestlingError, match="intermediate_size differs between layers"):
        nestling.slice(tmp_path / "pad", {"intermediate_size": 15}, tmp_path / "x")
    nestling.slice(tmp_path / "pad", None, tmp_path / "copy", hetero="pad")
    assert files(tmp_path / "copy")["model.safetensors"] == files(tmp_path / "pad")["model.safetensors"]
    assert f"{own:,} parameters, 100.0% of the model" in (tmp_path / "copy" / "README.md").read_text()


# ---- types


@pytest.mark.parametrize(("dtype", "torch_type"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_slice_in_another_type_is_the_slice_rounded(
    elastic: Path, tmp_path: Path, dtype: str, torch_type: torch.dtype
) -> None:
    nestling.slice(elastic, "small", tmp_path / "plain")
    nestling.slice(elastic, "small", tmp_path / "rounded", dtype=dtype)
    plain, rounded = stock.tensors(tmp_path / "plain"), stock.tensors(tmp_path / "rounded")
    for name, value in plain.items():
        assert torch.equal(rounded[name], value.to(torch_type)), name
    assert {parameter.dtype for parameter in stock.load(tmp_path / "rounded").parameters()} == {torch_type}
    assert verify(tmp_path / "rounded", elastic)
    nestling.slice(tmp_path / "rounded", None, tmp_path / "back", dtype="fp32")
    assert torch.equal(stock.tensors(tmp_path / "back")["lm_head.weight"], rounded["lm_head.weight"].float())


def test_a_buffer_keeps_its_type(fresh: Fresh) -> None:
    architecture, directory = Architecture("ME*", vocab_size=8, hidden_size=8, n_groups=1, mamba_num_heads=2), fresh()
    stock.save(architecture, directory / "whole")
    nestling.slice(directory / "whole", None, directory / "cut", dtype="bf16")
    types = {name: value.dtype for name, value in stock.tensors(directory / "cut").items()}
    buffers = [name for name in types if name.endswith("e_score_correction_bias")]
    assert buffers
    assert {types.pop(name) for name in buffers} == {torch.float32}
    assert set(types.values()) == {torch.bfloat16}


def test_a_value_that_does_not_fit_writes_nothing(elastic: Path, tmp_path: Path) -> None:
    stored = stock.tensors(elastic)
    stored["backbone.layers.1.mixer.up_proj.weight"][3, 4] = 1e30
    save_file(stored, elastic / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NestlingError, match=r"layers\.1\.mixer\.up_proj\.weight: 1e\+30 does not fit into fp16"):
        nestling.slice(elastic, "large", tmp_path / "cut", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["elastic"]


# ---- FP8 with a scale per tensor


@pytest.fixture
def quantised(elastic: Path) -> Path:
    stored: dict[str, torch.Tensor] = {}
    for name, value in stock.tensors(elastic).items():
        if name.endswith("proj.weight"):
            stored[name] = value.to(torch.float8_e4m3fn)
            stored[name.replace("weight", "weight_scale")] = torch.tensor(float(len(stored)))
            stored[name.replace("weight", "input_scale")] = torch.tensor([float(len(stored))])
        else:
            stored[name] = value.bfloat16()
    stored["backbone.layers.5.mixer.k_proj.k_scale"] = torch.tensor(0.5)
    save_file(stored, elastic / "model.safetensors", metadata={"format": "pt"})
    skipped = ["lm_head", "backbone.layers.2.mixer.conv1d", "backbone.layers.4*"]
    (elastic / "hf_quant_config.json").write_text(json.dumps({"quantization": {"exclude_modules": skipped}}))
    config = json.loads((elastic / "config.json").read_text())
    config["quantization_config"] = {"ignore": skipped, "layers": {"backbone.layers.5.mixer": {"bits": 8}}}
    (elastic / "config.json").write_text(json.dumps(config))
    return elastic


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_fp8_passes_through_with_its_scales_and_layers_are_renumbered(
    quantised: Path, tmp_path: Path, dtype: str | None
) -> None:
    spec = {"layers": [0, 1, 4, 5], "hidden_size": 16, "intermediate_size": 8}
    nestling.slice(quantised, spec, tmp_path / "cut", dtype=dtype)
    whole, cut = stock.tensors(quantised), stock.tensors(tmp_path / "cut")
    name = "backbone.layers.{}.mixer.up_proj.{}".format
    assert torch.equal(
        cut[name(2, "weight")].view(torch.uint8), whole[name(4, "weight")][:8, :16].contiguous().view(torch.uint8)
    )
    assert torch.equal(cut[name(2, "weight_scale")], whole[name(4, "weight_scale")])
    assert cut[name(2, "input_scale")].shape == (1,)
    assert cut["backbone.layers.3.mixer.k_proj.k_scale"] == 0.5
    assert cut["backbone.embeddings.weight"].dtype == (torch.bfloat16 if dtype is None else torch.float32)
    kept = ["lm_head", "backbone.layers.2*"]
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["quantization_config"] == {"ignore": kept, "layers": {"backbone.layers.3.mixer": {"bits": 8}}}
    quant = json.loads((tmp_path / "cut" / "hf_quant_config.json").read_text())
    assert quant == {"quantization": {"exclude_modules": kept}}
    assert verify(tmp_path / "cut", quantised)


def test_a_broken_quantisation_config_is_said_before_a_byte_is_written(quantised: Path, tmp_path: Path) -> None:
    (quantised / "hf_quant_config.json").write_text("{")
    with pytest.raises(NestlingError, match=r"hf_quant_config\.json: line 1: broken JSON"):
        plan_slices(quantised, {tmp_path / "cut": "small"})


def test_a_scale_per_block_cannot_be_sliced(quantised: Path, tmp_path: Path) -> None:
    stored = stock.tensors(quantised)
    stored["backbone.layers.1.mixer.up_proj.weight_scale"] = torch.ones(20, 1)
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NestlingError, match=r"up_proj\.weight_scale has shape \[20, 1\]; only one scale per tensor"):
        nestling.slice(quantised, "small", tmp_path / "cut")


# ---- what the directory holds


def test_shards_of_a_given_size_load_in_stock_transformers(elastic: Path, tmp_path: Path) -> None:
    nestling.slice(elastic, "large", tmp_path / "one")
    nestling.slice(elastic, "large", tmp_path / "many", shard_bytes=5000)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {shard.name for shard in shards}
    ids = stock.tokens(31)
    assert torch.equal(
        stock.logits(stock.load(tmp_path / "many"), ids), stock.logits(stock.load(tmp_path / "one"), ids)
    )
    assert any("weight files" in line for line in verify(tmp_path / "many", elastic))


def test_the_model_card(elastic: Path, tmp_path: Path) -> None:
    about = json.loads((elastic / "nestling.json").read_text())
    result = {"task": "chain_sum", "exact_match": 0.975, "interval": [0.96, 0.985], "problems": 1000, "backend": "x"}
    about["budgets"]["Small"] |= {"tokens": 12_345, "evaluations": [result]}
    about["provenance"] = {"parent": "acme/base", "samples": 64, "recipe": {"router_steps": 9}}
    (elastic / "nestling.json").write_text(json.dumps(about))
    (elastic / "README.md").write_text("---\nlicense: other\nlicense_name: open\ntags: [x]\n---\n# parent\n")
    nestling.slice(elastic, "Small", tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    written = yaml.safe_load(front)
    assert (written["license"], written["license_name"], written["library_name"]) == ("other", "open", "transformers")
    numel = stock.numel(stock.load(tmp_path / "cut"))
    for words in (
        f"{numel:,}", f"{stock.numel(stock.load(elastic)):,}", "parent: acme/base", "samples: 64", "recipe: in",
        "12,345", "| chain_sum | 97.5% solved | 96.0% – 98.5% | 1,000 problems | x |", "`hidden_size` | 12 | 24 |",
        "1 Mamba-2, 1 attention",
    ):  # fmt: skip
        assert words in body, words
    assert "license" not in body
    assert "trust" not in body
    nestling.slice(elastic, MIXED, tmp_path / "code", hetero="code")
    assert "trust_remote_code=True" in (tmp_path / "code" / "README.md").read_text()


def test_a_card_knows_a_budget_in_any_case(elastic: Path, tmp_path: Path) -> None:
    about = json.loads((elastic / "nestling.json").read_text())
    about["budgets"]["Small"] |= {"tokens": 12_345}
    (elastic / "nestling.json").write_text(json.dumps(about | {"provenance": {"samples": 9}}))
    nestling.slice(elastic, "sMALL", tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "as `Small`" in card
    assert "tokens of elastic training at this size: 12,345" in card
    assert "was not trained itself" not in card


@pytest.mark.parametrize("name", ["nvidia/x\nlicense: mit", "a/b: c", "a/b#c", "/tmp/x", "../x", [1]])
def test_only_a_name_of_the_hub_is_the_base_of_a_card(elastic: Path, tmp_path: Path, name: Any) -> None:
    config = json.loads((elastic / "config.json").read_text())
    for path, base in ((name, None), ("nvidia/Nano_9B-v2.1", "nvidia/Nano_9B-v2.1")):
        (elastic / "config.json").write_text(json.dumps(config | {"_name_or_path": path}))
        nestling.slice(elastic, "Small", tmp_path / "cut", overwrite=True)
        front = yaml.safe_load((tmp_path / "cut" / "README.md").read_text().split("---\n")[1])
        assert (front.get("base_model"), "license" in front) == (base, False)


def test_a_slice_without_attention_says_what_it_cannot(elastic: Path, tmp_path: Path) -> None:
    plan = plan_slices(elastic, {tmp_path / "without": {"layers": [0, 1, 2]}, tmp_path / "with": {"layers": [0, 3]}})
    plan.write()
    assert [output.attends for output in plan.outputs.values()] == [False, True]
    assert "use_cache=False only" in (tmp_path / "without" / "README.md").read_text()
    assert "use_cache" not in (tmp_path / "with" / "README.md").read_text()
    with pytest.raises(ValueError, match="Attention"):  # what the card warns of
        stock.load(tmp_path / "without")(stock.tokens(31))


def test_a_wish_is_recorded_as_it_was_wished(elastic: Path, tmp_path: Path) -> None:
    spelled = nestling.slice(elastic, "75%", tmp_path / "cut")
    record = json.loads((tmp_path / "cut" / "nestling-slice.json").read_text())
    assert record["budget"] == "75%"
    assert record["submodel"] == spelled.to_json()
    assert 0.98 * 0.75 <= record["parameters"] / parameters(MODEL) <= 0.75
    assert verify(tmp_path / "cut", elastic)
    assert nestling.load(elastic)["75%"].submodel == complete(MODEL, spelled)
    (elastic / "nestling.json").unlink()
    with pytest.raises(NestlingError, match=r"no budget '75%'; allowed: 100%; for other sizes rank it first"):
        nestling.slice(elastic, "75%", tmp_path / "other")


# ---- when it goes wrong


def test_an_output_on_the_source_is_refused(elastic: Path, tmp_path: Path) -> None:
    before = files(elastic)
    (tmp_path / "link").symlink_to(elastic)
    for out in (elastic, tmp_path / "link", elastic / "." / ".." / "elastic"):
        with pytest.raises(NestlingError, match="is the checkpoint that is cut"):
            nestling.slice(elastic, "small", out, overwrite=True)
    with pytest.raises(NestlingError, match="lies inside the checkpoint that is cut"):
        nestling.slice(elastic, "small", elastic / "deep" / "er")
    assert files(elastic) == before


def test_a_disk_without_room_is_said_before_a_byte_is_written(elastic: Path, tmp_path: Path) -> None:
    usage = mock.Mock(return_value=mock.Mock(free=1000))
    with mock.patch.object(slicing.shutil, "disk_usage", usage), pytest.raises(NestlingError, match="disk is too full"):
        nestling.slice(elastic, "small", tmp_path / "deep" / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["elastic"]


def test_interrupted_at_any_byte_nothing_is_left(elastic: Path, tmp_path: Path) -> None:
    plan = plan_slices(elastic, {tmp_path / "a": "large", tmp_path / "b": "small"}, shard_bytes=4000)
    draw = random.Random(0)
    for error in (KeyboardInterrupt, OSError, MemoryError) * 4:
        limit, told = draw.randrange(plan.nbytes), 0

        def advance(count: int, error: Any = error, limit: int = limit) -> None:
            nonlocal told
            told += count
            if told > limit:
                raise error

        with pytest.raises((error, NestlingError)):
            plan.write(advance)
        assert [path.name for path in tmp_path.iterdir()] == ["elastic"]


KILLED = """
import os, signal, sys
from nestling.weights import slicing

limit, told = int(sys.argv[1]), 0
def advance(count):
    global told
    told += count
    if told > limit:
        os.kill(os.getpid(), signal.SIGKILL)
slicing.plan_slices(sys.argv[2], {sys.argv[3]: "large"}, shard_bytes=4000).write(advance)
"""


def test_killed_at_random_bytes_no_output_has_its_name_and_the_next_run_cleans_up(
    elastic: Path, tmp_path: Path
) -> None:
    total, draw = plan_slices(elastic, {tmp_path / "out": "large"}).nbytes, random.Random(1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):
        command = [sys.executable, "-c", KILLED, str(draw.randrange(total)), str(elastic), str(tmp_path / "out")]
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    nestling.slice(elastic, "large", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elastic", "out"]
    assert verify(tmp_path / "out", elastic)


@pytest.mark.parametrize("damage", ["truncated", "missing tensor", "wrong shape", "huge header"])
def test_a_damaged_source_is_named_and_nothing_is_left(elastic: Path, tmp_path: Path, damage: str) -> None:
    file = elastic / "model.safetensors"
    stored = stock.tensors(elastic)
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 7)
    elif damage == "huge header":
        file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])
    else:
        value = stored.pop("backbone.layers.3.mixer.q_proj.weight")
        if damage == "wrong shape":
            stored["backbone.layers.3.mixer.q_proj.weight"] = value[:, :-1].contiguous()
        save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(NestlingError, match=str(elastic)):
        nestling.slice(elastic, "small", tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["elastic"]


def test_a_flipped_bit_is_found_by_verify(elastic: Path, tmp_path: Path) -> None:
    nestling.slice(elastic, "small", tmp_path / "cut")
    file, draw = tmp_path / "cut" / "model.safetensors", random.Random(2)
    good = file.read_bytes()
    for _ in range(20):
        bad = bytearray(good)
        bad[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(NestlingError, match="model.safetensors|tensor"):
            verify(tmp_path / "cut")
    file.write_bytes(good)
    assert verify(tmp_path / "cut", elastic)


def test_a_writer_that_fails_in_any_way_is_heard_of(elastic: Path, tmp_path: Path) -> None:
    with (
        mock.patch.object(os, "pwrite", side_effect=MemoryError),
        pytest.raises(NestlingError, match="MemoryError"),
    ):
        nestling.slice(elastic, "large", tmp_path / "cut")
    assert not list(tmp_path.glob("*cut*"))


def test_where_the_system_cannot_read_ahead_slices_are_cut_all_the_same(elastic: Path, tmp_path: Path) -> None:
    with mock.patch.object(os, "posix_fadvise", side_effect=OSError(22, "Invalid argument"), create=True) as asked:
        nestling.slice(elastic, "large", tmp_path / "cut")
    assert asked.called
    assert verify(tmp_path / "cut", elastic)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells files by their handles")
@pytest.mark.parametrize("flush", [False, True])
def test_every_file_is_on_the_disk_before_a_slice_appears_if_that_is_asked(
    elastic: Path, tmp_path: Path, flush: bool
) -> None:
    """And none is waited for otherwise: beside weights that are being written out it takes long."""
    synced: dict[str, tuple[int, bool]] = {}

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced[path.name] = path.stat().st_size, (tmp_path / "cut").exists()

    with mock.patch.object(os, "fsync", fsync):
        plan_slices(elastic, {tmp_path / "cut": "large"}, shard_bytes=4000, flush=flush).write()
    files = {path.name: (path.stat().st_size, False) for path in (tmp_path / "cut").iterdir()}
    assert len(files) > 5
    assert {name: synced.get(name) for name in files} == (files if flush else dict.fromkeys(files))
    assert (tmp_path.name in synced) == flush


def test_weights_that_were_put_there_later_are_found(elastic: Path, tmp_path: Path) -> None:
    nestling.slice(elastic, "large", tmp_path / "cut", shard_bytes=4000)
    nestling.slice(elastic, "large", tmp_path / "other")
    (tmp_path / "cut" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(NestlingError, match=r"model\.safetensors: was not written here"):
        verify(tmp_path / "cut")


def test_a_slice_of_a_slice_is_found_in_it_after_a_move(elastic: Path, tmp_path: Path) -> None:
    nestling.slice(elastic, {"layers": [1, 2, 5]}, tmp_path / "a")
    nestling.slice(tmp_path / "a", {"layers": [0, 2]}, tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert verify(tmp_path / "b", tmp_path / "moved")


def test_outputs_inside_one_another_are_refused(elastic: Path, tmp_path: Path) -> None:
    for other in (tmp_path / "n" / "k", tmp_path / "x" / ".." / "n"):
        with pytest.raises(NestlingError, match="one holds the other"):
            plan_slices(elastic, {tmp_path / "n": "large", other: "small"})
