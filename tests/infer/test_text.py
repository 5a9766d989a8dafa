"""Text piece by piece is the text decoded at once; nothing of a stop string is ever shown."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nestling.errors import NestlingError
from nestling.infer.text import Decoder, Stops, Thought
from nestling.tokenizer import character_tokenizer, token_ids

WORDS = "żółw 🐢 naïve 東京 hello world, the quick brown fox; <stop> 한국어"


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return tokenizer


@cache
def with_spaces() -> Tokenizer:
    """A decoder that strips the space before the first word."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=80))
    return tokenizer


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    decoder = Decoder(tokenizer)
    return [*map(decoder.add, tokens), decoder.end()]


@given(st.text(st.sampled_from(WORDS), max_size=30))
@pytest.mark.parametrize("tokenizer", [byte_level, with_spaces])
def test_joined_pieces_are_the_text(tokenizer: object, text: str) -> None:
    found = tokenizer()  # type: ignore[operator]
    tokens = found.encode(text).ids
    assert "".join(pieces(found, tokens)) == found.decode(tokens)


@given(st.lists(st.integers(0, 255), max_size=20))
def test_joined_pieces_are_the_text_of_any_bytes(tokens: list[int]) -> None:
    found = pieces(byte_level(), tokens)
    assert "".join(found) == byte_level().decode(tokens)


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    tokenizer = byte_level()
    alphabet = {value: token for token, value in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    turtle = [
        token for byte in pre_tokenizers.ByteLevel(False).pre_tokenize_str("🐢")[0][0] for token in [alphabet[byte]]
    ]
    ids = [tokenizer.token_to_id(sorted(pre_tokenizers.ByteLevel.alphabet())[place]) for place in turtle]
    assert len(ids) == 4
    assert pieces(tokenizer, ids) == ["", "", "", "🐢", ""]
    assert pieces(tokenizer, ids[:3]) == ["", "", "", "\ufffd"]


def test_special_tokens_are_not_shown() -> None:
    tokenizer = character_tokenizer()
    tokens = [tokenizer.token_to_id(token) for token in ("1", "<eos>", "2")]
    assert "".join(pieces(tokenizer, tokens)) == "12"


@given(
    st.text("ab<>", max_size=20),
    st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=20, max_size=20),
)
def test_a_text_ends_before_the_first_stop_string(text: str, strings: list[str], cuts: list[int]) -> None:
    stops, shown, rest = Stops(strings), "", text
    for cut in cuts:
        piece, rest = rest[:cut], rest[cut:]
        shown += stops.add(piece)
        assert text.startswith(shown)
        assert not any(string in shown for string in strings)
        if stops.found:
            break
    shown += stops.end()
    first = min([text.index(string) for string in strings if string in text], default=len(text))
    assert len(shown) <= first or not stops.found
    wanted = next(
        (text[: end - max(map(len, ending))] for end in range(len(text) + 1)
         if (ending := [s for s in strings if text[:end].endswith(s)])),
        text,
    )  # fmt: skip
    assert shown == wanted or (stops.found is not None and shown == text[:first])


def test_nothing_is_held_back_longer_than_needed() -> None:
    stops = Stops(["</s>"])
    assert [stops.add(piece) for piece in ("a<", "b", "</", "s", "x", "</s", ">y", "z")] == [
        "a", "<b", "", "", "</sx", "", "", "",
    ]  # fmt: skip
    assert stops.found == "</s>"


@pytest.mark.parametrize(
    ("thinking", "text", "thought", "answer"),
    [
        (True, "a b</think>\n\nc", "a b", "\n\nc"),
        (True, "a b", "a b", ""),
        (True, "a </thin", "a </thin", ""),
        (False, "<think>a</think>b<think>c", "a", "b<think>c"),
        (False, "\n<think>a", "a", ""),
        (False, "<thi", "", "<thi"),
        (False, " x</think>", "", " x</think>"),
        (False, "", "", ""),
    ],
)
def test_thoughts_are_split_from_answers_however_they_come(
    thinking: bool, text: str, thought: str, answer: str
) -> None:
    for width in (1, 2, 3, 50):
        split = Thought(thinking)
        parts = [split.add(text[at : at + width]) for at in range(0, len(text), width)] + [split.end()]
        assert ("".join(a for a, _ in parts), "".join(b for _, b in parts)) == (thought, answer)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(NestlingError, match=r"the prompt: '\\ud800' is half a character"):
        token_ids(byte_level(), "a\ud800", 300, "the prompt")
