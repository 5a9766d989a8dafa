"""lm-evaluation-harness: every size through our class gives what its slice gives through lm-eval's own `hf` class."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from nestling.errors import NestlingError
from nestling.evaluate.harness import register
from nestling.evaluate.harness_model import passage, until_first
from talking import family, lines

QUESTIONS = [("An owl is", "bird", "fish", 0), ("2 + 2 =", "4", "22222", 0), ("The egg", "flies", "breaks", 1)] * 4
TASKS = {
    "owls_choice": """
task: owls_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{number}}}} {{{{question}}}}"
doc_to_choice: choices
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "owls_text": """
task: owls_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
    "owls_write": """
task: owls_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} {{{{number}}}}"
doc_to_target: "{{{{choices[right]}}}}"
generation_kwargs: {{until: ["a", "\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("harness")
    family(directory)
    records = [
        {"number": n, "question": question, "choices": choices, "right": right, "long": f"{question} {n} " * (n + 1)}
        for n, (question, *choices, right) in enumerate(QUESTIONS)
    ]
    file = lines(directory / "owls.jsonl", records)
    (directory / "tasks").mkdir()
    for name, text in TASKS.items():
        (directory / "tasks" / f"{name}.yaml").write_text(text.format(file=file))
    return directory


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def evaluate(home: Path, model: str, arguments: dict[str, Any], batch: int = 3) -> dict[str, Any]:
    register()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
    return simple_evaluate(
        model, arguments, tasks=list(TASKS), batch_size=batch, task_manager=manager, device="cpu", bootstrap_iters=0
    )


def figures(results: dict[str, Any]) -> dict[str, str]:
    """Every number as lm-eval prints it, to four decimals."""
    return {
        f"{task} {name}": f"{value:.4f}"
        for task, found in results["results"].items()
        for name, value in found.items()
        if isinstance(value, float)
    }


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    return {task: [sample["filtered_resps"] for sample in found] for task, found in results["samples"].items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("offline")
def test_a_size_scores_as_its_slice_in_the_hf_class_to_the_last_digit(home: Path) -> None:
    for budget, directory in (("50%", "half"), ("100%", "elastic")):
        ours = evaluate(home, "nestling", {"path": str(home / "elastic"), "budget": budget, "max_length": 64})
        theirs = evaluate(home, "hf", {"pretrained": str(home / directory), "dtype": "float32", "max_length": 64})
        assert figures(ours) == figures(theirs)
        assert len(figures(ours)) == 4
        mine, stocks = answers(ours), answers(theirs)
        assert mine["owls_write"] == stocks["owls_write"]
        assert len({str(one) for one in mine["owls_write"]}) > 1
        for a, b in zip(mine["owls_choice"], stocks["owls_choice"], strict=True):
            assert [x[0] for x in a] == pytest.approx([x[0] for x in b], abs=1e-4)
            assert [x[1] for x in a] == [x[1] for x in b]
        assert [x[0] for x in mine["owls_text"]] == pytest.approx([x[0] for x in stocks["owls_text"]], rel=1e-5)
    alone = evaluate(home, "nestling", {"path": str(home / "elastic"), "max_length": 64}, batch=1)
    assert figures(alone) == figures(ours)


def test_long_contexts_are_cut_on_the_left() -> None:
    assert passage([1, 2, 3], [4, 5], 10).ids == (1, 2, 3, 4, 5)
    assert passage([1, 2, 3], [4, 5], 10).given == 3
    assert (passage([1, 2, 3], [4, 5], 2).ids, passage([1, 2, 3], [4, 5], 2).given) == ((3, 4, 5), 1)


def test_a_text_ends_before_its_first_stop() -> None:
    assert until_first("one two three", ["three", "two"]) == "one "
    assert until_first("one", ["", "x"]) == "one"


def test_a_budget_that_is_not_there_is_refused(home: Path) -> None:
    with pytest.raises(NestlingError, match="has no budget 'x'"):
        register()(path=str(home / "elastic"), budget="x")


@pytest.mark.parametrize(
    ("device", "asked"), [(None, "auto"), ("cpu", "cpu"), ("cuda:0", "cuda"), ("cuda:1", "cuda:1")]
)
def test_the_device_that_lm_eval_says(
    home: Path, monkeypatch: pytest.MonkeyPatch, device: str | None, asked: str
) -> None:
    """A GPU by its number is refused, unless it is the one that `cuda` means."""
    said: list[str] = []
    monkeypatch.setattr("nestling.model.device.find_device", lambda given, option: said.append(given) or "cpu")
    register()(path=str(home / "elastic"), device=device)
    assert said == [asked]


def test_lm_eval_finds_the_model_by_its_name_and_arguments(home: Path) -> None:
    register()
    from lm_eval.api.registry import get_model

    arguments = f"path={home / 'elastic'},budget=50%,max_length=64"
    model = get_model("nestling").create_from_arg_string(arguments, {"batch_size": "8", "device": None})
    assert (model.subject.name, model.max_length, model.batch) == ("50%", 64, 8)
    assert model.subject.about["parameters"] < 0.9 * register()(path=str(home / "elastic")).subject.about["parameters"]
