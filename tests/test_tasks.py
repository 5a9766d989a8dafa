"""Problems are right, held-out ones stay held out, verifiers accept and reject; the tokenizer is stock's."""

import ast
import string
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("reasoning_gym")

from nestling.errors import NestlingError
from nestling.tasks import ALPHABET, HELD_OUT, Problem, Task, distinct, is_held_out, problems, solves
from nestling.tokenizer import (
    EOS,
    PAD,
    character_tokenizer,
    encode,
    end_token,
    end_tokens,
    read_tokenizer,
    save_tokenizer,
)

SUMS = Task.parse("chain_sum:min_terms=2,max_terms=3,max_digits=2")
SIGNED = Task("chain_sum", (("allow_negation", True), ("max_terms", 5), ("min_terms", 1)))


def drawn(task: Task, seed: int, count: int, *, held_out: bool = False, start: int = 0) -> list[Problem]:
    return list(islice(problems(task, seed, held_out=held_out, start=start), count))


def running_sums(expression: str) -> list[int]:
    """What Python makes of the expression, from its innermost sum to the whole."""
    tree, values = ast.parse(expression, mode="eval").body, []
    while isinstance(tree, ast.BinOp):
        values.insert(0, eval(ast.unparse(tree)))
        tree = tree.left
    return values or [eval(ast.unparse(tree))]


# ---- problems


@pytest.mark.parametrize("task", [SUMS, SIGNED, Task("chain_sum")], ids=["sums", "signed", "default"])
def test_a_solution_is_the_running_sums_and_ends_with_the_answer(task: Task) -> None:
    for problem in drawn(task, 5, 300):
        assert problem.prompt.endswith("=")
        sums = running_sums(problem.prompt.removesuffix("="))
        assert problem.solution == ";".join(map(str, sums)), problem
        assert problem.entry["answer"] == str(sums[-1])
        assert set(problem.prompt + problem.solution) <= set(ALPHABET)


def test_options_shape_the_problems() -> None:
    assert Task("chain_sum", (("min_terms", 2), ("max_terms", 3), ("max_digits", 2))) == SUMS
    assert str(SUMS) == "chain_sum, min_terms 2, max_terms 3, max_digits 2"
    lengths = {len(running_sums(problem.prompt.removesuffix("="))) for problem in drawn(SUMS, 0, 200)}
    assert lengths == {1, 2}
    signs = str.maketrans("+-", "  ")
    assert {len(t) for p in drawn(SUMS, 0, 200) for t in p.prompt[:-1].translate(signs).split()} == {1, 2}


def test_problems_are_a_function_of_task_and_seed() -> None:
    assert drawn(SUMS, 3, 50) == drawn(SUMS, 3, 50)
    assert drawn(SUMS, 3, 50) != drawn(SUMS, 4, 50)
    together = {problem.prompt for problem in drawn(SUMS, 3, 300)}
    assert {problem.prompt for problem in drawn(SUMS, 3, 50, start=100)} <= together


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_no_training_problem_is_ever_a_held_out_one(seed: int) -> None:
    small = Task.parse("chain_sum:min_terms=2,max_terms=2,max_digits=1")  # 200 problems: every one is drawn often
    train = {p.prompt for task in (small, SUMS) for p in drawn(task, seed, 1500)}
    held = {p.prompt for other in (0, 1, 17) for task in (small, SUMS) for p in drawn(task, other, 300, held_out=True)}
    assert not train & held
    assert all(is_held_out(prompt) for prompt in held)
    every = [f"{a}{sign}{b}=" for a in range(10) for b in range(10) for sign in "+-"]
    assert train | held >= set(every)
    assert len(every) / HELD_OUT / 2 < sum(map(is_held_out, every)) < len(every) / HELD_OUT * 2


def test_distinct_problems_differ_and_come_in_order() -> None:
    asked = distinct(problems(SUMS, 0, held_out=True), 200)
    assert len({problem.prompt for problem in asked}) == 200
    assert asked[:50] == distinct(problems(SUMS, 0, held_out=True), 50)


def test_more_problems_than_there_are_is_refused() -> None:
    tiny = Task.parse("chain_sum:min_terms=2,max_terms=2,max_digits=1")
    with pytest.raises(NestlingError, match=r"only about \d\d held-out problems; 60 were asked for"):
        distinct(problems(tiny, 0, held_out=True), 60)


# ---- judging


def test_a_right_answer_is_full_marks_and_nothing_else_is() -> None:
    for problem in drawn(SUMS, 1, 50, held_out=True):
        right = int(problem.entry["answer"])
        assert solves(SUMS, problem, problem.solution)
        assert solves(SUMS, problem, f"0;{right}")  # only the answer is judged, not the way there
        for wrong in (f"{right + 1}", f"{right};{right - 1}", f"{right};", "", ";", "=", f"{right}=", f"x{right}", "-"):
            assert not solves(SUMS, problem, wrong), (problem, wrong)


@given(text=st.text(string.printable, max_size=12))
def test_any_text_can_be_judged(text: str) -> None:
    problem = drawn(SUMS, 1, 1)[0]
    last = text.rsplit(";", 1)[-1].strip().lstrip("+0").replace(",", "")
    if not last.startswith(problem.entry["answer"]):
        assert not solves(SUMS, problem, text)


# ---- bad tasks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chain_sums", "unknown task 'chain_sums'; did you mean 'chain_sum'?"),
        ("chain_sum:min_terms=two", "task option 'min_terms' needs an integer"),
        ("chain_sum:min_terms", "task option 'min_terms' needs an integer"),
        ("chain_sum:min_term=2", "has no option 'min_term'; did you mean 'min_terms'?"),
        ("chain_sum:min_terms=5,max_terms=2", "max_terms must be >= min_terms"),
    ],
)
def test_a_bad_task_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(NestlingError) as caught:
        next(problems(Task.parse(text), 0, held_out=False))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(character_tokenizer(), directory)
    return directory


def test_stock_transformers_reads_the_tokenizer_alike(saved: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(str(saved)), read_tokenizer(saved)
    assert (theirs.pad_token, theirs.eos_token, theirs.padding_side) == (PAD, EOS, "left")
    assert (theirs.pad_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, 16)
    texts = [problem.prompt + problem.solution for problem in drawn(SIGNED, 0, 40)] + [ALPHABET, "7", "--==;;"]
    for text in texts:
        ids = ours.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert len(ids) == len(text)
        assert ours.decode(ids) == theirs.decode(ids) == text
        with_specials = [0, 0, *ids, 1]
        assert ours.decode(with_specials) == theirs.decode(with_specials, skip_special_tokens=True) == text
    padded = theirs(["1+1=", "10+10="], padding=True)["input_ids"]
    assert padded == [[0, 0, *ours.encode("1+1=").ids], ours.encode("10+10=").ids]


def test_a_vocabulary_is_one_token_per_character() -> None:
    tokenizer = character_tokenizer()
    assert tokenizer.get_vocab_size() == 2 + len(ALPHABET) == 16
    assert sorted(tokenizer.encode(ALPHABET).ids) == list(range(2, 16))


def test_the_end_token_is_what_the_directory_says(saved: Path, tmp_path: Path) -> None:
    assert end_token(saved) == 1
    assert end_token(tmp_path) is None
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_token(tmp_path) == 7
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert end_token(tmp_path) == 5
    assert end_tokens(tmp_path) == (5, 6)


@pytest.mark.parametrize("text", ["1+1 =", "x", "1\n", "½", "1+<pad>"])
def test_unknown_characters_are_refused(text: str) -> None:
    with pytest.raises(NestlingError, match="characters that the model's tokenizer does not know"):
        encode(character_tokenizer(), text, 16)


def test_an_empty_prompt_and_a_foreign_vocabulary_are_refused() -> None:
    with pytest.raises(NestlingError, match="the prompt is empty"):
        encode(character_tokenizer(), "", 16)
    with pytest.raises(NestlingError, match="token 13 is outside the model's vocabulary of 10; wrong tokenizer"):
        encode(character_tokenizer(), "1-1", 10)
    assert encode(character_tokenizer(), "1-1", 16) == [3, 13, 3]


def test_a_directory_without_or_with_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(NestlingError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(tmp_path)
