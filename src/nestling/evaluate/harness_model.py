"""lm-evaluation-harness's model `nestling`: one size, what it reads and writes is lm-eval's, what it computes ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError
from nestling.evaluate.chat import has_template
from nestling.evaluate.likelihood import Passage, first_token, scores, windows
from nestling.evaluate.stock import load_stock_tokenizer
from nestling.evaluate.subject import Sampling, Subject, check_directory, open_subjects
from nestling.weights.files import read_json

LENGTH, NEW_TOKENS = 2048, 256


class SizeLM:
    """What lm-eval asks of a model; `harness.register` makes one of it, in front of lm-eval's TemplateLM."""

    cache_hook: Any  # TemplateLM's

    def __init__(
        self,
        path: str,
        budget: str | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,  # lm-eval gives it to every model
    ) -> None:
        super().__init__()
        check_directory(Path(path))
        place = "cuda" if device == "cuda:0" else device or "auto"
        (self.subject,) = open_subjects(path, [] if budget is None else [budget], device=place)
        self.batch = int(batch_size) if str(batch_size).isdigit() else 16
        self.max_length = max_length or context_length(Path(path))

    @property
    def tokenizer_name(self) -> str:
        return str(self.subject.directory)

    @property
    def eot_token_id(self) -> int:
        return first_token(self.subject) if self.subject.end is None else self.subject.end

    @property
    def prefix_token_id(self) -> int:
        return first_token(self.subject)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = add_special_tokens is not False
        return list(self.subject.tokenizer.encode(string, add_special_tokens=special).ids)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        passages = [passage(before, after, self.max_length) for _, before, after in requests]
        found = scored(self.subject, passages, self.batch)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            (text,) = request.args
            cut = windows(self.tok_encode(text), self.prefix_token_id, self.max_length, self.max_length)
            totals.append(sum(total for total, _ in scored(self.subject, cut, self.batch)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found: dict[int, str] = {}
        for (until, how), places in self._alike(requests).items():
            room = self.max_length - how.max_tokens
            if room < 1:
                raise NestlingError(f"{how.max_tokens} new tokens leave no room in {self.max_length}: max_length=…")
            for start in range(0, len(places), self.batch):
                group = places[start : start + self.batch]
                prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in group]
                for place, row in zip(group, self.subject.continue_(prompts, how, group), strict=True):
                    found[place] = until_first(self.subject.tokenizer.decode(row), until)
                    self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
        return [found[place] for place in range(len(requests))]

    def _alike(self, requests: Sequence[Any]) -> dict[tuple[tuple[str, ...], Sampling], list[int]]:
        """Places of the requests that are drawn the same way, longest prompts first."""
        from lm_eval.models.utils import normalize_gen_kwargs

        alike: dict[tuple[tuple[str, ...], Sampling], list[int]] = {}
        for place in sorted(range(len(requests)), key=lambda place: -len(requests[place].args[0])):
            how: Any = normalize_gen_kwargs(requests[place].args[1], NEW_TOKENS)
            drawn = Sampling(float(how["temperature"]), float(how.get("top_p", 1.0)), int(how["max_gen_toks"]))
            alike.setdefault((tuple(how["until"]), drawn), []).append(place)
        return alike

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(
            load_stock_tokenizer(self.subject.directory).apply_chat_template(chat_history, tokenize=False, **ends)
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if not chat_template or not has_template(self.subject.directory):
            return None
        return str(load_stock_tokenizer(self.subject.directory).chat_template)


def passage(before: Sequence[int], after: Sequence[int], length: int) -> Passage:
    """What is read and what is scored, cut on the left to `length` read tokens."""
    ids = (*before, *after)[-(length + 1) :]
    return Passage(ids, len(ids) - len(after))


def scored(subject: Subject, passages: Sequence[Passage], batch: int) -> list[tuple[float, bool]]:
    """(log-likelihood, is it the greedy continuation), the longest computed first."""
    order = sorted(range(len(passages)), key=lambda place: -len(passages[place].ids))
    found = dict(zip(order, scores(subject, [passages[place] for place in order], batch), strict=True))
    return [(found[place].total, found[place].greedy) for place in range(len(passages))]


def until_first(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of these strings."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def context_length(directory: Path) -> int:
    found = read_json(directory / "config.json").get("max_position_embeddings")
    return found if isinstance(found, int) else LENGTH
