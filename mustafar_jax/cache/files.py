"""Caches in files: safetensors with what the caches are in the metadata."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.cache.alike import difference, kind_of
from mustafar_jax.cache.base import LayerCache, check_cache
from mustafar_jax.config import CompressionConfig

_FORMAT = "mustafar_jax caches, version 1"

Saved = LayerCache | Sequence[LayerCache]
"""One cache, or those of a model's layers."""


def save(caches: Saved, path: str | os.PathLike[str]) -> None:
    """Write caches to a file, which is replaced as a whole where there is one.

    Args:
        caches: one cache, or a list or tuple of them.
        path: of the safetensors file.

    Raises:
        TypeError: anything else than caches.
        ValueError: a config of another class than `CompressionConfig`; caches that are traced.
        OSError: as writing does.
    """
    from safetensors.numpy import save_file  # here, for few who import the library save caches

    each = _each(caches)
    for cache in each:
        if type(cache.config) is not CompressionConfig:
            raise ValueError(f"config is a {type(cache.config).__name__}; only caches of a CompressionConfig are saved")
        if isinstance(cache.lengths, jax.core.Tracer):
            raise ValueError("caches are traced, as under jax.jit; only concrete ones are saved")
    about = {"caches": [kind_of(cache) for cache in each], "alone": isinstance(caches, LayerCache)}
    arrays = {name: np.asarray(leaf) for name, leaf in _leaves([cache._whole() for cache in each]).items()}
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(arrays, part, metadata={"format": _FORMAT, "about": json.dumps(about)})
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def load_cache(path: str | os.PathLike[str], like: Saved | None = None) -> Any:
    """Read caches that `save` wrote.

    Args:
        path: of the file.
        like: caches of the kind that is wanted, or their shapes as `jax.eval_shape` gives them: as many, of the same
            config, sizes, dtype and RoPE frequencies. What they hold is not read. None takes what there is.

    Returns:
        A cache, or a tuple of them, as they were saved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged or holds no caches; caches that are not like those wanted, with what differs.
        TypeError: `like` of anything else than caches.
    """
    wanted = None if like is None else [kind_of(cache) for cache in _each(like)]
    about, arrays = _read(Path(path))
    if wanted is not None:
        _check_like(path, about["caches"], wanted)
    caches = _made(path, about["caches"])
    names = _leaves(caches)
    if wrong := [name for name, leaf in names.items() if not _fits(arrays.get(name), leaf)]:
        raise ValueError(f"{path} is damaged: {wrong[0]} is missing, or not of the shape and dtype that it should be")
    tree = jax.tree.structure(caches)
    filled: tuple[LayerCache, ...] = tuple(jax.tree.unflatten(tree, [jnp.asarray(arrays[name]) for name in names]))
    for cache in filled:
        lengths = np.asarray(cache.lengths)
        if lengths.min() < 0 or lengths.max() > cache.capacity:
            raise ValueError(f"{path} is damaged: lengths {lengths.tolist()} do not lie in 0 .. {cache.capacity}")
    return filled[0] if about["alone"] else filled


def _each(caches: Any) -> list[LayerCache]:
    each = [caches] if not isinstance(caches, list | tuple) else list(caches)
    for cache in each:
        check_cache(cache)
    if not each:
        raise TypeError(f"caches is {caches!r}; wanted at least one LayerCache")
    return each


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file says of its caches, and its arrays."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} says that it is of format {metadata.get('format')!r}; wanted {_FORMAT!r}")
    try:
        about = json.loads(metadata["about"])
        return {"caches": [dict(kind) for kind in about["caches"]], "alone": bool(about["alone"])}, arrays
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its metadata does not say what it holds ({error!r})") from error


def _made(path: Any, abouts: list[dict[str, Any]]) -> list[LayerCache]:
    """The shapes of caches."""
    try:
        return [_shapes(about) for about in abouts]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its metadata does not say what it holds ({error!r})") from error


def _shapes(about: dict[str, Any]) -> LayerCache:
    config = CompressionConfig(**about["config"])
    sizes = {name: value for name, value in about.items() if name != "config"}
    shapes: LayerCache = jax.eval_shape(lambda: LayerCache.init(config, **sizes))
    return shapes


def _check_like(path: Any, found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Raise ValueError for the first thing in which caches differ."""
    if len(found) != len(wanted):
        raise ValueError(f"{path} holds {len(found)} caches; wanted {len(wanted)}")
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for name in other:
            if one.get(name) != other[name]:
                raise ValueError(f"{path}: {difference(name, one.get(name), other[name])}, for cache {number}")


def _leaves(caches: list[LayerCache]) -> dict[str, Any]:
    """The arrays by name, such as 0.keys.packed.payload."""
    leaves = jax.tree_util.tree_leaves_with_path(caches)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _fits(array: np.ndarray | None, leaf: Any) -> bool:
    return array is not None and array.shape == leaf.shape and array.dtype == leaf.dtype
