"""A folder in Hugging Face's layout: which of its files are read, and what is said where they do not make a model."""

import collections
import contextlib
import functools
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mustafar_jax.models.tensors import LazyTensor, is_harmless, with_usual_names

_log = logging.getLogger("mustafar_jax")

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "original/*.pth")
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
_POINTER = b"version https://git-lfs"


def read_config_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The content of config.json, and of generation_config.json where there is one.

    Raises:
        FileNotFoundError: no config.json; what lies there in its place is named. A link to a file that is missing.
        ValueError: a file that is no JSON object, or an adapter beside the model or in its place.
    """
    if (folder / _ADAPTER).exists():
        base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
        raise ValueError(
            f"{folder} holds an adapter ({_ADAPTER}) of {base!r}, which is not applied here: merge it into its model "
            f"(peft's merge_and_unload) and save that in a folder of its own"
        )
    if not is_there(folder / "config.json"):
        raise FileNotFoundError(_no_config(folder))
    generation = folder / "generation_config.json"
    return read_json(folder / "config.json"), read_json(generation) if is_there(generation) else None


def is_there(file: Path) -> bool:
    """Whether there is such a file; FileNotFoundError for a link that leads nowhere, which was meant to be one."""
    if file.is_symlink() and not file.exists():
        raise FileNotFoundError(f"{file} is a link to {file.readlink()}, which is missing: fetch it again")
    return file.is_file()


def _no_config(folder: Path) -> str:
    """What to say of a folder without config.json: other paths that were meant, or what lies there instead."""
    inner = [
        path for pattern in ("*", "snapshots/*") for path in folder.glob(pattern) if (path / "config.json").exists()
    ]
    if meant := sorted(str(path.relative_to(folder)) for path in [*inner, *folder.glob("*.gguf")]):
        return f"{folder} has no config.json, but {', '.join(meant)}: give the path of one of these"
    others = _names(file for pattern in (*_OTHER_WEIGHTS, "params.json") for file in folder.glob(pattern))
    return f"{folder} has no config.json" + (f", but {others}; Hugging Face's layout is wanted" if others else "")


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(sorted(path.name for path in paths))


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds; ValueError where it holds none."""
    if is_lfs_pointer(file):
        raise ValueError(lfs_message(file))
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON, or cut short: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, an object is wanted")
    return content


def read_text(file: Path) -> str:
    """A file's text; ValueError where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of one that it has not fetched."""
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER


def lfs_message(file: Path) -> str:
    """What to say of such a file."""
    return f"{file} is not the file itself but Git LFS's pointer to it: fetch it with `git lfs pull`"


def open_safetensors(folder: Path) -> tuple[dict[str, LazyTensor], str]:
    """The tensors of a Hugging Face folder, by their usual names, and the dtype most of them have; none is read.

    Raises:
        FileNotFoundError: no safetensors, or files that the index names are missing (all of them named).
        ValueError: a damaged file, a tensor in two files, or tensors that do not hold floating-point numbers (all of
            them named).
    """
    tensors: dict[str, LazyTensor] = {}
    kinds: dict[str, str] = {}
    places: dict[str, Path] = {}
    for file in _safetensors_files(folder):
        for name, (kind, tensor) in _open_file(file).items():
            if name in places:
                raise ValueError(f"{name} is in {places[name]} and in {file}; one of them is wanted")
            places[name], kinds[name], tensors[name] = file, kind, tensor
    if refused := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _DTYPES and not is_harmless(name)]:
        raise ValueError(f"tensors of unsupported types, {', '.join(_DTYPES)} are supported: {', '.join(refused)}")
    most_common = collections.Counter(kinds.values()).most_common(1)
    dtype = _DTYPES.get(most_common[0][0], "float32") if most_common else "float32"
    return with_usual_names(tensors), dtype


def _open_file(file: Path) -> dict[str, tuple[str, LazyTensor]]:
    """Each tensor's type, in safetensors' letters, and the tensor."""
    tensors = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                entry = opened.get_slice(name)
                read = functools.partial(_read_safetensor, file, name)
                part = functools.partial(_read_part, file, name)
                tensors[name] = entry.get_dtype(), LazyTensor(tuple(entry.get_shape()), read, part)
    except SafetensorError as error:
        if is_lfs_pointer(file):
            raise ValueError(lfs_message(file)) from error
        raise ValueError(f"{file} is damaged or cut short: {error}") from error
    return tensors


def _safetensors_files(folder: Path) -> list[Path]:
    """The files that transformers reads: one alone wins over the parts that an index names."""
    index, single = folder / _INDEX, folder / _SINGLE
    if is_there(single):
        _tell_of_parts(folder)
        return [single]
    if is_there(index):
        parts = _parts(index)
        if missing := _names(part for part in parts if not part.is_file()):
            raise FileNotFoundError(f"{folder} lacks files that {_INDEX} names: {missing}")
        return parts
    found = _names(file for pattern in _OTHER_WEIGHTS for file in folder.glob(pattern))
    raise FileNotFoundError(
        f"{folder} has neither {_INDEX} nor {_SINGLE}"
        + (f", but {found}; only safetensors under these names are read" if found else "")
    )


def _tell_of_parts(folder: Path) -> None:
    """Warn of parts that are not read, since one file wins over them; an index that is damaged names none."""
    parts: list[Path] = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        parts = _parts(folder / _INDEX)
    if unread := _names(part for part in parts if part != folder / _SINGLE and part.exists()):
        _log.warning("%s holds %s, which is read, and %s, which are not", folder, _SINGLE, unread)


def _parts(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise ValueError(f"{index} has no weight_map")
    if wrong := [name for name, file in weight_map.items() if not isinstance(file, str)]:
        raise ValueError(f"{index} names no file for {', '.join(wrong)}")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def _read_safetensor(file: Path, name: str) -> np.ndarray:
    # Opened anew each time: a file that stays mapped counts with all its pages read so far as memory in use.
    with safe_open(file, framework="numpy") as opened:
        return opened.get_tensor(name)


def _read_part(file: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    with safe_open(file, framework="numpy") as opened:
        part: np.ndarray = opened.get_slice(name)[index]
        return part
