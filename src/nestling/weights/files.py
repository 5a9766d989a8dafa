"""Single files: JSON objects in and out, bytes at an offset, and writing that leaves the old file or the new one."""

import io
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from nestling.errors import NestlingError

MAX_DEPTH = 100  # of lists and objects inside one another: far from where Python gives up on a deeper one


def reason(error: Exception) -> str:
    """What the operating system said, without the path and the errno."""
    return getattr(error, "strerror", None) or str(error)


def read_json(path: str | Path, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file. A missing, unreadable or broken file, or another kind of value, is a NestlingError.

    unique: refuse an object that has a key twice, of which readers believe the last one.
    """
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"), object_pairs_hook=_once if unique else None)
    except FileNotFoundError:
        raise NestlingError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise NestlingError(f"{path}: line {error.lineno}: broken JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise NestlingError(f"{path}: cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise NestlingError(f"{path}: broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise NestlingError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    if is_deep(value):
        raise NestlingError(f"{path}: lists and objects lie more than {MAX_DEPTH} deep; is it the right file?")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return value


def is_deep(value: Any) -> bool:
    """Whether lists and objects lie more than `MAX_DEPTH` deep, told without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def read_regular_json(file: Path, *, unique: bool = False) -> dict[str, Any]:
    """As `read_json`, of a regular file."""
    _check_regular(file)
    return read_json(file, unique=unique)


def open_regular(file: Path) -> io.FileIO:
    """Open a regular file, unbuffered."""
    _check_regular(file)
    try:
        return open(file, "rb", buffering=0)
    except OSError as error:
        raise NestlingError(f"{file}: cannot be read: {reason(error)}") from None


def _check_regular(file: Path) -> None:
    """Refuse what is missing, and a fifo or a device, which would hang or never end."""
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except (OSError, ValueError) as error:
        raise NestlingError(f"{file}: cannot be read: {reason(error)}") from None
    if not regular:
        raise NestlingError(f"{file}: not a regular file")


def read_bytes(source: io.FileIO, file: Path, start: int, length: int) -> bytearray:
    """`length` bytes from the offset `start`."""
    data = bytearray(length)
    read_into(source, file, start, memoryview(data))
    return data


def read_into(source: io.FileIO, file: Path, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes from the offset `start`. Threads may share the file."""
    try:
        while missing := len(view):
            count = os.preadv(source.fileno(), [view], start)
            if not count:
                raise NestlingError(f"{file}: ends at byte {start}, {missing} before the tensor does")
            view, start = view[count:], start + count
    except OSError as error:
        raise NestlingError(f"{file}: cannot be read: {reason(error)}") from error


def read_scattered(source: io.FileIO, start: int, views: list[memoryview]) -> int:
    """Fill one view after the other with what follows the offset `start`, in one call; the number of bytes it read.

    Too few of them, 0 where it cannot be read at all, are for `read_into` to explain.
    """
    try:
        return os.preadv(source.fileno(), views, start)
    except OSError:
        return 0


def read_ahead(source: io.FileIO, start: int, length: int) -> None:
    """Have the system fetch these bytes, if it can; does not wait for them."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with suppress(OSError):
            os.posix_fadvise(source.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def write_json(path: str | Path, value: Any, *, flush: bool = True) -> None:
    """Write `value` as indented JSON, atomically. flush: as in `write_file_atomically`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    data = text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes its JSON escape
    write_file_atomically(path, data, flush=flush)


def write_file_atomically(path: str | Path, data: bytes, *, flush: bool = True) -> None:
    """Replace the file at `path` by `data`: after a crash there is the old file or the new one, never a part.

    flush: wait until it is on the disk. Within an `output_directory`, which does so at its end if asked, there is no
    need to: beside large files that the system is still writing out it takes tenths of a second.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if flush:
            sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise NestlingError(f"{path}: cannot be written: {reason(error)}") from error
        raise


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work that it is to hold."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise NestlingError(f"{path}: there is no directory {path.parent}; make it, or choose another file")
    if path.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise NestlingError(f"{path}: cannot be written; choose another file")


def sync_file(path: Path) -> None:
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable; some file systems cannot, and then there is nothing to wait for."""
    with suppress(OSError):
        sync_file(path)


def checksum(path: Path) -> str:
    """XXH3 of the bytes of a file, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
