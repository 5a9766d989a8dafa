"""Outputs appear whole or not at all, and nothing is deleted that Nestling did not write."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from nestling.errors import NestlingError
from nestling.weights import output
from nestling.weights.files import read_json, write_file_atomically, write_json
from nestling.weights.output import MANIFEST, check_output, output_directory
from refusal import refused


def write(out, text="new", **options):
    with output_directory(out, **options) as partial:
        (partial / "sub").mkdir()
        (partial / "weights").write_text(text)
        (partial / "sub" / "config.json").write_text("{}")


def tree(path):
    """Every path below `path`, hidden ones too, with the text of the files."""
    found = {}
    for folder, folders, files in os.walk(path):
        found |= {str(Path(folder, name).relative_to(path)): None for name in folders}
        found |= {str(Path(folder, name).relative_to(path)): Path(folder, name).read_text() for name in files}
    return found


@contextmanager
def largest_file(n_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_output_appears_with_its_parents_and_manifest(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with output_directory(out) as partial:
        assert partial.parent == out.parent
        assert partial.name.startswith(".out.partial-")
        assert not out.exists()
        (partial / "x").write_bytes(b"123")
        (partial / "deep" / "er").mkdir(parents=True)
        (partial / "deep" / "er" / "y").touch()
    assert os.listdir(out.parent) == ["out"]
    expected = {"format": 1, "files": {"deep/er/y": {"bytes": 0}, "x": {"bytes": 3}}}
    assert json.loads((out / MANIFEST).read_text()) == expected
    plain = tmp_path / "plain"
    plain.mkdir()
    assert out.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("make", [Path, str, lambda path: os.path.relpath(path) + "/"])
def test_any_spelling_of_the_path(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    write(make(tmp_path / "out"))
    assert set(tree(tmp_path / "out")) == {"weights", "sub", "sub/config.json", MANIFEST}


def test_an_empty_directory_or_a_link_to_one_is_filled(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "weights").read_text() == "new"


def failing_write(out, error, **options):
    with output_directory(out, **options) as partial:
        (partial / "weights").write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), NestlingError("x")])
def test_nothing_appears_after_an_exception(tmp_path, error):
    (tmp_path / "kept").mkdir()
    with pytest.raises(type(error)) as caught:
        failing_write(tmp_path / "kept" / "made" / "too" / "out", error)
    assert caught.value is error
    assert tree(tmp_path) == {"kept": None}


def test_an_exception_leaves_the_old_output(tmp_path):
    write(tmp_path / "out", "old")
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        failing_write(tmp_path / "out", KeyboardInterrupt(), overwrite=True)
    assert tree(tmp_path) == before


def test_a_full_disk_is_one_line(tmp_path):
    def fill():
        with output_directory(tmp_path / "out") as partial, largest_file(1000), open(partial / "big", "wb") as file:
            file.write(bytes(2000))

    refused(fill, tmp_path / "out", "File too large", "nothing was written")
    assert tree(tmp_path) == {}

    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    refused(lambda: failing_write(tmp_path / "out", no_space), f"{tmp_path / 'out'}: No space left on device; nothing")


def test_a_full_disk_at_the_manifest_is_one_line(tmp_path):
    def fill():
        with output_directory(tmp_path / "out") as partial:
            (partial / "x").touch()
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with largest_file(resource.getrlimit(resource.RLIMIT_FSIZE)[0]):
        message = refused(fill, tmp_path / "out" / MANIFEST, "File too large")
    assert "partial" not in message
    assert tree(tmp_path) == {}


def test_an_existing_output_is_refused_before_anything_is_done(tmp_path):
    write(tmp_path / "out", "old")
    before = tree(tmp_path)
    refused(lambda: write(tmp_path / "out"), tmp_path / "out", "exists", "choose another --out or pass --overwrite")
    assert tree(tmp_path) == before
    (tmp_path / "file").touch()
    refused(lambda: write(tmp_path / "file", overwrite=True), tmp_path / "file", "is not a directory")
    refused(lambda: write(tmp_path / "file" / "out"), tmp_path / "file", "is not a directory")
    refused(lambda: write(tmp_path / "file" / "deep" / "out"), tmp_path / "file", "is not a directory")


def test_overwrite_replaces_what_nestling_wrote(tmp_path):
    write(tmp_path / "out", "old")
    with output_directory(tmp_path / "out", overwrite=True) as partial:
        (partial / "other").write_text("new")
        assert (tmp_path / "out" / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
    assert set(tree(tmp_path / "out")) == {"other", MANIFEST}


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", "new/notes.txt", ".hidden"])
def test_overwrite_never_deletes_a_foreign_file(tmp_path, name):
    out = tmp_path / "out"
    write(out, "old")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = tree(tmp_path)
    refused(lambda: write(out, overwrite=True), out, repr(name), "not replaced")
    assert tree(tmp_path) == before


def test_overwrite_never_deletes_a_foreign_link(tmp_path):
    out = tmp_path / "out"
    write(out)
    (out / "sub" / "link").symlink_to(tmp_path)
    refused(lambda: write(out, overwrite=True), "'sub/link'")
    (out / "sub" / "link").unlink()
    (out / "dangling").symlink_to("nowhere")
    refused(lambda: write(out, overwrite=True), "'dangling'")


def test_overwrite_never_deletes_what_appears_meanwhile(tmp_path):
    out = tmp_path / "out"
    write(out, "old")

    def slow():
        with output_directory(out, overwrite=True):
            (out / "notes.txt").write_text("mine")

    refused(slow, "'notes.txt'")
    assert (out / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": []}'])
def test_overwrite_needs_the_manifest(tmp_path, manifest):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("mine")
    if manifest is not None:
        (tmp_path / "out" / MANIFEST).write_text(manifest)
    before = tree(tmp_path)
    refused(lambda: write(tmp_path / "out", overwrite=True), tmp_path / "out", MANIFEST)
    assert tree(tmp_path) == before


def test_another_run_that_was_faster_keeps_its_output(tmp_path):
    def race():
        with output_directory(tmp_path / "out"):
            write(tmp_path / "out", "theirs")

    refused(race, "exists")
    assert (tmp_path / "out" / "weights").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_the_old_output_comes_back_when_the_new_one_cannot_move_in(tmp_path, monkeypatch, error):
    write(tmp_path / "out", "old")
    before = tree(tmp_path)
    rename = os.rename

    def failing(source, target):
        if ".partial-" in str(source):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else NestlingError):
        write(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before


def test_check_output_refuses_early_and_makes_nothing(tmp_path):
    check_output(tmp_path / "a" / "out")
    write(tmp_path / "out")
    check_output(tmp_path / "out", overwrite=True)
    refused(lambda: check_output(tmp_path / "out"), tmp_path / "out", "exists")
    (tmp_path / "out" / "notes.txt").touch()
    refused(lambda: check_output(tmp_path / "out", overwrite=True), "'notes.txt'")
    assert os.listdir(tmp_path) == ["out"]


def test_names_that_cannot_be_an_output(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    refused(lambda: write(""), "no name")
    for name in (Path(""), ".", "/", "..", here, tmp_path):
        refused(lambda name=name: write(name, overwrite=True), "current directory")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: write(tmp_path / "loop"), tmp_path / "loop", "directory")
    refused(lambda: write(tmp_path / "loop" / "out"), tmp_path / "loop", "directory")
    refused(lambda: write("a\0b"), "'a\\x00b'")
    refused(lambda: write("n" * 300), "File name too long")
    refused(lambda: write("n" * 250), "File name too long")
    assert sorted(os.listdir(tmp_path)) == ["here", "loop"]
    assert os.listdir(here) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc that refuses new directories")
def test_a_parent_that_takes_nothing():
    refused(lambda: write("/proc/nestling"), "/proc/nestling")
    refused(lambda: write("/proc/nestling/out"), "/proc/nestling", "cannot be created")
    refused(lambda: write("/proc", overwrite=True), "mount point")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    refused(lambda: write(tmp_path / "out"), "Permission denied")
    tmp_path.chmod(0o700)


KILLED = """
import os, signal, sys
from nestling.weights.output import output_directory
with output_directory(sys.argv[1], overwrite=True) as partial:
    (partial / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_run(out):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], env=environment)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_run_leaves_nothing_visible_and_the_next_one_cleans_up(tmp_path):
    killed_run(tmp_path / "out")
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.partial-")
    write(tmp_path / "other")
    assert left in os.listdir(tmp_path)
    write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_the_partial_output_of_a_living_process_stays(tmp_path):
    with output_directory(tmp_path / "out") as partial:
        (partial / "weights").write_text("slow")
        host = output._host()
        owners = [f"{host}-{os.getppid()}", "elsewhere-999999999", f"{host}-me"]
        names = [f".out.partial-{owner}-0" for owner in owners]
        for name in names:
            (tmp_path / name).mkdir()
        killed_run(tmp_path / "out")
        assert partial.exists()
        (tmp_path / f".out.partial-{host}-999999999-0").mkdir()
        output._recover(tmp_path / "out")
        assert set(os.listdir(tmp_path)) == {partial.name, *names}
    assert (tmp_path / "out" / "weights").read_text() == "slow"


def test_an_old_output_stranded_by_a_kill_comes_back(tmp_path):
    write(tmp_path / "out", "old")
    os.rename(tmp_path / "out", tmp_path / f".out.old-{output._host()}-999999999-0")
    refused(lambda: write(tmp_path / "out"), "exists")
    assert (tmp_path / "out" / "weights").read_text() == "old"
    write(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "new"


def test_json_both_ways(tmp_path):
    value = {"name": "Größe", "limit": float("inf"), "list": [1, 2.5, None]}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "name": "Größe",\n')
    assert text.endswith("}\n")
    assert read_json(tmp_path / "x.json") == value
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["line 1", "broken JSON"]),
        (b'{\n"a": 1,\n"b" 2}', ["line 3", "broken JSON"]),
        (b"[1]", ["must hold a JSON object, holds a list"]),
        (b"3", ["must hold a JSON object, holds a int"]),
        (b"\xff", ["cannot be read", "utf-8"]),
        (b"[" * 200_000, ["broken JSON"]),
        (b"9" * 5000, ["broken JSON"]),
    ],
)
def test_broken_json(tmp_path, data, words):
    (tmp_path / "x.json").write_bytes(data)
    refused(lambda: read_json(tmp_path / "x.json"), tmp_path / "x.json", *words)


def test_missing_and_unreadable_json(tmp_path):
    refused(lambda: read_json(tmp_path / "none"), tmp_path / "none", "no such file")
    refused(lambda: read_json(tmp_path), tmp_path, "cannot be read", "directory")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    write_file_atomically(path, b"old")
    write_file_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with largest_file(1000):
        refused(lambda: write_file_atomically(path, bytes(2000)), path, "cannot be written", "File too large")
    assert tree(tmp_path) == {"x": "new"}
    refused(lambda: write_file_atomically(tmp_path / "none" / "x", b""), tmp_path / "none" / "x", "No such file")
    refused(lambda: write_file_atomically(tmp_path, b""), tmp_path, "cannot be written")
