"""What Hugging Face `datasets` reads, as a source: saved by it, files of a format it knows, or a stream from a hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from nestling.data.chat import BadDocument, is_chat
from nestling.data.records import Record, Value, matching
from nestling.errors import NestlingError, nearest

FORMATS = ("arrow", "csv", "json", "parquet", "text")  # names that stand for `data_files` in such a format
SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves in a directory


@dataclass(frozen=True)
class Dataset:
    """A column of a split of a dataset, read in order, its first `limit` rows: a stream need not have an end.

    Whatever it is, it is read in a stream, so that nothing is copied into the library's own cache. What a hub holds
    under a name may change and is not asked again once it has been tokenised; another `revision` is another source.
    """

    dataset: str  # a directory, one of FORMATS, or with `streaming` what a hub calls it
    split: str = "train"
    column: str = "text"
    config: str | None = None
    data_files: str | None = None  # a pattern, within the directory if there is one; or an address
    revision: str | None = None  # of a dataset on a hub
    limit: int | None = None
    streaming: bool = False

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.dataset, self.config, self.data_files) if part)

    @property
    def identity(self) -> dict[str, Any]:
        given = {key: getattr(self, key) for key in ("config", "data_files", "revision", "limit")}
        asked = {"dataset": self.dataset, "split": self.split, "column": self.column}
        return asked | {key: value for key, value in given.items() if value is not None}

    @property
    def files(self) -> tuple[Path, ...]:
        """Those on this machine; empty for a stream from elsewhere."""
        if self.data_files is None:
            return tuple(sorted(path for path in Path(self.dataset).rglob("*") if path.is_file()))
        if self._is_directory:
            return matching(str(Path(self.dataset) / self.data_files))
        is_here = self.dataset in FORMATS and "://" not in self.data_files
        return matching(self.data_files) if is_here else ()

    @property
    def total(self) -> tuple[int, str]:
        count = len(self._opened) if hasattr(self._opened, "__len__") else self.limit or 0
        return min(count, self.limit or count), "documents"

    def records(self) -> Iterator[Record]:
        with self._telling():
            for number, row in enumerate(islice(self._opened, self.limit)):
                where = f"{self.name}, {self.split}, row {number}"
                yield Record(where, partial(self._value, row.get(self.column), where), 1)

    def _value(self, value: Any, where: str) -> Value:
        if isinstance(value, str) or is_chat(value):
            return value
        raise BadDocument(f"{where}: column {self.column!r} has neither a text nor a list of messages")

    @property
    def _is_directory(self) -> bool:
        return Path(self.dataset).is_dir()

    @property
    def _is_saved(self) -> bool:
        return any((Path(self.dataset) / name).is_file() for name in SAVED)

    @cached_property
    def _opened(self) -> Any:
        """The split's rows, whose column is there."""
        self._check()
        with self._telling():
            opened = self._split(self._load())
            columns = opened.column_names or list(next(iter(opened), {}))
        if columns and self.column not in columns:
            raise NestlingError(f"data: {self.name} has no column {self.column!r}; {nearest(self.column, columns)}")
        return opened

    def _check(self) -> None:
        """Refuse what is no dataset without asking anybody."""
        if self._is_saved:
            if given := [key for key in ("config", "data_files", "revision") if getattr(self, key)]:
                raise NestlingError(f"data: {self.dataset} was saved by datasets and has no {given[0]}")
        elif self.dataset in FORMATS and not self._is_directory:
            if self.data_files is None:
                raise NestlingError(f"data: dataset = {self.dataset!r} is a format; data_files says which files")
        elif not self._is_directory and not self.streaming:
            raise NestlingError(
                f"data: {self.dataset} is not a directory; name one that datasets saved, or one of Parquet files, or "
                f"a format ({', '.join(FORMATS)}) and data_files, or set streaming = true to read a dataset of that "
                "name from a hub"
            )

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise NestlingError("dataset = … needs Hugging Face datasets: pip install 'nestling[datasets]'") from None
        if self._is_saved:
            return datasets.load_from_disk(self.dataset)
        files = [str(file.resolve()) for file in self.files] if self.data_files else []
        found = files or self.data_files
        return datasets.load_dataset(
            self.dataset, self.config, data_files=found, revision=self.revision, streaming=True
        )

    def _split(self, opened: Any) -> Any:
        if not isinstance(opened, dict):
            return opened  # saved without splits
        if self.split not in opened:
            raise NestlingError(f"data: {self.name} has no split {self.split!r}; {nearest(self.split, opened)}")
        return opened[self.split]

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What the library raises, from pyarrow's errors to a hub's, as one line."""
        try:
            yield
        except NestlingError:
            raise
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise NestlingError(f"data: {self.name} cannot be read as a dataset: {said}{self._hint(error)}") from None

    def _hint(self, error: Exception) -> str:
        if self._is_directory or self.dataset in FORMATS or not isinstance(error, OSError):
            return ""
        return (
            f"; no directory here is called {self.dataset!r}, so a hub was asked: check the name, the network and "
            "HF_HUB_OFFLINE, or give a directory"
        )
