"""The models a recipe names, looked at before anything is started: parent, teacher, and whether they speak alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nestling.arch.presets import PRESETS
from nestling.errors import NestlingError
from nestling.recipe import Recipe, parent_architecture
from nestling.sections import TrainSection
from nestling.tokenizer import character_tokenizer, read_tokenizer
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
    if how.teacher is not None:
        _check_teacher(student.architecture.vocab_size, lambda: read_tokenizer(parent), open_elastic(how.teacher))


def check_scratch_teacher(recipe: Recipe) -> None:
    """Refuse a teacher with another vocabulary than that of a parent that is yet to be trained."""
    teacher = open_elastic(str(recipe.train.teacher))
    own = character_tokenizer if recipe.data is None else lambda: read_tokenizer(recipe.text_tokenizer)
    _check_teacher(parent_architecture(recipe).vocab_size, own, teacher)


def _check_teacher(vocabulary: int, tokenizer: Callable[[], Any], teacher: Elastic) -> None:
    path, count = teacher.checkpoint.path, teacher.architecture.vocab_size
    if vocabulary != count:
        raise NestlingError(
            f"train.teacher = {str(path)!r} has a vocabulary of {count:,} tokens and the parent one of "
            f"{vocabulary:,}; a teacher must have the parent's tokens"
        )
    tokens = [one.get_vocab() for one in (tokenizer(), read_tokenizer(path))]
    if tokens[0] != tokens[1]:
        other = sum(tokens[1].get(token) != number for token, number in tokens[0].items())
        raise NestlingError(
            f"train.teacher = {str(path)!r} has another tokenizer: {other:,} of {len(tokens[0]):,} tokens of the "
            "parent have another number there, or none; a teacher must have the parent's tokens"
        )


def checkpoint_files(directory: Path) -> list[Any]:
    """What tells whether a checkpoint has changed: name, size and time of all its files, and config.json itself."""
    found = open_elastic(directory)
    files = sorted(file for file in directory.iterdir() if file.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(directory), dict(found.checkpoint.config), stats]
