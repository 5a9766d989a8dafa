"""The sizes of a family as models with ids: `name` is the whole, `name@75%` a budget, `name@7.5b` any size between."""

import re
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError, nearest
from nestling.infer.chat import Render, chat_template
from nestling.infer.family import Family, View
from nestling.serve.protocol import Failure
from nestling.tokenizer import end_tokens, read_tokenizer, token_ids

REMEMBERED = 64
"""Sizes between the budgets that are kept looked up; a forgotten one is looked up again."""
PINNED = 2**62  # bytes that a pinned size may pack: all it needs


class Models:
    """Ids -> views of one storage, and the tokenizer they share. pins: sizes whose weights are packed for good."""

    def __init__(self, family: Family, directory: Path, name: str | None = None, pins: tuple[str, ...] = ()) -> None:
        self.family, self.name, self.created = family, name or directory.resolve().name, int(time.time())
        self.tokenizer, self.ends = read_tokenizer(directory), frozenset(end_tokens(directory))
        self.render: Render | None = None
        self.no_chat = ""
        try:
            self.render = chat_template(directory)
        except NestlingError as error:
            self.no_chat = str(error).replace(str(directory), self.name)
        self.ids = {f"{self.name}@{budget}".lower(): family[budget].held() for budget in family}
        self.ids[self.name.lower()] = family[None].held()
        self.between: OrderedDict[str, View] = OrderedDict()
        for pin in pins:
            self.ids[f"{self.name}@{pin}".lower()] = family[pin].held(PINNED)

    def listed(self) -> list[dict[str, Any]]:
        ids = [self.name, *(f"{self.name}@{budget}" for budget in self.family)]
        return [self.described(name, self.ids[name.lower()]) for name in ids]

    def described(self, name: str, view: View) -> dict[str, Any]:
        stamp = {"id": name, "object": "model", "created": self.created, "owned_by": "nestling"}
        return stamp | {"parameters": view.parameters}

    def known(self, name: str) -> View | None:
        return self.ids.get(name.lower()) or self.between.get(name.lower())

    def find(self, name: str) -> View:
        """The view of an id; what is asked for the first time between two budgets is searched, which takes a moment."""
        if (view := self.known(name)) is not None:
            return view
        if not re.match(re.escape(self.name) + "@", name, re.IGNORECASE):
            ids = [entry["id"] for entry in self.listed()]
            raise Failure(
                404, f"there is no model {name[:80]!r}; {nearest(name[:80], ids)}", "model_not_found", "model"
            )
        try:
            view = self.family[name[len(self.name) + 1 :]].held()
        except NestlingError as error:
            said = str(error).replace(str(self.family.elastic.checkpoint.path), self.name)  # no affair of clients
            raise Failure(404, said, "model_not_found", "model") from None
        self.between[name.lower()] = view
        while len(self.between) > REMEMBERED:
            self.between.popitem(last=False)
        return view

    def encode(self, text: str, special: bool = True) -> list[int]:
        return token_ids(self.tokenizer, text, self.family.model.architecture.vocab_size, "the prompt", special)

    def checked(self, ids: list[int]) -> list[int]:
        """Token ids that a client chose itself."""
        vocabulary = self.family.model.architecture.vocab_size
        if outside := [token for token in ids if not 0 <= token < vocabulary]:
            raise NestlingError(f"the prompt: token {outside[0]} is outside the model's vocabulary of {vocabulary}")
        return ids
