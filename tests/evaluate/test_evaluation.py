"""Evaluations: the same whatever the batches and stops, a view judged as its slice in stock, bad input refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from nestling.errors import NestlingError
from nestling.evaluate.answers import Verdict
from nestling.evaluate.chat import Chat
from nestling.evaluate.evaluation import Evaluation, make_tasks, say, slug
from nestling.evaluate.solving import Problem, Solving
from nestling.evaluate.spec import parse_tasks
from nestling.evaluate.subject import Sampling, Subject, open_subjects
from nestling.evaluate.suite import Overrides
from talking import family, scripted, subject

SUMS = "chain_sum:min_terms=2,max_terms=3,max_digits=2"
GCD = "gcd:max_numbers=2,max_value=20"
DRAWN = Overrides(problems=9, samples=3, temperature=1.0, max_tokens=5, ks=(2,))
GREEDY = Overrides(problems=11, max_tokens=5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation")
    family(directory)
    return directory


def evaluate(
    home: Path, out: Path, task: str = SUMS, given: Overrides = GREEDY, batch: int = 4, budget: str = "50%", **more: Any
) -> dict[str, Any]:
    tasks = make_tasks(parse_tasks([task]), given, 0)
    subjects = more.pop("subjects", None) or open_subjects(home / "elastic", [budget])
    (result,) = Evaluation(tasks, subjects, out, batch, 0, **more).run(lambda result: None)
    return result


def outputs(out: Path) -> dict[tuple[int, int], dict[str, Any]]:
    (file,) = out.rglob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    found = {(record["item"], record["sample"]): record for record in records}
    assert len(found) == len(records)
    return {key: {k: v for k, v in record.items() if k != "seconds"} for key, record in found.items()}


# ---- the same whatever


def test_batched_is_one_at_a_time_in_any_order(home: Path, tmp_path: Path) -> None:
    for batch in (1, 4, 50):
        evaluate(home, tmp_path / str(batch), batch=batch)
    first = outputs(tmp_path / "1")
    assert len({len(record["prompt"]) for record in first.values()}) > 1
    assert len({record["generated"] for record in first.values()}) > 1
    assert outputs(tmp_path / "4") == outputs(tmp_path / "50") == first
    tasks = make_tasks(parse_tasks([SUMS]), GREEDY, 0)
    assert isinstance(tasks[0], Solving)
    backwards = replace(tasks[0], problems=tasks[0].problems[::-1])
    Evaluation([backwards], open_subjects(home / "elastic", ["50%"]), tmp_path / "back", 4, 0).run(lambda result: None)
    assert {r["prompt"]: r["generated"] for r in outputs(tmp_path / "back").values()} == {
        r["prompt"]: r["generated"] for r in first.values()
    }


class Stopped(Exception):
    pass


def stopping(whole: Subject, after: int) -> Subject:
    """A subject that is interrupted in its (after + 1)-th batch."""
    calls: list[int] = []

    def continue_(*given: Any) -> list[list[int]]:
        calls.append(0)
        if len(calls) > after:
            raise Stopped
        return whole.continue_(*given)

    return replace(whole, continue_=continue_)


@pytest.mark.parametrize("given", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_resumed_is_uninterrupted_and_nothing_is_done_twice(home: Path, tmp_path: Path, given: Overrides) -> None:
    whole = evaluate(home, tmp_path / "whole", given=given)
    one = subject(home / "elastic")
    for after in (0, 1):
        with pytest.raises(Stopped):
            evaluate(home, tmp_path / "cut", given=given, subjects=[stopping(one, after)])
    (file,) = (tmp_path / "cut").rglob("*.jsonl")
    assert not list((tmp_path / "cut").rglob("*.json"))
    before = file.read_bytes()
    file.write_bytes(before[:-20])  # the last line is torn
    kept = before.rsplit(b"\n", 2)[0]
    again = evaluate(home, tmp_path / "cut", given=given)
    assert file.read_bytes().startswith(kept)
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    timed = {"tokens_per_second"}
    for result in (whole, again):
        result["result"] = {k: v for k, v in result["result"].items() if k not in timed}
    assert again["result"] == whole["result"]
    evaluate(home, tmp_path / "cut", given=given, subjects=[stopping(one, 0)])  # all is known: nothing is asked


def test_drawn_answers_differ_and_the_seed_alone_decides(home: Path, tmp_path: Path) -> None:
    result = evaluate(home, tmp_path / "a", given=DRAWN)
    evaluate(home, tmp_path / "b", given=DRAWN, batch=7)
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
    assert len({record["generated"] for record in outputs(tmp_path / "a").values()}) > 20
    assert (result["result"]["samples"], set(result["result"]["pass_at"])) == (3, {"1", "2"})


def test_a_changed_setting_is_noticed(home: Path, tmp_path: Path) -> None:
    evaluate(home, tmp_path)
    with pytest.raises(NestlingError, match=r"sampling\.max_tokens was 5 and is 6"):
        evaluate(home, tmp_path, given=replace(GREEDY, max_tokens=6))
    changed = replace(subject(home / "elastic"), files={"model.safetensors": "other"})
    with pytest.raises(NestlingError, match=r"files\.config\.json was"):
        evaluate(home, tmp_path, subjects=[changed])
    evaluate(home, tmp_path, given=replace(GREEDY, max_tokens=6), overwrite=True)


# ---- inside the family and outside


def test_a_view_is_judged_as_its_slice_in_stock_item_by_item(home: Path, tmp_path: Path) -> None:
    for budget, directory in (("50%", "half"), ("100%", "elastic")):
        inside = evaluate(home, tmp_path / f"in-{directory}", budget=budget)
        theirs = open_subjects(home / directory, [], "transformers")
        outside = evaluate(home, tmp_path / f"out-{directory}", subjects=theirs)
        assert outputs(tmp_path / f"in-{directory}") == outputs(tmp_path / f"out-{directory}")
        assert inside["model"]["backend"] == "nestling"
        assert outside["model"]["backend"] == "transformers"
        assert inside["model"]["parameters"] == outside["model"]["parameters"]
        assert inside["result"]["score"] == outside["result"]["score"]
    assert outputs(tmp_path / "in-half") != outputs(tmp_path / "in-elastic")


def test_any_of_several_end_tokens_ends_an_answer_as_in_stock(tmp_path: Path) -> None:
    """Chat models end a turn and a text with tokens of their own."""
    family(tmp_path)
    ids = [[5, 9, 30], [40, 7]]
    free = subject(tmp_path / "elastic").continue_(ids, Sampling(max_tokens=8), [0, 0])
    late = next(token for token in free[0] if token != free[0][0])
    for directory in ("elastic", "half"):
        (tmp_path / directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, late]}))
    (stocks,) = open_subjects(tmp_path / "half", [], "transformers")
    for one in (subject(tmp_path / "elastic"), stocks):
        rows = one.continue_(ids, Sampling(max_tokens=8), [0, 0])
        assert rows == [list(takewhile(lambda token: token != late, row)) for row in free]
        assert len(rows[0]) < len(free[0])


def test_results_that_would_have_one_file_are_refused_before_any_is_made(home: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "m.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    specs = parse_tasks([f"math:file={tmp_path / place / 'm.jsonl'}" for place in ("a", "b")])
    tasks = make_tasks(specs, replace(GREEDY, problems=1), 0)
    with pytest.raises(NestlingError, match="two results would be .*math-file-m.jsonl.json"):
        Evaluation(tasks, [subject(home / "elastic")], tmp_path / "out", 4, 0, overwrite=True).run(lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_verifier_that_breaks_on_an_answer_counts_it_as_wrong(home: Path, tmp_path: Path) -> None:
    tell = scripted(subject(home / "elastic"), lambda prompt: "Answer: two times seven")
    result = evaluate(
        home, tmp_path, "prime_factorization", replace(GREEDY, problems=2, max_tokens=40), subjects=[tell]
    )
    assert (result["result"]["correct"], result["result"]["no_answer"]) == (0, 0)
    assert {record["answer"] for record in outputs(tmp_path).values()} == {"two times seven"}
    assert all("cannot be judged" in record["note"] for record in outputs(tmp_path).values())


def test_any_model_that_transformers_loads_can_be_judged(home: Path, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import talking

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=260, bos_token_id=2, eos_token_id=1, pad_token_id=0, **shape))
    model.save_pretrained(tmp_path / "llama")
    talking.save_tokenizer(tmp_path / "llama")
    for batch in (1, 5):
        subjects = open_subjects(tmp_path / "llama", [])
        result = evaluate(home, tmp_path / str(batch), batch=batch, subjects=subjects)
    assert result["model"]["name"] == "llama"
    assert outputs(tmp_path / "1") == outputs(tmp_path / "5")
    with pytest.raises(NestlingError, match="--budget does not apply"):
        open_subjects(tmp_path / "llama", ["50%"])
    with pytest.raises(NestlingError, match="is of another architecture than nemotron_h, which --backend nestling"):
        open_subjects(tmp_path / "llama", [], "nestling")


# ---- counted


def tally(says: Callable[[str], str], problems: int = 12, **how: Any) -> Solving:
    asked = [Problem(f"{n} squared is", str(n * n)) for n in range(problems)]

    def judge(problem: Problem, text: str) -> Verdict:
        return Verdict(text.strip() or None, float(text.strip() == problem.expected))

    return Solving("squares", asked, judge, Sampling(max_tokens=8), **how)


def test_right_wrong_missing_and_endless_answers_are_counted(home: Path, tmp_path: Path) -> None:
    def says(prompt: str) -> str:
        number = int(prompt.split()[0])
        return ["", "no end to this", "wrong"][number] if number < 3 else str(number**2)

    one = scripted(subject(home / "elastic"), says)
    (result,) = Evaluation([tally(says)], [one], tmp_path, 5, 0).run(lambda result: None)
    found = result["result"]
    assert (found["correct"], found["problems"], found["score"]) == (9, 12, 0.75)
    assert (found["no_answer"], found["cut_off"]) == (1, 1)
    assert "1 without an answer, 1 cut off at the token limit" in say(result)
    records = outputs(tmp_path)
    assert records[1, 0]["generated"] == "no end t"
    assert records[5, 0]["expected"] == records[5, 0]["generated"] == "25"
    assert json.loads(next(tmp_path.rglob("*.json")).read_text()) == result
    assert {"files", "sampling", "submodel", "asked"} <= set(result["settings"])
    assert {"date", "versions", "machine", "seed"} <= set(result)


def test_reasoning_that_never_ends_is_no_answer(home: Path, tmp_path: Path) -> None:
    one = scripted(subject(home / "elastic"), lambda prompt: "<think>9</think>9" if prompt[0] == "3" else "<think>4")
    task = replace(tally(lambda prompt: ""), sampling=Sampling(max_tokens=40))
    (result,) = Evaluation([task], [one], tmp_path, 5, 0).run(lambda result: None)
    assert (result["result"]["correct"], result["result"]["no_answer"]) == (1, 11)


def test_prompts_go_through_the_chat_template_where_there_is_one(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}<off>{% endif %}<assistant><think>"
    )
    family(tmp_path, template=template)
    for chat, start in (
        (Chat(), "<user>Find"),
        (Chat(system="Be brief."), "<system>Be brief.<user>Find"),
        (Chat(use=False), "Find"),
    ):
        evaluate(tmp_path, tmp_path / start[1:5], GCD, replace(GREEDY, chat=chat, problems=2))
        record = outputs(tmp_path / start[1:5])[0, 0]
        assert record["prompt"].startswith(start)
        assert (record["answer"] is None) == chat.renders(tmp_path / "elastic")  # it begins to think, and never ends
    assert "<off>" in Chat(thinking=False).render(tmp_path / "elastic", "x")


# ---- bad input


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("gcds", GREEDY, "unknown task 'gcds'; did you mean 'gcd'"),
        ("maths-500", GREEDY, "did you mean 'math-500'"),
        ("gcd:numbers=2", GREEDY, "numbers"),
        ("gcd:samples=0", GREEDY, "samples=0 must be a number"),
        ("math-500", GREEDY, "needs the data of HuggingFaceH4/MATH-500: math-500:file=PATH, with problem, answer"),
        ("perplexity", GREEDY, "task perplexity needs a file"),
        ("gcd", replace(GREEDY, samples=3), "3 samples at temperature 0 are all the same"),
        ("gcd", replace(GREEDY, temperature=float("nan")), "temperature = nan must be 0 or above"),
        ("gcd", replace(DRAWN, ks=(4,)), "pass@4 needs at least 4 samples"),
        ("chain_sum:min_terms=2,max_terms=2,max_digits=1", replace(GREEDY, problems=60), "has only about"),
        ("", GREEDY, "name a task"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(task: str, given: Overrides, words: str) -> None:
    with pytest.raises(NestlingError, match=words):
        make_tasks(parse_tasks([task]), given, 0)


def test_names_of_files() -> None:
    assert slug("50%") == "50"
    (spec,) = parse_tasks(["math-500:file=/a/b c/m.jsonl,samples=4"])
    assert spec.label == "math-500:file=m.jsonl,samples=4"
    assert slug(spec.label) == "math-500-file-m.jsonl-samples-4"
    assert slug("%") == "model"
