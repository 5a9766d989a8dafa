"""A checkpoint in stock transformers: what its users get, with no code of ours."""

from pathlib import Path
from typing import Any

from nestling.arch.architecture import Architecture
from nestling.errors import NestlingError
from nestling.weights.files import read_json


def load_stock(directory: str | Path, **options: Any) -> Any:
    """The model in eval mode, every weight of the files in its place and none left to chance.

    options: of `from_pretrained`, such as dtype or trust_remote_code.
    """
    auto: Any = _transformers().AutoModelForCausalLM
    config = read_json(Path(directory) / "config.json")
    if config.get("model_type") == "nemotron_h" and not Architecture.from_config(config).groupable:
        options["experts_implementation"] = "eager"
    model, info = auto.from_pretrained(str(directory), output_loading_info=True, **options)
    if astray := [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]:
        raise NestlingError(f"{directory}: stock transformers did not load {astray[0]} as the table has it")
    return model.eval()


def load_stock_tokenizer(directory: str | Path) -> Any:
    """The tokenizer, with a padding token."""
    auto = _transformers().AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(str(directory))
    except (OSError, ValueError):
        raise NestlingError(f"{directory} has no tokenizer that transformers can load; text needs one") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise NestlingError("stock transformers is needed for this: pip install 'nestling[hf]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
