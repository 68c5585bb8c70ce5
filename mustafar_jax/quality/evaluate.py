"""Ask a model every example of an evaluation, keep a record of each, and sum them up."""

import collections
import functools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax import generation
from mustafar_jax.cache import PackedCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.checks import not_finite
from mustafar_jax.generation.mesh import each_automatic, to_auto
from mustafar_jax.quality.examples import Example, Problem
from mustafar_jax.quality.forcing import check_fits, compare, empty_cache, hidden_states
from mustafar_jax.quality.metrics import bootstrap_groups
from mustafar_jax.quality.runs import Record, Run

Progress = Callable[[float, int], object]
"""Called as progress(done, total), in examples."""

PADDING = 256
"""Prompts are padded to multiples of this, so that few shapes are compiled."""


class Evaluator:
    """Evaluates caches on one model.

    Args:
        model, tokenizer: as `models.load` gives them.
        batch: examples at once.
        padding: prompts are padded to a multiple of this.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int = 8, padding: int = PADDING) -> None:
        self.model, self.tokenizer, self.batch, self.padding = to_auto(model), tokenizer, batch, padding

    def run(
        self, config: CompressionConfig, examples: Sequence[Example], run: Run, progress: Progress | None = None
    ) -> list[Problem]:
        """Evaluate the examples of which the run has no record.

        Args:
            config: how caches are compressed; examples with a given continuation are compared with dense ones as well.
            examples: with different ids.
            run: gets the records.
            progress: called as progress(done, total) when some more of the examples are done, or a part of one.

        Returns:
            Which examples were left out, since the model's logits were not finite; they get no record.

        Raises:
            ValueError: two examples of one id, a prompt that leaves no room for what follows it, or values beyond a
                cache's slots, naming the examples; records of earlier batches are kept.
        """
        return self.run_together([(config, run)], examples, progress)

    def run_together(
        self,
        runs: Sequence[tuple[CompressionConfig, Run]],
        examples: Sequence[Example],
        progress: Progress | None = None,
    ) -> list[Problem]:
        """`run` for several configs: what they have in common, the prompts, passes the model once.

        An example that is left out under one of them may have a record under another.
        """
        counts = collections.Counter(example.id for example in examples)
        if twice := [id_ for id_, count in counts.items() if count > 1]:
            raise ValueError(f"examples have ids {twice} more than once; wanted different ones")
        missing = [run.missing(counts) for _, run in runs]
        pending = [example for example in examples if any(example.id in ids for ids in missing)]
        done, problems = len(examples) - len(pending), []

        def report(more: float) -> None:
            if progress is not None:
                progress(done + more, len(examples))

        report(0)
        generation.keep_programs(2 * (len(runs) + 1))  # a shape's batches are of two sizes at most, dense ones too
        for batch in self._batches(pending):
            asked = [i for i, ids in enumerate(missing) if any(example.id in ids for example in batch)]
            answer = self._write if batch[0].gold is None else self._force
            answers = answer([runs[i][0] for i in asked], batch, functools.partial(_times, report, len(batch)))
            for i, records in zip(asked, each_automatic(answers), strict=True):
                runs[i][1].add(record for record in records if record["id"] in missing[i])
                answered = {record["id"] for record in records}
                problems += [self._broken(example) for example in batch if example.id in missing[i] - answered]
            done += len(batch)
            report(0)
        return list(dict.fromkeys(problems))

    def _broken(self, example: Example) -> Problem:
        return Problem(f"example {example.id}", 0, not_finite(self.model))

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Examples of one shape that stop alike, the longest first: what does not fit the memory fails at once."""
        shapes: dict[tuple[Any, ...], list[Example]] = {}
        for example in examples:
            after = example.max_new_tokens if example.gold is None else -len(example.gold)
            how = self._padded(example), after, example.min_new_tokens, example.stop
            shapes.setdefault(how, []).append(example)
        for _, alike in sorted(shapes.items(), reverse=True):
            parts = -(-len(alike) // self.batch)  # as even as can be, so that few sizes are compiled
            for part in range(parts):
                yield alike[part * len(alike) // parts : (part + 1) * len(alike) // parts]

    def _padded(self, example: Example) -> int:
        room = self.model.config.max_position_embeddings - example.after
        if len(example.prompt) > room:
            raise ValueError(f"example {example.id}: {len(example.prompt)} tokens exceed the {room} there is room for")
        return min(room, -(-len(example.prompt) // self.padding) * self.padding)

    def _force(
        self, configs: Sequence[CompressionConfig], batch: list[Example], report: Callable[[float], object]
    ) -> Generator[list[Record], None, None]:
        prompts, lengths = self._prompts(batch)
        gold = np.stack([example.gold for example in batch if example.gold is not None])
        configs, ids = [generation.DENSE, *configs], [example.id for example in batch]
        dense, *hidden = hidden_states(self.model, configs, prompts, lengths, gold, report, names=ids)
        for scores in compare(self.model, dense, hidden, gold):
            yield [
                {"id": example.id, "group": example.group, **example.info, "scores": _forced_scores(*tokens)}
                for example, *tokens in zip(batch, *map(np.asarray, scores), strict=True)
                if np.isfinite(tokens[:3]).all()
            ]

    def _write(
        self, configs: Sequence[CompressionConfig], batch: list[Example], report: Callable[[float], object]
    ) -> Generator[list[Record], None, None]:
        prompts, lengths = self._prompts(batch)
        stop, first = {*self.model.config.eos_ids, *batch[0].stop}, batch[0]
        for done, config in enumerate(configs, start=1):
            result = generation.generate(
                self.model,
                prompts,
                lengths=lengths,
                max_new_tokens=first.max_new_tokens,
                min_new_tokens=first.min_new_tokens,
                config=config,
                eos_id=sorted(stop) or None,
                padding=False,  # the prompts are padded
            )
            check_fits(config, result.overflow, [example.id for example in batch])
            written = zip(batch, *map(np.asarray, (result.tokens, result.lengths, result.finite)), strict=True)
            yield [self._written(*each) for *each, is_finite in written if is_finite]
            report(done / len(configs))

    def _written(self, example: Example, tokens: np.ndarray, length: int) -> Record:
        assert example.score is not None
        text = self.tokenizer.decode(tokens[:length], skip_special_tokens=True)
        scores = {"score": example.score(text)}
        return {"id": example.id, "group": example.group, **example.info, "prediction": text, "scores": scores}

    def _prompts(self, batch: list[Example]) -> tuple[np.ndarray, np.ndarray]:
        """int32 [B, S], padded on the right, and lengths."""
        prompts = np.zeros((len(batch), self._padded(batch[0])), np.int32)
        for row, example in zip(prompts, batch, strict=True):
            row[: len(example.prompt)] = example.prompt
        return prompts, np.asarray([len(example.prompt) for example in batch], np.int32)


def _times(report: Callable[[float], object], factor: float, share: float) -> None:
    report(factor * share)


TOKENS = ("perplexity", "loss", "dense_loss", "increase", "kl", "agreement")
"""What a summary of long continuations shows."""

ANSWERS = ("probability", "exact", "loss", "increase", "kl")
"""What a summary of short continuations, each an answer as a whole, shows."""


def summarise(records: Sequence[Record], names: Sequence[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """For "all" and each group: the mean of scores with its interval; of all, every group counts alike.

    Args:
        records: as a `Run` holds them.
        names: which scores; all that the records have if None. "perplexity" is exp of the mean loss. Its interval is
            exp of the loss's: the exponential of each resampled mean in order is that of the ordered means, so this is
            the bootstrap's own interval, which is not symmetric. All continuations count alike, so where they differ
            in length it is no perplexity per token.
    """
    groups: dict[str, list[dict[str, float]]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record["scores"])
    alone = {group: _summary([members], names) for group, members in groups.items() if group}
    return {"all": _summary(list(groups.values()), names)} | alone if groups else {}


def _summary(groups: list[list[dict[str, float]]], names: Sequence[str] | None) -> dict[str, dict[str, float]]:
    scores = [each for members in groups for each in members]
    shared = [name for name in scores[0] if all(name in each for each in scores)]  # earlier versions had fewer
    found = {name: bootstrap_groups([[each[name] for each in members] for members in groups]) for name in shared}
    if "loss" in found:
        with np.errstate(over="ignore"):  # infinite is what it is then
            found["perplexity"] = found["loss"] | {p: float(np.exp(found["loss"][p])) for p in ("mean", "low", "high")}
    return {name: found[name] for name in (shared if names is None else names) if name in found}


def cache_bytes(model: Any, config: CompressionConfig, capacity: int) -> dict[str, float]:
    """Bytes of one sequence's caches, all layers: held, of a dense one, and with only the slots that masks fill.

    Those of bfloat16 caches, as are used where bytes matter, whatever dtype the model is evaluated in.
    """
    cache = jax.eval_shape(
        functools.partial(empty_cache, model, config, batch=1, capacity=capacity, dtype=jnp.bfloat16)
    )
    layers = model.config.num_layers
    spare = _spare_nbytes(cache) if isinstance(cache, PackedCache) else 0
    return {
        "capacity": capacity,
        "held": cache.nbytes * layers,
        "dense": cache.dense_nbytes * layers,
        "own_count": (cache.nbytes - spare) * layers,
    }


def _spare_nbytes(cache: PackedCache) -> float:
    """Bytes of slots that no mask fills, of rules whose rows are unequal."""
    spare = 0.0
    for store, sparsity in zip((cache.keys, cache.values), cache.config.true_sparsity(cache.head_dim), strict=True):
        rows = store.packed
        free = rows.slots - (1 - sparsity) * rows.head_dim
        bits = rows.codec.bits or 8 * rows.payload.dtype.itemsize
        spare += math.prod(rows.leading) * rows.padded_length * free * bits / 8
    return spare


def _forced_scores(
    loss: np.ndarray, dense_loss: np.ndarray, kl: np.ndarray, best: np.ndarray, agrees: np.ndarray
) -> dict[str, float]:
    """Of one continuation [n]: means over its tokens, and `exact`, whether each is the likeliest."""
    return {
        "loss": float(loss.mean()),
        "dense_loss": float(dense_loss.mean()),
        "increase": float((loss - dense_loss).mean()),
        "kl": float(kl.mean()),
        "probability": float(np.exp(-loss).mean()),
        "exact": float(best.all()),
        "agreement": float(agrees.mean()),
    }
