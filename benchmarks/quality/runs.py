"""A folder that holds an evaluation: its settings, a record per example as they come, and the metrics at the end."""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


class Run:
    """A results folder. An evaluation that was interrupted continues with the examples that have no record yet.

    Files:
        settings.json: what is evaluated and how; a folder with other settings is refused.
        records.jsonl: one object per example, with its `id`.
        metrics.json: what they come to.

    Args:
        folder: made if missing.
        settings: JSON values; they must determine the records.

    Raises:
        ValueError: the folder holds a run with other settings, or a record that cannot be read.
    """

    def __init__(self, folder: pathlib.Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists
        self._check(folder / "settings.json", settings)
        write_json(folder / "settings.json", settings)
        self.records = _read_records(folder / "records.jsonl")

    def missing(self, ids: Iterable[str]) -> set[str]:
        """Those that have no record."""
        return set(ids) - {record["id"] for record in self.records}

    def add(self, records: Iterable[Record]) -> None:
        """Append records, each on a line of its own, and leave them on disk."""
        records = list(records)
        with open(self.folder / "records.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.records += records

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics."""
        write_json(self.folder / "metrics.json", metrics)

    @staticmethod
    def _check(file: pathlib.Path, settings: dict[str, Any]) -> None:
        if not file.exists():
            return
        old = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
        if changed:
            differences = "; ".join(f"{name}: {old.get(name)!r}, now {settings.get(name)!r}" for name in changed)
            raise ValueError(f"{file} is of a run with other settings ({differences}); choose another folder")


def write_json(file: pathlib.Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


def fingerprint(file: pathlib.Path) -> str:
    """Of a data file's contents, so that a run is not continued on other data."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _read_records(file: pathlib.Path) -> list[Record]:
    """The records of a run; a last line that was cut short is taken off the file."""
    if not file.exists():
        return []
    whole, _, rest = file.read_bytes().rpartition(b"\n")
    if rest:
        file.write_bytes(whole + b"\n" if whole else b"")
    try:
        return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
    except ValueError as error:
        raise ValueError(f"{file} holds a line that is no record: {error}") from error
