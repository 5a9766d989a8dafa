"""What `nestling plan` prints: the figures of a model or of the paper as JSON, or as tables that fit the terminal."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nestling.arch.cost import PRECISIONS
from nestling.arch.nemotron_h import KINDS
from nestling.units import binary, decimal, show_context

Figures = Mapping[str, Any]
Lines = dict[str, str]


def show_json(found: Figures) -> None:
    print(json.dumps(found, indent=2))


def show_plan(target: str, found: Figures) -> None:
    """A target's sizes side by side, and what keeping them in one checkpoint saves."""
    console = Console(highlight=False)
    for grid in _sizes(found, console.width):
        _show(console, target, grid)
    if len(found["budgets"]) > 1:
        _show(console, "the family in one checkpoint, and each size in its own", _family(found))
    console.print(
        "KV cache in bf16, Mamba state in fp32 with its convolution window in bf16, both of one sequence. fp8 and int4 "
        "hold the linear maps of the blocks with their scales; the rest stays bf16. kB, MB, GB are 10^3, 10^6, 10^9 "
        f"bytes, KiB, MiB, GiB 2^10, 2^20, 2^30. The context is {found['context']:,} tokens."
    )


def show_paper(found: Figures) -> None:
    """The papers' tables, printed beside computed."""
    console = Console(highlight=False)
    for name, title in _PAPER.items():
        sources = ", ".join(dict.fromkeys(figure["source"] for figure in found[name]))
        _show(console, f"{title} ({sources})", _figures(found[name]))
    _show(console, "Compare: published scores; in brackets what is computed", _compare(found["compare"]))
    for note in found["notes"]:
        console.print(f"- {note}")


_PAPER = {
    "memory": "Memory of bf16 weights",
    "tokens": "Tokens to get a 6B and a 9B",
    "averages": "Average reasoning score: published, and from its row",
}


def _show(console: Console, title: str, grid: Table) -> None:
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(grid)


# ---- a model


def _sizes(found: Figures, width: int) -> Iterator[Table]:
    """As many tables as the sizes need in a terminal of `width` columns."""
    members = found["budgets"]
    if found["shape"] not in [member["shape"] for member in members.values()]:
        members = {"whole model": found} | members
    lines = {name: _lines(member) for name, member in members.items()}
    labels = list(dict.fromkeys(label for each in lines.values() for label in each))
    cell = max(len(text) for name, each in lines.items() for text in (name, *each.values())) + 2
    fitting = max(1, (width - max(map(len, labels)) - 2) // cell)
    names = list(lines)
    for start in range(0, len(names), fitting):
        part = names[start : start + fitting]
        yield _grid(part, [(label, *(lines[name].get(label, "") for name in part)) for label in labels])


def _lines(member: Figures) -> Lines:
    """Label -> text of one size, in the order they are shown."""
    length = show_context(member["context"])
    routed = {"active per token": f"{member['active_parameters']:,}"} if "E" in _pattern(member) else {}
    return {
        **_shape(member["shape"]),
        "parameters": f"{member['parameters']:,}",
        **routed,
        **{f"weights, {name}": decimal(count) for name, count in member["weight_bytes"].items()},
        "bf16 in binary units": binary(member["bytes"]),
        f"KV cache at {length}": decimal(member["kv_bytes"]),
        "Mamba state": decimal(member["ssm_bytes_per_sequence"]),
        f"cache and state at {length}": decimal(member["sequence_bytes"]),
        "FLOPs/token, no context": decimal(member["flops_per_token"], "FLOP"),
        f"FLOPs/token at {length}": decimal(member["flops_at_context"], "FLOP"),
    }


def _pattern(member: Figures) -> str:
    return member["shape"]["hybrid_override_pattern"]


def _shape(shape: Figures) -> Lines:
    pattern = shape["hybrid_override_pattern"]
    counts = "/".join(str(pattern.count(kind)) for kind in KINDS)
    fields = {
        "Mamba heads × dim": ("mamba_num_heads", " × ", "mamba_head_dim"),
        "query / KV heads": ("num_attention_heads", " / ", "num_key_value_heads"),
        "FFN": ("intermediate_size",),
        "experts / active": ("n_routed_experts", " / ", "num_experts_per_tok"),
        "expert / shared FFN": ("moe_intermediate_size", " / ", "moe_shared_expert_intermediate_size"),
    }
    return {
        f"layers {'/'.join(KINDS)}": f"{len(pattern)} = {counts}",
        "hidden": str(shape["hidden_size"]),
        **{
            label: "".join(_range(shape[part]) if part in shape else part for part in parts)
            for label, parts in fields.items()
            if parts[0] in shape
        },
    }


def _range(size: int | Sequence[int]) -> str:
    return str(size) if isinstance(size, int) else f"{min(size)}…{max(size)}"


def _family(found: Figures) -> Table:
    together, apart, saved = (found["family"][key] for key in ("together_bytes", "separate_bytes", "saved_bytes"))
    rows = [
        (
            f"weights, {name}",
            *(decimal(each[name]) for each in (together, apart, saved)),
            f"{saved[name] / apart[name]:.1%}",
        )
        for name in PRECISIONS
    ]
    return _grid(["in one", "each in its own", "saved", ""], rows)


# ---- the papers


def _figures(figures: Sequence[Figures]) -> Table:
    rows = [
        (
            figure["what"],
            _amount(figure["printed"], figure["unit"]),
            _amount(figure["computed"] and round(figure["computed"], 3), figure["unit"]),
            "" if figure["difference"] is None else f"{figure['difference']:+,.3f}".replace("+0.000", "0"),
            {None: "", True: "agrees", False: "differs"}[figure["agrees"]],
        )
        for figure in figures
    ]
    return _grid(["printed", "computed", "difference", ""], rows)


def _compare(systems: Sequence[Figures]) -> Table:
    return _grid(["sizes (B)", "average score", "tokens", "bf16 memory"], [_system(system) for system in systems])


def _system(system: Figures) -> tuple[str, ...]:
    run, weights = system["tokens"], system["memory"]
    return (
        system["system"],
        ", ".join(map(str, system["sizes"])),
        " / ".join(map(_average, system["averages"])),
        _amount(run and run["printed"], "B"),
        f"{weights['printed']} GB ({weights['computed']:.2f})" if weights else "–",
    )


def _average(score: Figures) -> str:
    computed = "" if score["agrees"] else f" ({score['computed']:.2f})"
    return f"{score['printed']:.2f}{computed}"


# ---- cells


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("", overflow="fold")
    for name in columns:
        grid.add_column(escape(name), justify="right", overflow="fold")
    for row in rows:
        grid.add_row(*map(escape, row))
    return grid


def _amount(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:,} {unit}"
