"""From texts, chats and problems to documents: token ids, and which of them are to be learnt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from nestling.data.chat import BadDocument, Chat, Span, assistant_spans, assistant_tokens, render
from nestling.data.records import Record
from nestling.errors import NestlingError
from nestling.tasks import Problem
from nestling.tokenizer import check_ids, end_token, read_tokenizer


@dataclass(frozen=True)
class Document:
    """ids, and per id whether it counts as a target; None: all do."""

    ids: list[int]
    counted: list[bool] | None = None


@dataclass(frozen=True)
class Draft:
    """A text that is still to be tokenised, and the characters of it that count; None: all do."""

    text: str
    spans: list[Span] | None = None
    chat: bool = False  # rendered, with a beginning and an end of its own


@dataclass(frozen=True)
class Encoder:
    """Makes documents with the tokenizer, the chat template and the end token of a model directory.

    A text and a problem end with the end token, if the model has one; chats end as their template says. Of a problem
    the solution counts, of a chat the assistant's turns or all, of a text all.
    """

    directory: Path
    tokenizer: Tokenizer
    vocabulary: int
    end: int | None
    loss_on: str

    @staticmethod
    def of(directory: Path, vocabulary: int, loss_on: str) -> "Encoder":
        tokenizer = read_tokenizer(directory)
        tokenizer.no_padding()  # some are saved with either
        tokenizer.no_truncation()
        return Encoder(directory, tokenizer, vocabulary, end_token(directory), loss_on)

    def __call__(self, records: Sequence[Record]) -> list[Document | BadDocument]:
        """A document, or what is wrong with it, for each record; the tokenizer works on all of them at once."""
        made = [_attempt(self._draft, record) for record in records]
        for chat in (False, True):
            places = [place for place, draft in enumerate(made) if isinstance(draft, Draft) and draft.chat == chat]
            texts = [made[place].text for place in places]
            for place, encoding in zip(
                places, self.tokenizer.encode_batch(texts, add_special_tokens=not chat), strict=True
            ):
                made[place] = self._finished(made[place], encoding)
        checked = zip(records, made, strict=True)
        return [
            one if isinstance(one, BadDocument) else _attempt(self._checked, record, one) for record, one in checked
        ]

    def _draft(self, record: Record) -> Draft | Document:
        value = record.read()
        if isinstance(value, str):
            return Draft(value)
        if isinstance(value, Problem):
            return self._problem(value)
        return (
            self._chat(value, record.where)
            if self.loss_on == "assistant"
            else Draft(render(self.directory, value, record.where), chat=True)
        )

    def _problem(self, problem: Problem) -> Document:
        """Prompt and solution are tokenised apart, as they are when the model is asked."""
        prompt = self.tokenizer.encode(problem.prompt).ids
        prompt = prompt[: -(prompt[-1:] == [self.end])] or prompt
        solution = self._ended(self.tokenizer.encode(problem.solution, add_special_tokens=False).ids)
        return Document(prompt + solution, [False] * len(prompt) + [True] * len(solution))

    def _chat(self, chat: Chat, where: str) -> Draft | Document:
        if not any(message.get("role") == "assistant" for message in chat):
            raise BadDocument(f"{where}: has no assistant turn, which loss_on = 'assistant' would learn from")
        if (marked := assistant_tokens(self.directory, chat, where)) is not None:
            return Document(*marked)
        return Draft(*assistant_spans(self.directory, chat, where), chat=True)

    def _finished(self, draft: Draft, encoding: Encoding) -> Document:
        if draft.spans is None:
            return Document(encoding.ids if draft.chat else self._ended(encoding.ids))
        reached = [any(begin < b and end > a for a, b in draft.spans) for begin, end in encoding.offsets]
        return Document(encoding.ids, reached)

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self.end is None or ids[-1:] == [self.end] else [*ids, self.end]

    def _checked(self, record: Record, document: Document) -> Document:
        try:
            check_ids(self.tokenizer, document.ids, self.vocabulary, record.where)
        except NestlingError as error:
            raise BadDocument(str(error)) from None
        if len(document.ids) < 2 or not any(document.counted[1:] if document.counted else [True]):
            raise BadDocument(f"{record.where}: has nothing to learn: {len(document.ids)} tokens, of which none counts")
        return document


def _attempt(make: Callable[..., Any], *given: Any) -> Any:
    """What is made, or the BadDocument that was raised, as a value: whether it matters is not decided here."""
    try:
        return make(*given)
    except BadDocument as error:
        return error
