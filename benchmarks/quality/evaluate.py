"""Ask a model every example of an evaluation, keep a record of each, and sum them up."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax import generation
from mustafar_jax.bitmap import BitmapArray
from mustafar_jax.cache import PackedCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.quality.examples import Example
from mustafar_jax.quality.forcing import Kind, compare, empty_cache, hidden_states
from mustafar_jax.quality.metrics import bootstrap
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
        self.model, self.tokenizer, self.batch, self.padding = model, tokenizer, batch, padding

    def run(self, kind: Kind, examples: Sequence[Example], run: Run, progress: Progress | None = None) -> None:
        """Evaluate the examples of which the run has no record.

        Args:
            kind: how caches are compressed; examples with a given continuation are compared with dense ones as well.
            examples: with different ids.
            run: gets the records.
            progress: called as progress(done, total) when some more of the examples are done, or a part of one.
        """
        self.run_together([(kind, run)], examples, progress)

    def run_together(
        self, runs: Sequence[tuple[Kind, Run]], examples: Sequence[Example], progress: Progress | None = None
    ) -> None:
        """`run` for several kinds of caches: what they have in common, the prompts, passes the model once."""
        missing = [run.missing(example.id for example in examples) for _, run in runs]
        pending = [example for example in examples if any(example.id in ids for ids in missing)]
        done = len(examples) - len(pending)

        def report(more: float) -> None:
            if progress is not None:
                progress(done + more, len(examples))

        report(0)
        for batch in self._batches(pending):
            asked = [i for i, ids in enumerate(missing) if any(example.id in ids for example in batch)]
            answer = self._write if batch[0].gold is None else self._force
            answers = answer([runs[i][0] for i in asked], batch, functools.partial(_times, report, len(batch)))
            for i, records in zip(asked, answers, strict=True):
                runs[i][1].add(record for record in records if record["id"] in missing[i])
            done += len(batch)
            report(0)

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Examples that fit one shape, the longest first, so that what does not fit the memory fails at once."""
        shapes: dict[tuple[int, int], list[Example]] = {}
        for example in examples:
            after = example.max_new_tokens if example.gold is None else -len(example.gold)
            shapes.setdefault((self._padded(example), after), []).append(example)
        for _, alike in sorted(shapes.items(), reverse=True):
            parts = -(-len(alike) // self.batch)  # as even as can be, so that few sizes are compiled
            for part in range(parts):
                yield alike[part * len(alike) // parts : (part + 1) * len(alike) // parts]

    def _padded(self, example: Example) -> int:
        after = example.max_new_tokens if example.gold is None else len(example.gold)
        room = self.model.config.max_position_embeddings - after
        if len(example.prompt) > room:
            raise ValueError(f"example {example.id}: {len(example.prompt)} tokens exceed the {room} there is room for")
        return min(room, -(-len(example.prompt) // self.padding) * self.padding)

    def _force(
        self, kinds: Sequence[Kind], batch: list[Example], report: Callable[[float], object]
    ) -> Iterator[list[Record]]:
        prompts, lengths = self._prompts(batch)
        gold = np.stack([example.gold for example in batch if example.gold is not None])
        dense, *hidden = hidden_states(self.model, [generation.DENSE, *kinds], prompts, lengths, gold, report)
        for scores in compare(self.model, dense, hidden, gold):
            yield [
                {"id": example.id, "group": example.group, **example.info, "scores": _forced_scores(*tokens)}
                for example, *tokens in zip(batch, *map(np.asarray, scores), strict=True)
            ]

    def _write(
        self, kinds: Sequence[Kind], batch: list[Example], report: Callable[[float], object]
    ) -> Iterator[list[Record]]:
        prompts, lengths = self._prompts(batch)
        stop = {*self.model.config.eos_ids, *batch[0].stop}
        for done, kind in enumerate(kinds, start=1):
            if not isinstance(kind, CompressionConfig):
                raise NotImplementedError(f"{kind} is simulated, for given continuations only")
            result = generation.generate(
                self.model,
                prompts,
                lengths=lengths,
                max_new_tokens=batch[0].max_new_tokens,
                config=kind,
                eos_id=sorted(stop) or None,
            )
            written = zip(batch, *map(np.asarray, (result.tokens, result.lengths)), strict=True)
            yield [self._written(*each) for each in written]
            report(done / len(kinds))

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


def summarise(records: Sequence[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """For "all" and each group: every score's mean with its interval."""
    groups = {"all": list(records)}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    return {
        group: {name: bootstrap([record["scores"][name] for record in members]) for name in members[0]["scores"]}
        for group, members in groups.items()
        if members and group
    }


def cache_bytes(model: Any, kind: Kind, capacity: int) -> dict[str, float]:
    """Bytes of one sequence's caches, all layers: held, of a dense one, and with only the slots that masks fill.

    Those of bfloat16 caches, as are used where bytes matter, whatever dtype the model is evaluated in.
    """
    cache = jax.eval_shape(functools.partial(empty_cache, model, kind, batch=1, capacity=capacity, dtype=jnp.bfloat16))
    layers = model.config.num_layers
    spare = _spare_slots(cache) * cache.dtype.itemsize if isinstance(cache, PackedCache) else 0
    return {
        "capacity": capacity,
        "held": cache.nbytes * layers,
        "dense": cache.dense_nbytes * layers,
        "own_count": (cache.nbytes - spare) * layers,
    }


def _spare_slots(cache: PackedCache) -> float:
    """Slots that no mask fills, of rules whose rows are unequal."""
    config = cache.config
    kept = (1 - sparsity for sparsity in config.true_sparsity(cache.head_dim))
    spare = 0.0
    for store, fraction in zip((cache.keys, cache.values), kept, strict=True):
        if isinstance(store.packed, BitmapArray):
            rows = store.packed.bitmap.size * 32 / cache.head_dim
            spare += rows * (store.packed.slots - fraction * cache.head_dim)
    return spare


def _forced_scores(loss: np.ndarray, dense_loss: np.ndarray, kl: np.ndarray, best: np.ndarray) -> dict[str, float]:
    """Of one continuation [n]."""
    return {
        "loss": float(loss.mean()),
        "increase": float((loss - dense_loss).mean()),
        "kl": float(kl.mean()),
        "probability": float(np.exp(-loss).mean()),
        "exact": float(best.all()),
    }
