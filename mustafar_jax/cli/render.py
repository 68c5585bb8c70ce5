"""What several commands show: progress, sizes, tables."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def progress_bars() -> Progress:
    """Bars on stderr, gone when they are left; none where that is no terminal."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    # Where it is no terminal that shows them, the bars would leave an empty line.
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def bar(progress: Progress, name: str) -> Callable[[float, float], None]:
    """A new bar, as a function of what is done and the total."""
    task = progress.add_task(name, total=None)

    def show(done: float, total: float) -> None:
        progress.update(task, completed=done, total=total)

    return show


def table(title: str, columns: Sequence[str], texts: Sequence[str] = ()) -> Table:
    """An empty table of numbers, aligned to the right, and of the columns `texts`, to the left."""
    made = Table(title=title)
    for column in columns:
        made.add_column(column, justify="left" if column in texts else "right")
    return made


def size(nbytes: float) -> str:
    """Bytes as a person reads them, in powers of 1000: 13.48 GB."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} GB"
