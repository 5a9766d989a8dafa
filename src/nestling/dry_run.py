"""`nestling train --dry-run`: what a recipe would train, for how long and at what cost, read off the table alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nestling.arch.architecture import Architecture
from nestling.arch.cost import cost, parameters
from nestling.arch.nesting import even_picks, read_out
from nestling.arch.search import layer_order
from nestling.arch.submodel import WHOLE, Submodel, complete
from nestling.memory import memory
from nestling.plan import shape
from nestling.recipe import Recipe, budget_targets, parent_architecture, space_of
from nestling.sections import StageSection, TrainSection
from nestling.units import decimal, show_count

Figures = dict[str, Any]


def figures(recipe: Recipe) -> Figures:
    """Shapes, steps, tokens, FLOPs and memory of the elastic training of a recipe; None where a length is not known.

    The router will choose its own sizes: the ones here are an example, every axis cut alike, that meets each budget.
    """
    from nestling.model.device import prefers_gpu

    architecture, how = parent_architecture(recipe), recipe.train
    family, targets = example(architecture, how), budget_targets(architecture, how)
    stages = [stage_figures(architecture, how, family, index) for index in range(len(how.stages))]
    return {
        "title": recipe.title,
        "by_hand": bool(how.sizes),
        "budgets": {
            name: {
                "target": targets[name].value,
                "of": targets[name].of,
                "measured": targets[name].measure(architecture, submodel),
                "parameters": parameters(architecture, submodel),
                "shape": shape(architecture, submodel),
            }
            for name, submodel in family.items()
        },
        "stages": stages,
        "total": {key: _sum(stage[key] for stage in stages) for key in ("steps", "tokens", "flops")},
        "memory": memory(architecture, how, gpu=prefers_gpu(recipe.layout.device)),
    }


def example(architecture: Architecture, how: TrainSection) -> dict[str, Submodel]:
    """The sizes of [train.sizes]; else a nested family on budget, read out from sizes that are cut alike."""
    if how.sizes:
        by_hand = {name: Submodel.from_json(spec) for name, spec in how.sizes.items()}
        return {"100%": WHOLE, **{name: complete(architecture, size) for name, size in by_hand.items()}}
    space, targets = space_of(architecture, how), budget_targets(architecture, how)
    picks = {name: even_picks(space, target.share(architecture)) for name, target in targets.items()}
    order = layer_order(architecture, range(len(architecture.hybrid_override_pattern)))
    return read_out(architecture, order, space, targets, picks)


def stage_figures(architecture: Architecture, how: TrainSection, family: Mapping[str, Submodel], index: int) -> Figures:
    stage = how.stages[index]
    began = sum(before.steps for before in how.stages[:index])
    soft = min(max(how.router_steps - began, 0), stage.steps)
    shares = _shares(how, stage, family)
    known: Figures = {"steps": stage.steps, "batch": stage.batch, "length": stage.length, "router_steps": soft}
    if stage.length is None:
        return known | {"tokens": None, "teacher_tokens": None, "budget_tokens": None, "flops": None}
    step_tokens = stage.batch * stage.length
    tokens = stage.steps * step_tokens
    per_token = {name: forward_flops(architecture, submodel, stage.length) for name, submodel in family.items()}
    passes = 4 if how.activation_checkpointing else 3  # forward, two of them backward, and forward again
    whole = forward_flops(architecture, WHOLE, stage.length)
    student = sum(share * (soft * whole + (stage.steps - soft) * per_token[name]) for name, share in shares.items())
    return known | {
        "tokens": tokens,
        "teacher_tokens": tokens,
        "budget_tokens": {name: round(share * tokens) for name, share in shares.items()},
        "flops": round(tokens * whole + passes * step_tokens * student),
    }


def _shares(how: TrainSection, stage: StageSection, family: Mapping[str, Submodel]) -> dict[str, float]:
    """Of a stage's tokens, how many each budget is expected to read."""
    if how.alone:
        return {name: float(name != "100%") for name in family}
    if how.budgets_per_step == "all":
        return dict.fromkeys(family, 1.0)
    return {name: stage.budget_probabilities.get(name, 1 / len(family)) for name in family}


def forward_flops(architecture: Architecture, submodel: Submodel, length: int) -> float:
    """FLOPs of a token of one forward pass, mean over a sequence in which each looks back on itself and all before."""
    found = cost(architecture, submodel)
    return found.flops_per_token + found.flops_per_context_token * (length + 1) / 2


def _sum(values: Iterator[int | None]) -> int | None:
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)


# ---- printing


def show(found: Figures) -> None:
    console = Console(highlight=False)
    console.print(f"{found['title']}: nothing is read but shapes, and nothing is written", markup=False, soft_wrap=True)
    console.print(_budgets(found))
    chosen = "an example that meets each budget, every axis cut alike; the router chooses its own"
    console.print(f"Sizes are {'those of train.sizes' if found['by_hand'] else chosen}.")
    console.print(table(["steps", "batch", "length", "tokens", "FLOPs", "of each budget"], _stages(found)))
    console.print(table(["one process"], [(k, decimal(v)) for k, v in found["memory"].items()]))


_WIDTHS = {
    "hidden": "{hidden_size}",
    "FFN": "{intermediate_size}",
    "Mamba": "{mamba_num_heads} × {mamba_head_dim}",
    "attention": "{num_attention_heads}",
    "experts": "{n_routed_experts} × {moe_intermediate_size} + {moe_shared_expert_intermediate_size}",
}


def _budgets(found: Figures) -> Table:
    """A line per budget, a column per kind of width that any of them has."""
    rows: dict[str, dict[str, str]] = {}
    for name, budget in found["budgets"].items():
        shape = {field: _span(size) for field, size in budget["shape"].items()}
        rows[name] = {
            "parameters": f"{budget['parameters']:,}",
            "of target": f"{budget['measured'] / budget['target']:.1%}",
            **{title: form.format(**shape) for title, form in _WIDTHS.items() if form[1:].split("}")[0] in shape},
            "layers": str(len(budget["shape"]["layers"])),
        }
    titles = ["parameters", "of target", *(title for title in _WIDTHS if any(title in row for row in rows.values()))]
    titles.append("layers")
    return table(titles, [(name, *(row.get(title, "–") for title in titles)) for name, row in rows.items()])


def _span(size: Any) -> Any:
    """Sizes of their own per layer, from the least to the most."""
    return f"{min(size)} … {max(size)}" if isinstance(size, list | tuple) else size


def _stages(found: Figures) -> Iterator[Sequence[str]]:
    for number, stage in enumerate(found["stages"], 1):
        each = ", ".join(f"{name} {_tokens(count)}" for name, count in (stage["budget_tokens"] or {}).items())
        length = str(stage["length"] or "as the data")
        counts = (f"{stage['steps']:,}", str(stage["batch"]), length, _tokens(stage["tokens"]), _flops(stage["flops"]))
        yield (f"stage {number}", *counts, each)
    total = found["total"]
    yield ("in all", f"{total['steps']:,}", "", "", _tokens(total["tokens"]), _flops(total["flops"]), "")


def _tokens(count: int | None) -> str:
    return "–" if count is None else show_count(count)


def _flops(count: int | None) -> str:
    return "–" if count is None else f"{count:.3g}"


def table(columns: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("", overflow="fold")
    for name in columns:
        grid.add_column(name, justify="right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid
