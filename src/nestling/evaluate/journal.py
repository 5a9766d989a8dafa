"""Outputs of an evaluation as they come: lines of JSON, appended, so that an interrupted one goes on where it was.

Several processes write a file each. Those of all but the first are parts of it: it takes them in when they are done,
or, where they were stopped, when it is next opened, by however many processes.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError
from nestling.weights.files import reason, write_file_atomically

Record = dict[str, Any]
Key = tuple[int, int]
"""(item, sample): the place of an output."""


@dataclass(frozen=True)
class Journal:
    """One file: the settings in its first line, then an output a line, in the order in which they were made."""

    path: Path
    settings: Mapping[str, Any]

    def open(self, *, overwrite: bool = False) -> dict[Key, Record]:
        """What was judged before, under the same settings; starts the file where there is none.

        Settings that differ are a NestlingError that names the first. A last line cut off by a crash is dropped.
        """
        parts = sorted(self.path.parent.glob(f"{self.path.stem}.rank*.jsonl"))
        known = self._read(overwrite)
        for part in parts:
            records = {} if overwrite else Journal(part, self.settings)._read(False)
            self.append(record for key, record in records.items() if key not in known)
            known |= records
            part.unlink()
        return known

    def part(self, rank: int) -> "Journal":
        """What another process than the first writes to."""
        return Journal(self.path.with_name(f"{self.path.stem}.rank{rank}.jsonl"), self.settings)

    def _read(self, overwrite: bool) -> dict[Key, Record]:
        """As `open`, of this file alone."""
        head = json.dumps({"settings": dict(self.settings)}, sort_keys=True) + "\n"
        if overwrite or not self.path.exists():
            write_file_atomically(self.path, head.encode())
            return {}
        lines, broken = self._lines()
        before = lines[0].get("settings") if lines else None
        if not isinstance(before, dict):
            raise NestlingError(f"{self.path}: is not the record of an evaluation; choose another --out")
        if changed := difference(before, json.loads(head)["settings"]):
            raise NestlingError(f"{self.path}: {changed}; choose another --out, or --overwrite to begin again")
        if broken:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_file_atomically(self.path, text.encode())
        return {(line["item"], line["sample"]): line for line in lines[1:]}

    def _lines(self) -> tuple[list[Record], bool]:
        """(every whole line, whether the last one is broken)."""
        try:
            *whole, last = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise NestlingError(f"{self.path}: cannot be read: {reason(error)}") from None
        found = []
        for number, line in enumerate(whole, 1):
            try:
                found.append(json.loads(line))
            except ValueError:
                raise NestlingError(
                    f"{self.path}: line {number}: broken JSON; remove the line, or begin again with --overwrite"
                ) from None
        return found, last != b""

    def append(self, records: Iterable[Record]) -> None:
        """Add outputs and wait until they are on the disk."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        try:
            with open(self.path, "ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise NestlingError(f"{self.path}: cannot be written: {reason(error)}") from None


def difference(before: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> str | None:
    """The first setting in which two runs differ: `temperature was 0.6 and is 0`."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if found := difference(old, new, f"{inside}{key}."):
                return found
        elif old != new:
            return f"{inside}{key} was {json.dumps(old)} and is {json.dumps(new)}"
    return None
