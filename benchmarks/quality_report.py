"""Tables and plots of what `python -m benchmarks.quality_sweep` measured.

    python -m benchmarks.quality_report benchmarks/results/*/quality/*.json --docs docs/quality.md README.md

Writes the plots beside the results, and the tables into documents, between the lines `<!-- NAME: FILE ... -->` and
`<!-- end -->`, where NAME is one of `TABLES` and each FILE a results' path from the document's folder; a table that is
computed takes none. Every mean has its 95 % interval, by bootstrap over windows or needles.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Callable

from benchmarks import quality_formats, quality_plots, quality_rules
from benchmarks.quality_results import Results, conditions

TABLES: dict[str, Callable[..., list[str]]] = {
    "conditions": conditions,
    "caches": quality_rules.caches_table,
    "comparisons": quality_rules.comparisons_table,
    "keys": quality_formats.keys_table,
    "values": quality_formats.values_table,
    "both": quality_formats.both_table,
    "presets": quality_formats.presets_table,
    "needles": quality_formats.needles_table,
    "ruler": quality_formats.ruler_table,
    "preset-bytes": quality_formats.preset_bytes_table,
}
"""By name: what makes a table of results files, of one, several or none."""


def main() -> None:
    """Draw, and fill the documents."""
    options = _parser().parse_args()
    for file in options.results:
        quality_plots.draw(read(file), file)
    for document in options.docs:
        document.write_text(fill(document.read_text(encoding="utf-8"), document.parent), encoding="utf-8")


def read(file: pathlib.Path) -> Results:
    """What `quality_sweep --collect` wrote."""
    results: Results = json.loads(file.read_text(encoding="utf-8"))
    return results


def fill(text: str, folder: pathlib.Path) -> str:
    """A document with its tables made anew; paths in it are taken from `folder`.

    Raises:
        ValueError: a marked table of another name than those in `TABLES`.
    """

    def replace(found: re.Match[str]) -> str:
        name, files = found["name"], found["files"].split()
        if name not in TABLES:
            raise ValueError(f"<!-- {name}: ... --> names no table; wanted one of {sorted(TABLES)}")
        return "\n".join([found["begin"], *TABLES[name](*(read(folder / file) for file in files)), "<!-- end -->"])

    marked = r"(?P<begin><!-- (?P<name>[\w-]+):(?P<files>(?: \S+)*?) -->)\n.*?<!-- end -->"
    return re.sub(marked, replace, text, flags=re.DOTALL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="what quality_sweep --collect wrote")
    parser.add_argument("--docs", type=pathlib.Path, nargs="+", required=True, help="documents to fill")
    return parser


if __name__ == "__main__":
    main()
