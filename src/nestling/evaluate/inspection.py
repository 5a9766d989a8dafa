"""`nestling rank --inspect`: how a checkpoint's importance is spread, in short on the terminal and whole as a page."""

from pathlib import Path
from typing import TYPE_CHECKING

from nestling.errors import NestlingError
from nestling.evaluate.ranking_page import GENERATOR, render
from nestling.evaluate.report import BLANK, KINDS, whole
from nestling.evaluate.spelling import SHARES, correlation, figure, held, positions, shown
from nestling.evaluate.spread import Spread, read_spread
from nestling.weights.files import reason, write_file_atomically

if TYPE_CHECKING:
    from rich.columns import Columns
    from rich.table import Table


def inspect(directory: Path, out: Path | None) -> None:
    """Print the summary and write the page: to `out`, by default beside the checkpoint as NAME-ranking.html."""
    from rich.console import Console

    spread = read_spread(directory)
    page = directory.resolve().with_name(f"{directory.resolve().name}-ranking.html") if out is None else out
    check_page(page)
    write_file_atomically(page, render(spread).encode("utf-8"))
    console = Console(highlight=False)
    console.print(table(spread))
    console.print("Layers, most important first: place, layer and kind, score")
    console.print(layer_list(spread))
    console.print(f"{page}: the whole picture, to open in a browser", soft_wrap=True, markup=False)


def check_page(page: Path) -> None:
    """Refuse a name that is no page's, and a file that an earlier inspection did not write."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise NestlingError(f"{page}: with --inspect, --out is the page to write; end it in .html")
    try:
        if not page.exists():
            return
        if not page.is_file():
            raise NestlingError(f"{page}: exists and is not a file; choose another --out")
        with open(page, encoding="utf-8", errors="replace") as file:
            ours = GENERATOR in file.read(2000)
    except OSError as error:
        raise NestlingError(f"{page}: cannot be read: {reason(error)}") from None
    if not ours:
        raise NestlingError(f"{page}: exists and is not a page of nestling rank --inspect; choose another --out")


def table(spread: Spread) -> "Table":
    """Per axis and layer: size, what the best positions hold, after how many the curve bends, stability."""
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{spread.path}: what the best {', '.join(map(str, SHARES))} percent of the positions hold")
    found = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    found.add_column("axis", no_wrap=True)
    for name in ("layer", "size", *(f"{share}%" for share in SHARES), "knee", "stability"):
        found.add_column(name, justify="right", no_wrap=True)
    for axis, curves in shown(spread):
        for curve in curves:
            name, where = axis.name if curve is curves[0] else "", BLANK if curve.layer is None else str(curve.layer)
            shares = [held(curve, share) for share in SHARES]
            found.add_row(name, where, positions(curve), *shares, whole(curve.knee), correlation(curve.stability))
    found.add_row("layers", "", str(len(spread.layers)), *[""] * (len(SHARES) + 1), correlation(spread.stability))
    return found


def layer_list(spread: Spread) -> "Columns":
    from rich.columns import Columns
    from rich.text import Text

    return Columns(
        [Text(f"{one.place:>3}. {one.index} {KINDS[one.kind]} {figure(one.score)}") for one in spread.ordered()],
        padding=(0, 3),
        column_first=True,
    )
