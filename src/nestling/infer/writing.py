"""Text in, text out: what `View.generate` and `View.stream` do."""

from collections.abc import Iterator, Sequence
from typing import Any

from nestling.errors import NestlingError
from nestling.infer.family import View
from nestling.infer.generate import go_on
from nestling.infer.sampling import Row, Sampling
from nestling.infer.text import Decoder, Stops
from nestling.tokenizer import encode


def pieces(
    view: View,
    prompts: Sequence[str],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """(prompt's place, text that a step adds to it), until each has an end token, a stop string or `max_tokens`.

    Temperature 0 is greedy. stop: texts end before the first of these. Same seed, same draws.
    """
    speech = view.speech
    if speech is None:
        raise NestlingError("this view is of no directory, so it has no tokenizer; take one from nestling.load(DIR)")
    stops = checked_stops([stop] if isinstance(stop, str) else stop)
    if max_tokens < 1:
        raise NestlingError(f"max_tokens = {max_tokens} must be 1 or above")
    vocabulary, sampling = view.model.architecture.vocab_size, Sampling(temperature, top_p, top_k)
    rows = [
        Row(
            encode(speech.tokenizer, prompt, vocabulary), max_tokens, sampling, frozenset(speech.ends), f"{seed} {at} 0"
        )
        for at, prompt in enumerate(prompts)
    ]
    return _told(view, rows, [(Decoder(speech.tokenizer), Stops(stops)) for _ in rows])


def _told(view: View, rows: Sequence[Row], texts: Sequence[tuple[Decoder, Stops]]) -> Iterator[tuple[int, str]]:
    for shown in go_on(view, rows) if rows else ():
        for place, token in shown:
            decoder, stops = texts[place]
            if piece := stops.add(decoder.add(token)):
                yield place, piece
            if stops.found is not None:
                rows[place].reason = "stop"
    for place, (decoder, stops) in enumerate(texts):
        if piece := stops.add(decoder.end()) + stops.end():
            yield place, piece


def written(view: View, prompts: Sequence[str], **how: Any) -> list[str]:
    """The text that follows each prompt."""
    texts = [""] * len(prompts)
    for place, piece in pieces(view, prompts, **how):
        texts[place] += piece
    return texts


def checked_stops(stops: Sequence[str]) -> list[str]:
    """Refuse a stop string that stands at every place."""
    if "" in stops:
        raise NestlingError("a stop string is empty, which every text would end before; leave it out")
    return list(stops)
