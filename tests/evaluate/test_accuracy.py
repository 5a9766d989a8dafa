"""Accuracy: counted right, the same items for every model, honest intervals."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("reasoning_gym")

import nestling
import stock
from nestling.arch.submodel import Submodel
from nestling.errors import NestlingError
from nestling.evaluate import accuracy as module
from nestling.evaluate.accuracy import Accuracy, accuracy
from nestling.evaluate.estimates import wilson
from nestling.evaluate.stock import load_stock
from nestling.tasks import Task, distinct, is_held_out, problems
from nestling.tokenizer import character_tokenizer, save_tokenizer
from nestling.weights.elastic import open_elastic, sidecar
from nestling.weights.files import write_json

SUMS = Task.parse("chain_sum:min_terms=2,max_terms=3,max_digits=2")
TINY = replace(stock.TINY, time_step_min=1e-6)
HALF = Submodel(hidden_size=10, intermediate_size=16, mamba_num_heads=2)


def judge(answer: module.Answer, count: int = 20, batch: int = 7, seed: int = 3) -> Accuracy:
    return accuracy(answer, SUMS, backend="fake", count=count, batch=batch, seed=seed, title="evaluate")


# ---- counting


def test_a_calculator_solves_everything_and_a_liar_nothing() -> None:
    asked: list[str] = []

    def calculator(prompts: Sequence[str]) -> tuple[list[str], int]:
        asked.extend(prompts)
        return [str(eval(prompt.removesuffix("="))) for prompt in prompts], 2 * len(prompts)

    result = judge(calculator)
    assert (result.exact_match, result.correct, result.problems) == (1.0, 20, 20)
    assert asked == [problem.prompt for problem in distinct(problems(SUMS, 3, held_out=True), 20)]
    assert all(is_held_out(prompt) for prompt in asked)
    assert [output["prompt"] for output in result.outputs] == asked
    assert all(output["correct"] and output["expected"].endswith(output["generated"]) for output in result.outputs)
    assert result.tokens_per_second > 0
    assert result.task == str(SUMS)
    wrong = judge(lambda prompts: ([str(eval(prompt.removesuffix("=")) + 1) for prompt in prompts], 1))
    assert (wrong.exact_match, wrong.correct, wrong.interval[0]) == (0.0, 0, pytest.approx(0, abs=1e-12))


def test_each_output_is_judged_on_its_own_whatever_the_batches() -> None:
    def every_third(prompts: Sequence[str]) -> tuple[list[str], int]:
        return [str(eval(p[:-1]) + (len(p) % 3 == 0)) for p in prompts], 1

    results = [judge(every_third, batch=batch) for batch in (1, 6, 7, 20, 99)]
    flags = [output["correct"] for output in results[0].outputs]
    assert flags == [len(output["prompt"]) % 3 != 0 for output in results[0].outputs]
    assert 0 < sum(flags) < 20
    for result in results:
        assert result.outputs == results[0].outputs
        assert result.exact_match == sum(flags) / 20
        assert result.interval == wilson(sum(flags), 20)
    assert json.loads(json.dumps(results[0].to_json()))["correct"] == sum(flags)


def test_every_model_of_a_seed_gets_the_same_problems() -> None:
    silent = [judge(lambda prompts: ([""] * len(prompts), 0), seed=seed).outputs for seed in (3, 3, 4)]
    assert silent[0] == silent[1] != silent[2]


# ---- stock transformers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("accuracy")
    stock.save(TINY, directory / "elastic", seed=2)
    save_tokenizer(character_tokenizer(), directory / "elastic")
    elastic = open_elastic(directory / "elastic")
    budgets = {"100%": Submodel(), "50%": elastic.submodel(HALF)}
    write_json(directory / "elastic" / "nestling.json", sidecar(TINY, budgets, {}))
    nestling.slice(directory / "elastic", "50%", directory / "half")
    return directory


def test_a_tokenizer_without_a_padding_token_will_do(checkpoint: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(checkpoint / "half", tmp_path / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    (bare / "generation_config.json").write_text('{"eos_token_id": 1}')
    prompts = [problem.prompt for problem in distinct(problems(SUMS, 0, held_out=True), 8)]
    assert module.stock(bare, 6)(prompts)[0] == module.stock(checkpoint / "half", 6)(prompts)[0]


def test_stock_refuses_a_directory_that_it_would_fill_with_chance(checkpoint: Path, tmp_path: Path) -> None:
    stored = stock.tensors(checkpoint / "half")
    stored["backbone.layers.9.norm.weight"] = stored.pop("backbone.layers.0.norm.weight")
    broken = stock.write(tmp_path / "b", json.loads((checkpoint / "half" / "config.json").read_text()), stored)
    save_tokenizer(character_tokenizer(), broken)
    with pytest.raises(NestlingError, match="did not load"):
        load_stock(broken)


def test_without_a_tokenizer_stock_refuses(checkpoint: Path, tmp_path: Path) -> None:
    written = json.loads((checkpoint / "half" / "config.json").read_text())
    stock.write(tmp_path / "m", written, stock.tensors(checkpoint / "half"))
    with pytest.raises(NestlingError, match="has no tokenizer"):
        module.stock(tmp_path / "m", 4)


# ---- intervals


@given(count=st.integers(1, 2000), share=st.floats(0, 1))
def test_wilsons_ends_are_where_the_score_test_just_rejects(count: int, share: float) -> None:
    correct = round(share * count)
    low, high = wilson(correct, count)
    assert -1e-12 <= low <= correct / count + 1e-12
    assert correct / count - 1e-12 <= high <= 1 + 1e-12
    for end in (low, high):
        inside = min(max(end, 0.0), 1.0)
        gap, sigma = abs(correct / count - inside), math.sqrt(inside * (1 - inside) / count)
        assert gap == pytest.approx(1.959964 * sigma, abs=1e-7)


def test_wilson_of_known_figures() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@pytest.mark.parametrize("count", [10, 50, 200])
def test_wilson_covers_the_truth_about_as_often_as_it_says(count: int) -> None:
    intervals = [wilson(correct, count) for correct in range(count + 1)]
    coverage = []
    for truth in (place / 100 for place in range(5, 96)):
        chances = [math.comb(count, k) * truth**k * (1 - truth) ** (count - k) for k in range(count + 1)]
        covered = (chance for chance, (low, high) in zip(chances, intervals, strict=True) if low <= truth <= high)
        coverage.append(sum(covered))
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.88
