"""Text and chats in JSON lines, read in a stream; whatever is wrong is said with its file and line."""

import hashlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from nestling.data.chat import BadDocument, is_chat
from nestling.errors import NestlingError
from nestling.weights.files import reason


def read_lines(file: Path) -> Generator[tuple[str, bytes], None, None]:
    """(where it is, the line) for every line, the blank ones too."""
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield f"{file}, line {number}", line
    except OSError as error:
        raise NestlingError(f"{file}: cannot be read: {reason(error)}") from None


def parse(line: bytes, where: str) -> dict[str, Any]:
    """The object of a line, which has a "text" or "messages"."""
    try:
        value = json.loads(decoded(line, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadDocument(f"{where}: not valid JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(value, dict) or not (isinstance(value.get("text"), str) or is_chat(value.get("messages"))):
        raise BadDocument(f'{where}: needs an object with a "text" string or a list of "messages"')
    return value


def decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        raise BadDocument(f"{where}: cannot be read: not UTF-8 text") from None


def sha256(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
