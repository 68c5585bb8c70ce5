"""Arguments of a generation, one by one: what is wrong with one is said before any work is done."""

import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mustafar_jax.cache.checks import check_lengths
from mustafar_jax.config import CompressionConfig

DENSE = CompressionConfig(k_sparsity=0, v_sparsity=0)
"""The config of an ordinary dense cache, the baseline of every comparison."""

_METHODS = ("embed", "layers", "logits", "init_cache")
_SIZES = ("vocab_size", "max_position_embeddings")


def check_model(model: Any) -> None:
    """Raise TypeError for what is no model: a path, or what lacks a part of `protocols.Model`."""
    wanted = "load it with mustafar_jax.models.load, which gives a model and its tokenizer"
    if isinstance(model, str | os.PathLike):
        raise TypeError(f"model={os.fspath(model)!r} is a path or a name; wanted a model: {wanted}")
    config = getattr(model, "config", None)
    missing = [name for name in _METHODS if not hasattr(model, name)]
    missing += [f"config.{name}" for name in _SIZES if not hasattr(config, name)]
    if missing:
        kind = type(model).__name__
        raise TypeError(f"model is of type {kind} and lacks {', '.join(missing)}; wanted a model: {wanted}")


def check_tokens(model: Any, tokens: Any) -> jax.Array:
    """Tokens as int32 [B, S], at least one per sequence and all in the model's vocabulary."""
    if isinstance(tokens, Mapping):
        raise ValueError(f"tokens is a {type(tokens).__name__}; wanted integers [B, S], such as its 'input_ids'")
    text, ragged = "encode it first, as by mustafar_jax.generation.text.encode", "pad them, and pass lengths"
    given = numbers("tokens", tokens, "integers [B, S]", text=text, ragged=ragged)
    if given.ndim != 2 or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"tokens is {given.dtype}{list(given.shape)}; wanted integers [B, S]")
    if given.size == 0:
        raise ValueError(f"tokens has shape {given.shape}: an empty prompt; wanted at least one token per sequence")
    if given.min() < 0 or given.max() >= model.config.vocab_size:
        raise ValueError(
            f"tokens holds {given.min()} .. {given.max()}; the vocabulary is 0 .. {model.config.vocab_size - 1}"
        )
    return jax.device_put(given.astype(np.int32))


def check_prompt_lengths(lengths: ArrayLike | Sequence[int] | None, batch: int, longest: int) -> jax.Array:
    """Lengths of prompts as int32 [batch], 1 .. longest; `longest` each if None."""
    given = None if lengths is None else numbers("lengths", lengths, f"integers [{batch}]")
    return jax.device_put(np.asarray(check_lengths(given, batch, longest, shortest=1), np.int32))


def check_config(config: Any) -> CompressionConfig:
    """The config; a dense cache's if None."""
    if not isinstance(config, CompressionConfig | None):
        raise TypeError(f"config={reprlib.repr(config)} must be a CompressionConfig, or None for a dense cache")
    return DENSE if config is None else config


def check_progress(progress: Any) -> None:
    """Raise TypeError for what cannot be called."""
    if progress is not None and not callable(progress):
        raise TypeError(f"progress={reprlib.repr(progress)} must be a function of (done, total), or None")


def check_flag(name: str, value: Any) -> bool:
    """True or False, of Python or numpy."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={reprlib.repr(value)} must be True or False")
    return bool(value)


def check_integer(name: str, value: Any) -> int:
    """An integer of Python or numpy, which True and False are not."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={reprlib.repr(value)} must be an integer")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """A real number of Python or numpy, or an array that is one; True and False are not."""
    given = numbers(name, value, "a number")
    if given.ndim or not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
        raise TypeError(f"{name}={reprlib.repr(value)} must be a number")
    return float(given)


def not_finite(model: Any, steps: Mapping[str, int] | None = None) -> str:
    """That a model's logits are not finite, in words.

    Args:
        model: the model.
        steps: the first step at which they were not, by the name of each sequence; step 1 gives the first new token.
    """
    where = ", ".join(f"of {name} from step {step} on" for name, step in (steps or {}).items())
    is_half = getattr(model, "dtype", None) == jnp.float16
    hint = "; float16 holds no number beyond 65504: try bfloat16" if is_half else ""
    return f"the model's logits are not finite{where and ': those '}{where}{hint}"


def numbers(name: str, given: Any, wanted: str, *, text: str = "", ragged: str = "") -> np.ndarray:
    """The argument as an array of numbers, of whatever shape.

    Args:
        name: the argument's.
        given: its value.
        wanted: what it should be, for errors.
        text, ragged: what to do with text, and with rows of several lengths, for errors.

    Raises:
        TypeError: what is traced, text, or nothing that holds numbers.
        ValueError: rows of several lengths.
    """
    if isinstance(given, jax.core.Tracer):
        raise TypeError(f"{name} is traced; wanted {wanted}: call this outside of jit, it compiles what it runs")
    try:
        array = np.asarray(jax.device_get(given))
    except ValueError as error:
        raise ValueError(f"{name} has rows of several lengths; wanted {wanted}" + (ragged and f": {ragged}")) from error
    except TypeError as error:  # of an array of jax.random keys
        raise TypeError(f"{name} is of type {type(given).__name__}; wanted {wanted}") from error
    if array.dtype.kind in "US":
        raise TypeError(f"{name}={reprlib.repr(given)} is text; wanted {wanted}" + (text and f": {text}"))
    if array.dtype.kind == "O":
        raise TypeError(f"{name}={reprlib.repr(given)} is of type {type(given).__name__}; wanted {wanted}")
    return array
