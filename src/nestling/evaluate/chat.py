"""A problem as the model expects to be asked: through its chat template where it has one."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError
from nestling.evaluate.answers import THINK
from nestling.evaluate.stock import load_stock_tokenizer
from nestling.weights.files import read_json


@dataclass(frozen=True)
class Chat:
    """How prompts are put. `use` None: through the template if there is one; `thinking` None: as it says itself."""

    use: bool | None = None
    system: str | None = None
    thinking: bool | None = None

    def renders(self, directory: Path) -> bool:
        """Whether prompts of this model go through its chat template."""
        there = has_template(directory)
        if self.use and not there:
            raise NestlingError(f"{directory} has no chat template; use --no-chat")
        return there if self.use is None else self.use

    def render(self, directory: Path, prompt: str) -> str:
        """The text to continue."""
        if not self.renders(directory):
            return prompt if self.system is None else f"{self.system}\n\n{prompt}"
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        options: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        messages = [*system, {"role": "user", "content": prompt}]
        try:
            return str(
                _template(directory).apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **options
                )
            )
        except NestlingError:
            raise
        except Exception as error:  # templates are programs, and raise what they like
            raise NestlingError(f"{directory}: its chat template refuses a prompt: {error}".split("\n")[0]) from None


def begins_to_think(rendered: str) -> bool:
    """Whether a prompt ends where the model's reasoning has begun."""
    return rendered.rstrip().endswith(THINK)


def has_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    file = directory / "tokenizer_config.json"
    return file.is_file() and read_json(file).get("chat_template") is not None


@cache
def _template(directory: Path) -> Any:
    try:
        import jinja2  # noqa: F401 - what transformers renders with
    except ImportError:
        raise NestlingError("a chat template needs jinja2: pip install 'nestling[eval]', or use --no-chat") from None
    return load_stock_tokenizer(directory)
