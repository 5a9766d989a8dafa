"""Tokenizers beside a checkpoint's weights, in Hugging Face's files."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from nestling.errors import NestlingError
from nestling.tasks import ALPHABET
from nestling.weights.files import read_json, write_json

PAD, EOS = "<pad>", "<eos>"


def character_tokenizer() -> Tokenizer:
    """One token per character of the tasks' alphabet, after <pad> = 0 and <eos> = 1."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, EOS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json and the configuration with which stock transformers loads it (left padding, for generation)."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": EOS, "padding_side": "left"}
    write_json(directory / "tokenizer_config.json", config | {"clean_up_tokenization_spaces": False})
    write_json(directory / "generation_config.json", {"pad_token_id": 0, "eos_token_id": 1, "do_sample": False})


def end_token(directory: str | Path) -> int | None:
    """The token id that is put behind a text: the first of `end_tokens`."""
    return next(iter(end_tokens(directory)), None)


def end_tokens(directory: str | Path) -> tuple[int, ...]:
    """The token ids each of which ends what is generated: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        file = Path(directory) / name
        if file.exists() and (given := read_json(file).get("eos_token_id")) is not None:
            tokens = given if isinstance(given, list) else [given]
            if not tokens or any(type(token) is not int or token < 0 for token in tokens):
                raise NestlingError(f"{file}: eos_token_id must be a token id or a list of them, not {given!r}")
            return tuple(tokens)
    return ()


def read_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer.json of a model directory."""
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise NestlingError(f"{directory} has no tokenizer.json; text needs the tokenizer the model was trained with")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise NestlingError(f"{file} cannot be read: {error}") from None


def encode(tokenizer: Tokenizer, prompt: str, vocabulary: int) -> list[int]:
    """Token ids of a prompt, at least one."""
    if not (ids := token_ids(tokenizer, prompt, vocabulary, "the prompt")):
        raise NestlingError("the prompt is empty")
    return ids


def token_ids(tokenizer: Tokenizer, text: str, vocabulary: int, what: str, special: bool = True) -> list[int]:
    """Token ids of a text; refuses characters the tokenizer does not know and ids the model does not have.

    special: add what the tokenizer puts around a text; a rendered chat has its own.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NestlingError(f"{what}: {text[error.start]!r} is half a character; text must be valid Unicode") from None
    ids = tokenizer.encode(text, add_special_tokens=special).ids
    check_ids(tokenizer, ids, vocabulary, what, text)
    return ids


def check_ids(tokenizer: Tokenizer, ids: list[int], vocabulary: int, what: str, text: str = "") -> None:
    """Refuse a text of unknown characters, and ids that the model does not have."""
    if tokenizer.token_to_id(PAD) in ids:
        unknown = sorted({c for c in text if tokenizer.token_to_id(PAD) in tokenizer.encode(c).ids})
        known = "".join(sorted(token for token in tokenizer.get_vocab() if len(token) == 1))
        raise NestlingError(
            f"{what}: {f'{text[:40]!r} ' if text else ''}has characters that the model's tokenizer does not know"
            f"{': ' + ' '.join(map(repr, unknown[:9])) if unknown else ''}; it knows {known[:99]!r}"
        )
    if (largest := max(ids, default=0)) >= vocabulary:
        raise NestlingError(
            f"{what}: token {largest} is outside the model's vocabulary of {vocabulary}; wrong tokenizer?"
        )
