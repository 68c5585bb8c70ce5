"""A folder that holds an evaluation: its settings, a record per example as they come, and the metrics at the end."""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


class Run:
    """A results folder. An evaluation that was interrupted continues with the examples that have no record yet.

    Files:
        settings.json: what is evaluated and how; a folder that holds records of other settings is refused.
        records.jsonl: one object per example, with its `id`.
        metrics.json: what they come to.

    Args:
        folder: made if missing.
        settings: JSON values; they must determine the records.

    Raises:
        ValueError: the folder holds records of a run with other settings, or a file that cannot be read, naming it
            and the line.
    """

    def __init__(self, folder: pathlib.Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists
        self.records = _read_records(folder / "records.jsonl")
        if self.records:
            self._check(folder / "settings.json", settings)
        write_json(folder / "settings.json", settings)

    def missing(self, ids: Iterable[str]) -> set[str]:
        """Those that have no record."""
        return set(ids) - {record["id"] for record in self.records}

    def add(self, records: Iterable[Record]) -> None:
        """Append records, each on a line of its own, and leave them on disk."""
        records = list(records)
        with open(self.folder / "records.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        self.records += records

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics."""
        write_json(self.folder / "metrics.json", metrics)

    @staticmethod
    def _check(file: pathlib.Path, settings: dict[str, Any]) -> None:
        if not file.exists():
            return
        old = _parse(file.read_bytes(), str(file), "settings")
        changed = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
        if changed:
            differences = "; ".join(f"{name}: {old.get(name)!r}, now {settings.get(name)!r}" for name in changed)
            raise ValueError(f"{file} is of a run with other settings ({differences}); take another --output")


def write_json(file: pathlib.Path, value: Any) -> None:
    """Write a JSON file whole or not at all; a number that is infinite, which JSON has none of, is null."""
    partial = file.with_suffix(".partial")
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)


def _finite(value: Any) -> Any:
    """The value with None in place of infinite numbers."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def fingerprint(file: pathlib.Path) -> str:
    """Of a data file's contents, so that a run is not continued on other data."""
    return digest(file.read_bytes())


def digest(data: bytes) -> str:
    """Sixteen characters that are others for other data."""
    return hashlib.sha256(data).hexdigest()[:16]


def _read_records(file: pathlib.Path) -> list[Record]:
    """The records of a run; a last line that was cut short is taken off the file."""
    if not file.exists():
        return []
    whole, _, rest = file.read_bytes().rpartition(b"\n")
    if rest:
        file.write_bytes(whole + b"\n" if whole else b"")
    records = []
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if line:
            records.append(_parse(line, f"{file}:{number}", "record"))
            if not isinstance(records[-1].get("id"), str):
                raise ValueError(f"{file}:{number} is no record: it has no id, only {sorted(records[-1])}")
    return records


def _refuse(name: str) -> None:
    """Called for NaN and infinities, which Python's parser takes, and JSON has not."""
    raise ValueError(f"{name} is no number of JSON's")


def _parse(text: bytes, where: str, what: str) -> dict[str, Any]:
    """The JSON object of a text; ValueError saying where it stands and what it should be."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except ValueError as error:  # JSON's or UTF-8's
        raise ValueError(f"{where} is no {what}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no {what}: a JSON {type(value).__name__}; wanted an object")
    return value
