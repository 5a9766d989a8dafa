"""The models a recipe names, looked at before anything is started: parent, teacher, and whether they speak alike."""

from pathlib import Path
from typing import Any

from nestling.arch.presets import PRESETS
from nestling.errors import NestlingError
from nestling.sections import TrainSection
from nestling.tokenizer import read_tokenizer
from nestling.weights.elastic import Elastic, open_elastic


def check_models(parent: Path, how: TrainSection) -> None:
    """Refuse a parent without weights or of a kind that cannot be trained, and a teacher with another vocabulary."""
    if not parent.is_dir():
        preset = "is a preset, a shape without weights" if str(parent).lower() in PRESETS else "is no directory"
        raise NestlingError(
            f"parent.model = {str(parent)!r} {preset}; training needs a checkpoint directory "
            "(nestling train --dry-run plans without one)"
        )
    student = open_elastic(parent)
    if not student.uniform:
        raise NestlingError(
            f"parent.model = {str(parent)!r} has sizes of its own per layer; train what it was cut from"
        )
    if "E" in student.architecture.hybrid_override_pattern:
        raise NestlingError(
            f"parent.model = {str(parent)!r} has mixture-of-experts layers, which cannot be trained yet"
        )
    if how.teacher is not None:
        _check_teacher(student, open_elastic(how.teacher))


def _check_teacher(student: Elastic, teacher: Elastic) -> None:
    counts = [one.architecture.vocab_size for one in (student, teacher)]
    paths = [one.checkpoint.path for one in (student, teacher)]
    if counts[0] != counts[1]:
        raise NestlingError(
            f"train.teacher = {str(paths[1])!r} has a vocabulary of {counts[1]:,} tokens and the parent one of "
            f"{counts[0]:,}; a teacher must have the parent's tokens"
        )
    tokens = [read_tokenizer(path).get_vocab() for path in paths]
    if tokens[0] != tokens[1]:
        other = sum(tokens[1].get(token) != number for token, number in tokens[0].items())
        raise NestlingError(
            f"train.teacher = {str(paths[1])!r} has another tokenizer: {other:,} of {len(tokens[0]):,} tokens of the "
            "parent have another number there, or none; a teacher must have the parent's tokens"
        )


def checkpoint_files(directory: Path) -> list[Any]:
    """What tells whether a checkpoint has changed: name, size and time of its weights, and config.json itself."""
    found = open_elastic(directory)
    files = sorted({entry.file for entry in found.checkpoint.entries.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(directory), dict(found.checkpoint.config), stats]
