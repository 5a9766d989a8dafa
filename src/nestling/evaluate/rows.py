"""Data files of tasks, in the published datasets' own columns: JSON lines, JSON, CSV, and Parquet with pyarrow."""

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError, nearest
from nestling.weights.files import reason


@dataclass(frozen=True)
class Row:
    """One record of a data file, and where it stands there."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """A column that must say something, as text."""
        value = self.values.get(column)
        if value is None or not str(value).strip():
            raise NestlingError(f"{self.where}: {column!r} is missing or empty; every problem needs one")
        return str(value)

    def texts(self, column: str) -> list[str]:
        """A column that is a list of at least two texts; in CSV it is written as JSON."""
        value = self.values.get(column)
        if isinstance(value, str):
            value = self.json(column)
        if not isinstance(value, list) or len(value) < 2 or not all(str(part).strip() for part in value):
            raise NestlingError(f"{self.where}: {column!r} must be a list of at least two texts")
        return [str(part) for part in value]

    def json(self, column: str) -> Any:
        """A column that holds JSON as text."""
        try:
            return json.loads(self.text(column))
        except ValueError:
            raise NestlingError(f"{self.where}: {column!r} is not valid JSON") from None


def read_rows(path: str | Path, columns: Sequence[str], limit: int | None = None) -> list[Row]:
    """The first `limit` rows, or all. No row, too few, or one without these columns is refused."""
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise NestlingError(f"{path}: a data file must end in one of {', '.join(_READERS)}")
    found: list[Row] = []
    try:
        for where, values in read(path):
            row = Row(f"{path}, {where}", values)
            if missing := [column for column in columns if column not in values]:
                raise NestlingError(f"{row.where}: has no {missing[0]!r}; {nearest(missing[0], values)}")
            found.append(row)
            if len(found) == limit:
                break
    except OSError as error:
        raise NestlingError(f"{path}: cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        raise NestlingError(f"{path}: cannot be read: not UTF-8 text") from None
    if not found:
        raise NestlingError(f"{path}: has no problems")
    if limit is not None and len(found) < limit:
        raise NestlingError(f"{path}: has only {len(found)} problems; {limit} were asked for")
    return found


def file_hash(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _object(path, f"line {number}", line)


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        records = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise NestlingError(f"{path}: not valid JSON: {error}") from None
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        if not isinstance(record, dict):
            raise NestlingError(f"{path}: must hold a list of objects")
        yield f"record {number}", record


def _object(path: Path, where: str, line: str) -> tuple[str, dict[str, Any]]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NestlingError(f"{path}, {where}: not valid JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(value, dict):
        raise NestlingError(f"{path}, {where}: must be a JSON object")
    return where, value


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, record in enumerate(csv.DictReader(file), 1):
            yield f"record {number}", {key: value for key, value in record.items() if key is not None}


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise NestlingError(f"{path}: Parquet needs pyarrow: pip install pyarrow; or convert it to .jsonl") from None
    try:
        records = read_table(path).to_pylist()
    except ArrowException as error:
        raise NestlingError(f"{path}: cannot be read: {error}") from None
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
