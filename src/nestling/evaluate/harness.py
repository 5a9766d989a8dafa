"""Any size of a family in lm-evaluation-harness, as the model `nestling`.

From the command line, which is lm-eval's own with this model added:

    python -m nestling.evaluate.harness run --model nestling --model_args path=DIR,budget=50% --tasks …

In Python, `register()` adds it to lm-eval's models. Arguments: path, budget (a name or a wish; without it the whole),
batch_size, max_length (tokens of a window; by default what config.json says, else 2048).
"""

from functools import cache

from nestling.errors import NestlingError
from nestling.evaluate.harness_model import SizeLM

NAME = "nestling"


@cache
def register() -> type:
    """Make `nestling` known to lm-eval; returns its class."""
    try:
        import lm_eval.models  # noqa: F401 - it fills the registry, but only while that is empty
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise NestlingError("this needs lm-evaluation-harness: pip install 'nestling[eval]'") from None

    @register_model(NAME)
    class NestlingLM(SizeLM, TemplateLM):
        """One size."""

    return NestlingLM


def main() -> None:
    """lm-eval's command line, with the model `nestling`."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
