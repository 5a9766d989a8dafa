"""Log-likelihoods of texts under one size: of a continuation after its context, and of a text read in windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nestling.errors import NestlingError
from nestling.evaluate.subject import Subject
from nestling.tokenizer import token_ids


@dataclass(frozen=True)
class Passage:
    """Token ids, the first `given` of them only read, the others scored. `given` is at least 1."""

    ids: tuple[int, ...]
    given: int


@dataclass(frozen=True)
class Score:
    """Natural logarithms of the scored tokens' probabilities, and whether each was the most probable one."""

    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


def scores(subject: Subject, passages: Sequence[Passage], batch: int) -> Iterator[Score]:
    """Scores in the order given; passages of a batch are padded on the left."""
    import torch

    from nestling.infer.generate import left_padded

    for group in _batched(passages, batch):
        with torch.inference_mode():
            ids_BL, mask_BL = left_padded([passage.ids[:-1] for passage in group])
            logits_BLv = subject.logits(ids_BL, mask_BL)
            for row, passage in enumerate(group):
                targets = torch.tensor(passage.ids[passage.given :])
                logprobs_Tv = logits_BLv[row, -len(targets) :].float().log_softmax(-1)
                chosen = logprobs_Tv.gather(1, targets[:, None])[:, 0]
                yield Score(tuple(chosen.tolist()), bool((logprobs_Tv.argmax(-1) == targets).all()))


def _batched(passages: Sequence[Passage], batch: int) -> Iterator[tuple[Passage, ...]]:
    return (tuple(passages[start : start + batch]) for start in range(0, len(passages), batch))


def first_token(subject: Subject) -> int:
    """What the first token of a text is conditioned on."""
    if subject.start is None:
        raise NestlingError(
            f"{subject.directory}: config.json names no bos_token_id or eos_token_id to begin a text with"
        )
    return subject.start


def continued(subject: Subject, context: str, continuation: str, what: str) -> Passage:
    """A continuation after its context, split where the tokens of the whole leave those of the context.

    Spaces at the end of the context go to the continuation, as most tokenizers put them there.
    """
    bare = context.rstrip()
    whole = token_ids(subject.tokenizer, context + continuation, subject.vocabulary, what)
    before = token_ids(subject.tokenizer, bare, subject.vocabulary, what) if bare else []
    given = before or [first_token(subject)]
    scored = whole[len(before) :]
    if not scored:
        raise NestlingError(f"{what}: {continuation!r} adds no token to {context[-40:]!r}")
    return Passage((*given, *scored), len(given))


def windows(ids: Sequence[int], start: int, length: int, stride: int) -> list[Passage]:
    """A text as windows of at most `length` read tokens, in which every token is scored once.

    Each window scores `stride` new tokens, after as many of those before them as fit; the first begins with `start`.
    """
    text = [start, *ids]
    found = []
    for first in range(1, len(text), stride):
        last = min(first + stride, len(text))
        begin = max(0, last - 1 - length)
        found.append(Passage(tuple(text[begin:last]), first - begin))
    return found
