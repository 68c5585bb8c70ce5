"""Result files: rows of a table in JSON, kept between runs."""

import json
import pathlib
from collections.abc import Callable, Hashable
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"

Row = dict[str, Any]


def folder_of(device: str, given: pathlib.Path | None = None) -> pathlib.Path:
    """The folder of a device's results, made if need be; `given` instead, if there is one."""
    folder = given or RESULTS / device.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Table:
    """The rows of a result file, written after each one.

    A measurement that is made again replaces its earlier row; all others stay, so that one file grows out of several
    commands.

    Attributes:
        rows: of the file and of this run, the newest last.
    """

    def __init__(self, path: pathlib.Path, identity: Callable[[Row], Hashable]) -> None:
        """Begin with what is in the file `path`, if there is one.

        Args:
            path: of the file.
            identity: what rows of the same measurement have in common.
        """
        self._path, self._identity = path, identity
        found: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
        self.rows = [row for row in found if "where" in row]  # files of an older form had rows of one run alone

    def add(self, row: Row) -> None:
        """Take a row in place of an earlier one of the same measurement, and write the file."""
        self.rows = [other for other in self.rows if self._identity(other) != self._identity(row)] + [row]
        whole = self._path.with_suffix(".part")  # a process that is stopped leaves no file cut short
        whole.write_text(json.dumps({"device": row["where"]["device"], "rows": self.rows}, indent=1) + "\n")
        whole.replace(self._path)


def attempt(measure: Callable[[], Row]) -> Row:
    """What `measure` finds, or why it found nothing: {"us": None, "reason": text}; one failure must not end a run."""
    try:
        return measure()
    except Exception as error:
        return {"us": None, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
