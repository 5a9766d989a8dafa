"""From tokens to text as they come: whole characters only, nothing of a stop string, thoughts apart from answers."""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

INCOMPLETE = "\ufffd"  # what decoding makes of a character whose bytes have not all come


class Decoder:
    """The text of one sequence, piece by piece; joined, the pieces are what decoding all tokens at once gives."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = self.said = 0  # tokens from `start` are decoded again, since a decoder looks at the one before

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self.tokens.append(token)
        return self._new(whole=True)

    def end(self) -> str:
        """What is left: a character that will not be completed."""
        return self._new(whole=False)

    def _new(self, whole: bool) -> str:
        before = self.tokenizer.decode(self.tokens[self.start : self.said])
        text = self.tokenizer.decode(self.tokens[self.start :])
        if len(text) <= len(before) or (whole and text.endswith(INCOMPLETE)):
            return ""
        self.start, self.said = self.said, len(self.tokens)
        return text[len(before) :]


class Stops:
    """A text that ends before the first of some strings; what may be the start of one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = [string for string in strings if string]
        self.held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """The text that certainly is not part of a stop string; nothing after one was found."""
        if self.found is not None:
            return ""
        text = self.held + text
        places = {text.find(string): string for string in reversed(self.strings) if string in text}
        if places:
            place = min(places)
            self.found, self.held = places[place], ""
            return text[:place]
        keep = max((_overlap(text, string) for string in self.strings), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back and turned out to be text."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of the text begin the string."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)


class Written:
    """One sequence written out as it comes; `told` is what `generate` wants."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], write: Callable[[str], object]) -> None:
        self.decoder, self.stops, self.write = Decoder(tokenizer), Stops(stops), write

    @property
    def begun(self) -> bool:
        return bool(self.decoder.tokens)

    def told(self, row: int, token: int) -> bool:
        self.write(self.stops.add(self.decoder.add(token)))
        return self.stops.found is not None

    def end(self) -> None:
        self.write(self.stops.add(self.decoder.end()) + self.stops.end())


OPEN, CLOSE = "<think>", "</think>"


class Thought:
    """Splits a text into reasoning, up to `</think>`, and the answer behind it; nothing but the two marks is lost.

    thinking: the text begins inside a thought, because the prompt opened one; else it may open one itself.
    """

    def __init__(self, thinking: bool) -> None:
        self.place = "thought" if thinking else "start"
        self.held = ""

    def add(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) that this piece adds."""
        text, self.held = self.held + text, ""
        if self.place == "start":
            begun = text.lstrip()
            if OPEN.startswith(begun) and begun != OPEN:  # it may still become the mark
                self.held = text
                return "", ""
            opened = begun.startswith(OPEN)
            self.place, text = ("thought", begun[len(OPEN) :]) if opened else ("answer", text)
        if self.place == "answer":
            return "", text
        thought, closed, answer = text.partition(CLOSE)
        if closed:
            self.place = "answer"
            return thought, answer
        keep = len(text) - _overlap(text, CLOSE)
        self.held = text[keep:]
        return text[:keep], ""

    def end(self) -> tuple[str, str]:
        """What was held back and turned out to be text."""
        text, self.held = self.held, ""
        return (text, "") if self.place == "thought" else ("", text)
