"""Output directories that appear whole or not at all: they are written aside and renamed into place."""

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nestling.errors import NestlingError
from nestling.weights.files import read_json, reason, sync_directory, sync_file, write_json

MANIFEST = "nestling-files.json"


@contextmanager
def output_directory(out: str | Path, *, overwrite: bool = False, flush: bool = True) -> Iterator[Path]:
    """A fresh hidden directory beside `out`; it becomes `out` by one rename when the block ends well.

    On any exception it is removed and nothing appears; an OSError becomes a NestlingError that names the path. An
    existing `out` must be an empty directory or, with `overwrite`, one that holds only what Nestling wrote: the files
    listed in its own `nestling-files.json`, which is written last. flush: wait until everything is on the disk before
    the rename, so that not even a power cut leaves half of it; without, the system writes it out in its own time.
    """
    target = _resolve(out)
    try:
        _recover(target)
        _check_free(target, overwrite)
        created = _make_parents(target.parent)
    except OSError as error:
        raise NestlingError(f"{out}: cannot be created: {reason(error)}") from error
    partial = _sibling(target, "partial")
    try:
        partial.mkdir()
        yield partial
        _seal(partial, flush)
        _check_free(target, overwrite)
        _move_into_place(partial, target, flush)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(created)
        if isinstance(error, OSError):
            error = NestlingError(f"{error.filename or target}: {reason(error)}; nothing was written to {out}")
        if isinstance(error, NestlingError) and str(partial) in str(error):
            error = NestlingError(str(error).replace(str(partial), str(target)))
        raise error


def check_output(out: str | Path, *, overwrite: bool = False) -> None:
    """Refuse an output directory now that `output_directory` would refuse after the work was done."""
    try:
        _check_free(_resolve(out), overwrite)
    except OSError as error:
        raise NestlingError(f"{out}: cannot be created: {reason(error)}") from error


def _resolve(out: str | Path) -> Path:
    """The real path of `out`; refuses names that cannot be an output directory."""
    if not str(out):
        raise NestlingError("the output directory has no name; give one with --out")
    if "\0" in str(out):
        raise NestlingError(f"{str(out)!r}: cannot be an output directory")
    try:
        target, here = Path(out).resolve(), Path.cwd().resolve()
        inside = here.is_relative_to(target)
    except (OSError, RuntimeError, ValueError) as error:
        raise NestlingError(f"{out}: cannot be an output directory: {reason(error)}") from None
    if inside:
        raise NestlingError(f"{out}: is or contains the current directory; choose a new directory as --out")
    return target


def _check_free(target: Path, overwrite: bool) -> None:
    """Refuse a `target` that may not be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise NestlingError(f"{target}: exists and is not a directory; choose another --out")
    if target.is_mount():  # nothing can be renamed over it: better said now than after hours of work
        raise NestlingError(f"{target}: is a mount point; choose a new directory inside it as --out")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise NestlingError(f"{target}: exists; choose another --out or pass --overwrite")
    _check_ours(target)


def _check_ours(target: Path) -> None:
    """Refuse a directory that holds anything but the files its own manifest lists: never delete what is not ours."""
    if not (target / MANIFEST).is_file():
        raise NestlingError(f"{target}: not replaced, not written by Nestling (no {MANIFEST}); choose another --out")
    manifest = read_json(target / MANIFEST)
    listed = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(listed, dict):
        raise NestlingError(f"{target / MANIFEST}: not a list of files in format 1; choose another --out")
    foreign = sorted(_sizes(target).keys() - listed.keys() - {MANIFEST})
    if foreign:
        raise NestlingError(f"{target}: not replaced, {foreign[0]!r} is not ours; move it or choose another --out")


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file under `directory`, by relative name; a symbolic link counts as a file."""
    sizes = {}
    for folder, subfolders, files in os.walk(directory, onerror=_raise):
        for name in files + [name for name in subfolders if os.path.islink(os.path.join(folder, name))]:
            path = Path(folder, name)
            sizes[path.relative_to(directory).as_posix()] = path.lstat().st_size
    return sizes


def _raise(error: OSError) -> None:
    raise error


def _make_parents(parent: Path) -> list[Path]:
    """Create `parent` and what is missing above it; the directories made, outermost first."""
    missing: list[Path] = []
    while not os.path.lexists(parent):
        missing.insert(0, parent)
        parent = parent.parent
    if not parent.is_dir():
        raise NestlingError(f"{parent}: is not a directory, nothing can be written below it; choose another --out")
    for path in missing:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            _remove_empty(missing)
            raise NestlingError(f"{path}: cannot be created: {reason(error)}") from error
    return missing


def _remove_empty(created: list[Path]) -> None:
    for path in reversed(created):
        with suppress(OSError):
            path.rmdir()


def _sibling(target: Path, kind: str) -> Path:
    """A new hidden name beside `target` that says which process on which host owns it."""
    return target.with_name(f".{target.name}.{kind}-{_host()}-{os.getpid()}-{os.urandom(4).hex()}")


def _host() -> str:
    return platform.node().replace("/", "_").replace("-", "_")


def _recover(target: Path) -> None:
    """Clear away what a killed run left beside `target`; an old version moved aside and not yet replaced comes back."""
    if not target.parent.is_dir():
        return
    for kind in ("old", "partial"):
        prefix = f".{target.name}.{kind}-{_host()}-"
        for path in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
            if _is_alive(path.name.removeprefix(prefix).split("-")[0]):
                continue
            if kind == "old" and not os.path.lexists(target):
                os.rename(path, target)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: str) -> bool:
    """Whether a process of this host has this number; when in doubt, yes."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


def _seal(directory: Path, flush: bool) -> None:
    """Write the manifest as the last file, then push every file and directory to the disk."""
    sizes = sorted(_sizes(directory).items())
    write_json(
        directory / MANIFEST, {"format": 1, "files": {name: {"bytes": size} for name, size in sizes}}, flush=False
    )
    if not flush:
        return
    for folder, _, files in os.walk(directory, topdown=False, onerror=_raise):
        for name in files:
            sync_file(Path(folder, name))
        sync_directory(Path(folder))


def _move_into_place(partial: Path, target: Path, flush: bool) -> None:
    """Rename `partial` to `target`. A full `target` steps aside first and comes back if the rename fails."""
    old = _sibling(target, "old") if target.is_dir() and any(target.iterdir()) else None
    try:
        if old:
            os.rename(target, old)
        os.rename(partial, target)
    except BaseException as error:
        if old and old.exists() and not target.exists():
            os.rename(old, target)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise NestlingError(f"{target}: appeared while this run was writing; choose another --out") from error
        raise
    if flush:
        sync_directory(target.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)  # the new version stands; leftovers go with the next run
