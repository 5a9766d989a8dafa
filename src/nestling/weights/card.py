"""The model card of a slice: what it is, what it was cut from, how that was made, how good it is, how to load it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nestling.arch.architecture import Architecture
from nestling.arch.cost import Cost, cost
from nestling.arch.submodel import Submodel, standalone
from nestling.units import decimal
from nestling.weights.elastic import Elastic

NO_ATTENTION = (
    "No attention layer is kept: stock transformers then runs it with use_cache=False only, and cannot generate."
)
TIED = (
    "output head is tied to the embeddings, which transformers does not do for nemotron_h: it makes up a head. After "
    "loading it there: model.lm_head.weight = model.get_input_embeddings().weight."
)
ODD_EXPERTS = (
    "hidden_size or moe_intermediate_size is no multiple of 8, which transformers' default for experts needs; load it "
    'with experts_implementation="eager".'
)
_HASH = re.compile("[0-9a-f]{32,64}")
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


def model_card(elastic: Elastic, record: Mapping[str, Any]) -> str:
    """README.md of a slice, in Markdown. record: the content of its nestling-slice.json."""
    submodel = Submodel.from_json(record["submodel"])
    parts = [
        _front_matter(elastic.checkpoint.path, elastic.checkpoint.config),
        f"# {_title(elastic, record)}\n\n{_summary(elastic, record)}",
        f"## Sizes\n\n{_sizes(elastic, submodel)}",
        f"## How it was made\n\n{_making(elastic, record)}",
        *([f"## Accuracy\n\n{rows}"] if (rows := _accuracy(elastic, record)) else []),
        f"## Use\n\n{_use(elastic, record)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(source: Path, config: Mapping[str, Any]) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [nestling, nemotron_h]"]
    name = config.get("_name_or_path")
    if isinstance(name, str) and _HUB_NAME.fullmatch(name):
        lines.append(f"base_model: {name}")
    return "\n".join(["---", *lines, *_licence(source / "README.md"), "---"])


def _licence(readme: Path) -> list[str]:
    """The licence lines of the parent's own card: its terms go along."""
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return []
    return [line for line in text[4 : text.index("\n---", 4)].splitlines() if line.startswith("license")]


def _title(elastic: Elastic, record: Mapping[str, Any]) -> str:
    return f"{elastic.checkpoint.path.resolve().name}, {record['budget'] or 'a size of its own'}"


def _summary(elastic: Elastic, record: Mapping[str, Any]) -> str:
    whole = cost(elastic.architecture, elastic.submodel(None)).parameters
    share = record["parameters"] / whole
    made = f"A standalone model of {record['parameters']:,} parameters, {share:.1%} of the model it was cut out of"
    held = {
        "pad": " Layers narrower than the widest are filled up with zeros, which changes no output.",
        "code": " Its layers have sizes of their own, which the Python files beside the weights build.",
    }.get(record["hetero"], "")
    alone = "" if record.get("attends", True) else f" {NO_ATTENTION}"
    odd = "" if _shape(elastic, record).groupable else f" Its {ODD_EXPERTS}"
    tied = "" if elastic.architecture.untied else f" Its {TIED}"
    return f"{made}, with no further training ({record['by']}).{held}{alone}{odd}{tied}"


def _shape(elastic: Elastic, record: Mapping[str, Any]) -> Architecture:
    return standalone(elastic.architecture, Submodel.from_json(record["submodel"]))


def _sizes(elastic: Elastic, submodel: Submodel) -> str:
    whole = elastic.submodel(None)
    columns = [dict(_figures(elastic, member)) for member in (submodel, whole)]
    rows = [f"| {key} | {columns[0].get(key, 'none')} | {value} |" for key, value in columns[1].items()]
    return "\n".join(["| | this model | the whole |", "|---|---:|---:|", *rows])


def _figures(elastic: Elastic, member: Submodel) -> Iterator[tuple[str, str]]:
    costs: Cost = cost(elastic.architecture, member)
    kinds = Counter(elastic.architecture.hybrid_override_pattern[layer] for layer in member.layers or ())
    names = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "mixture of experts"}
    yield "parameters", f"{costs.parameters:,}"
    if costs.active_parameters != costs.parameters:
        yield "active per token", f"{costs.active_parameters:,}"
    yield "weights in bf16", decimal(costs.bytes)
    yield "layers", ", ".join(f"{kinds[kind]} {name}" for kind, name in names.items() if kinds[kind])
    for field, value in member.given().items():
        if field != "layers":
            yield f"`{field}`", f"{min(value):,} … {max(value):,}" if isinstance(value, tuple) else f"{value:,}"


def _making(elastic: Elastic, record: Mapping[str, Any]) -> str:
    made = record["provenance"]
    lines = [f"- Cut out of `{record['source']}`" + (f" as `{record['budget']}`" if record["budget"] else "")]
    lines += [
        f"- {key}: {_plain(value)}"
        for key, value in made.items()
        if key not in ("by", "source", "recipe", "trained_tokens")
    ]
    lines += ["- recipe: in `nestling-slice.json`, under provenance"] if "recipe" in made else []
    budget = elastic.sidecar.get("budgets", {}).get(record["budget"] or "", {})
    if budget.get("tokens"):
        lines.append(f"- tokens of elastic training at this size: {budget['tokens']:,}")
    elif made and record["budget"] not in elastic.sidecar.get("budgets", {}):
        lines.append("- This size lies between trained ones, or below them: it was not trained itself.")
    if not made:
        lines.append(
            "- The source was not ranked by Nestling: this size keeps the first part of every axis as it stood."
        )
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """Nested settings in one line, hashes short."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return f"{value[:12]}…" if isinstance(value, str) and _HASH.fullmatch(value) else str(value)


def _accuracy(elastic: Elastic, record: Mapping[str, Any]) -> str:
    """The evaluations that are recorded for this budget in the elastic checkpoint."""
    found = elastic.sidecar.get("budgets", {}).get(record["budget"] or "", {}).get("evaluations", [])
    rows = [f"| {row['task']} | {' | '.join(_judged(row))} | {row['backend']} |" for row in found]
    head = ["| task | score | 95 % interval | over | judged in |", "|---|---:|---:|---:|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def _judged(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Score, interval, and over how much."""
    ends = row["interval"] or ()
    if "perplexity" in row:
        over = f"{row.get('documents', 0):,} documents"
        return f"perplexity {row['perplexity']:.2f}", " – ".join(f"{end:.2f}" for end in ends), over
    over = f"{row.get('problems', 0):,} problems"
    return f"{row.get('exact_match', 0):.1%} solved", " – ".join(f"{end:.1%}" for end in ends), over


def _use(elastic: Elastic, record: Mapping[str, Any]) -> str:
    more, flag = (", trust_remote_code=True", " --trust-remote-code") if record["hetero"] == "code" else ("", "")
    if not _shape(elastic, record).groupable:
        more += ', experts_implementation="eager"'
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("DIRECTORY"{more})\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")\n```\n\n'
        f"or `vllm serve DIRECTORY{flag}`. `nestling verify DIRECTORY` checks that the files are as they were written."
    )
