"""Where what is said meanwhile goes: standard error."""

from rich.console import Console

console = Console(stderr=True, highlight=False)
