"""lm-evaluation-harness's own API models against our server: what our class says of the same size, word for word."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # of lm-eval[api]

from served import Served, save_family, serving  # noqa: E402

from nestling.evaluate.harness import register  # noqa: E402
from talking import lines  # noqa: E402

TASK = """
task: owls_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e", "\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    save_family(directory)
    with serving(directory) as running:
        yield running
        assert running.empties()


@pytest.fixture
def evaluate(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a model with arguments: the texts that it wrote."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    records = [{"question": word * 3, "answer": "x"} for word in ("owl ", "nest ", "egg ", "żółw ", "12 ")]
    (tmp_path / "owls.yaml").write_text(TASK.format(file=lines(tmp_path / "owls.jsonl", records)))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def texts(model: str, arguments: dict[str, Any], chat: bool) -> list[Any]:
        found = simple_evaluate(
            model, arguments, tasks=["owls_write"], batch_size=1, task_manager=manager, device="cpu",
            bootstrap_iters=0, apply_chat_template=chat,
        )  # fmt: skip
        return [sample["resps"] for sample in sorted(found["samples"]["owls_write"], key=lambda one: one["doc_id"])]

    return texts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "path", "more"),
    [
        ("local-chat-completions", "chat/completions", {}),
        ("local-completions", "completions", {"tokenizer_backend": "huggingface"}),
    ],
)
@pytest.mark.parametrize("size", ["large", "small"])
def test_a_size_writes_over_the_api_what_our_class_says(
    served: Served, evaluate: Any, model: str, path: str, more: dict[str, Any], size: str
) -> None:
    register()
    directory, chat = str(served.family.elastic.checkpoint.path), path.startswith("chat")
    asked = {"model": f"tiny@{size}", "base_url": f"{served.url}/v1/{path}", "max_retries": 1, **more}
    if more:
        asked["tokenizer"] = directory
    written = evaluate(model, asked, chat)
    assert written == evaluate("nestling", {"path": directory, "budget": size}, chat)
    assert len({str(one) for one in written}) > 1
