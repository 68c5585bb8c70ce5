"""A session of an evaluation: what is asked, of which model, in which folder, and what it comes to."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mustafar_jax.config import CompressionConfig
from mustafar_jax.quality.evaluate import Evaluator, Progress, cache_bytes, summarise
from mustafar_jax.quality.examples import Example, Problem
from mustafar_jax.quality.runs import Run, digest, fingerprint
from mustafar_jax.quality.tasks import TASKS

_SIDES = ("k_sparsity", "v_sparsity", "k_method", "v_method")
"""The fields that begin a folder's name."""

_ORDER = ("sink_tokens", "center_keys", "weigh_keys", "rescale_values", "residual_length", "group", "v_slots")
"""The order of other fields in the names of folders that there are; later fields follow in the config's order."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an evaluation comes to.

    Attributes:
        metrics: by group of examples and score, as `evaluate.summarise` gives them.
        nbytes: of a cache that holds the longest example, as `evaluate.cache_bytes` gives them.
        problems: what is wrong with the data, and which examples the model has no finite logits for: left out.
        folder: where records and metrics are.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    nbytes: dict[str, float]
    problems: Sequence[Problem]
    folder: pathlib.Path


class Session:
    """An evaluation through one kind of cache, kept in a folder; one that was interrupted goes on there.

        session = Session("perplexity", CompressionConfig.recommended(), data=["novel.txt"])
        outcome = session.run(*models.load(name, dtype="float32"), source=name)

    Args:
        task: a name in `tasks.TASKS`.
        config: how the cache is compressed.
        data: files, or what the task takes for one.
        options: the task's own, by name; its defaults for others.
        folder: for the results; results/TASK/ and `folder_name` if None.
        limit: take the first so many examples, all if None.

    Raises:
        ValueError: an unknown task, data that is missing, no file or of one name with other data, an option that is
            missing; before any work.
        TypeError: an option that the task has not.
    """

    def __init__(
        self,
        task: str,
        config: CompressionConfig,
        *,
        data: Sequence[str | pathlib.Path] = (),
        options: Mapping[str, Any] | None = None,
        folder: str | pathlib.Path | None = None,
        limit: int | None = None,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"{task=} must be one of {sorted(TASKS)}")
        if limit is not None and limit < 1:
            raise ValueError(f"{limit=} must be at least 1, or None")
        self.name, self.task, self.config, self.limit = task, TASKS[task], config, limit
        self.options = self.task.complete(options or {})
        self.data = [self.task.locate(pathlib.Path(file)) for file in data]
        self._check_data()
        self.folder = pathlib.Path("results") / task / folder_name(config) if folder is None else pathlib.Path(folder)

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        source: str,
        batch: int = 8,
        progress: Progress | None = None,
        warn: Callable[[Problem], object] | None = None,
    ) -> Outcome:
        """Evaluate the examples that have no record yet, and write and return the metrics of all.

        Args:
            model, tokenizer: as `models.load` gives them.
            source: the model's folder, file or hub id, by which results are told from another model's.
            batch: examples at once.
            progress: called as progress(done, total), in examples.
            warn: called with each problem: of the data before the work, of examples without finite logits after it.

        Raises:
            ValueError: no example, or none with finite logits, a folder that holds records of other settings, and as
                `Evaluator.run` does.
        """
        examples, problems = self.task.examples(
            tokenizer, self.data, model.config.max_position_embeddings, **self.options
        )
        examples = examples[: self.limit]
        for problem in problems:
            if warn is not None:
                warn(problem)
        if not examples:
            raise ValueError("the data and options ask for no example: nothing to evaluate")
        run = Run(self.folder, self.settings(model, source))
        broken = Evaluator(model, tokenizer, batch=batch).run(self.config, examples, run, progress)
        for problem in broken:
            if warn is not None:
                warn(problem)
        if len(broken) == len(examples):
            raise ValueError(f"no example could be evaluated; {broken[0]}")
        problems = [*problems, *broken]
        outcome = Outcome(self._metrics(examples, run), self._nbytes(model, examples), problems, self.folder)
        run.finish({"metrics": outcome.metrics, "bytes": outcome.nbytes, "problems": list(map(str, problems))})
        return outcome

    def settings(self, model: Any, source: str) -> dict[str, Any]:
        """What determines the records, as JSON values. How many of the examples there are to be does not."""
        return {
            "task": self.name,
            "model": identity(source, model.config),
            "dtype": jnp.dtype(model.dtype).name,
            "data": {file.name: fingerprint(file) for file in self.data},
            "options": self.task.settings(self.options),
            "config": dataclasses.asdict(self.config),
        }

    def _check_data(self) -> None:
        if self.task.data and not self.data:
            raise ValueError(f"data is missing: {self.name} needs {self.task.data}")
        files: dict[str, pathlib.Path] = {}
        for file in self.data:
            other = files.setdefault(file.stem, file)
            if other is not file:
                raise ValueError(f"data names {other} and {file}: examples go by their file's name; rename one")
        for file in self.data:
            if not file.is_file():
                raise ValueError(f"data names {file}, which is no file")

    def _metrics(self, examples: Sequence[Example], run: Run) -> dict[str, dict[str, dict[str, float]]]:
        """Of these examples' records; a folder may hold those of more."""
        wanted = {example.id for example in examples}
        records = [record for record in run.records if record["id"] in wanted]
        gather = self.task.gather
        return summarise(records if gather is None else gather(records), self.task.shown)

    def _nbytes(self, model: Any, examples: Sequence[Example]) -> dict[str, float]:
        longest = max(len(example.prompt) + example.after for example in examples)
        return cache_bytes(model, self.config, longest)


def folder_name(config: CompressionConfig) -> str:
    """A preset's name where it is one of codes; else methods, sparsities, and what differs from what is recommended."""
    for name in ("fast", "balanced", "small"):
        if config == CompressionConfig.preset(name):
            return name
    sides = {name: getattr(config, name) for name in _SIDES}
    usual = CompressionConfig.recommended(**sides)
    others = [field.name for field in dataclasses.fields(config) if field.name not in sides]
    others.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    values = [(name, getattr(config, name), getattr(usual, name, None)) for name in others]
    changed = [f"{name}={value}" for name, value, usually in values if value != usually]
    methods = [f"{sides[f'{letter}_method']}-{sides[f'{letter}_sparsity']:g}" for letter in "kv"]
    return re.sub(r"[^\w.=-]", "-", "_".join([*methods, *changed]))


def identity(source: str, config: Any) -> dict[str, str]:
    """Where a model is, as it can be found from anywhere, and a fingerprint of its description."""
    from mustafar_jax.models.gguf import read_header  # of models that come from such a file alone

    path, about = pathlib.Path(source), repr(config)
    if path.is_file():
        header = read_header(path)
        about = repr((header.metadata, header.tensors))
    return {"source": str(path.resolve()) if path.exists() else source, "fingerprint": digest(about.encode())}
