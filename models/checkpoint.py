"""Checkpoints: Hugging Face folders, hub ids and GGUF files, streamed tensor by tensor into a model."""

import collections
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from mustafar_jax.cache.checks import check_dtype
from mustafar_jax.models.config import ModelConfig
from mustafar_jax.models.llama import Llama, shapes_of
from mustafar_jax.models.mistral import Mistral
from mustafar_jax.models.tensors import LazyTensor

MODELS: Mapping[str, type[Llama]] = {"llama": Llama, "mistral": Mistral}
"""The model class of each `model_type` of config.json."""

MESH_AXES: Mapping[str, str] = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model"}
"""Which mesh axis a logical axis of the parameters is split over; the others are whole on every device."""

# Non-weights that checkpoints carry: RoPE frequencies, which follow from the config.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}

M = TypeVar("M", bound=Llama)
Progress = Callable[[int, int], object]
"""Called as `progress(done, total)` while weights load, in bytes of the model."""


def load(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> tuple[Llama, Any]:
    """Load a model and its tokenizer.

    Args:
        source: a folder in Hugging Face's layout (config.json and safetensors), a .gguf file, or a hub id.
        dtype: of the weights, the computation and the cache: bfloat16, float16 or float32. None takes the
            checkpoint's; for a GGUF file bfloat16, or float32 where JAX runs on a CPU.
        mesh: devices to spread the weights over, as `MESH_AXES` says; None puts all on the default device. How
            caches are laid out is left to the compiler.
        progress: called as `progress(done, total)` after each tensor, in bytes.

    Returns:
        The model, and the tokenizer: None where the source holds none.

    Raises:
        FileNotFoundError: nothing is there, or files of the checkpoint are missing (all of them named).
        ValueError: an unsupported or damaged checkpoint, or tensors that do not fit the model (all of them named).
    """
    dtype = None if dtype is None else _check_dtype(dtype)
    path = _local(source)
    if path.is_file():
        return _load_gguf(path, dtype, mesh, progress)
    folder = path if path.is_dir() else _download(source, ["*.json", "model*.safetensors", "tokenizer*", "*.jinja"])
    fields = _read_json(folder / "config.json")
    model_class, config = _read_config(folder, fields)
    tensors, stored_dtype = open_safetensors(folder)
    if dtype is None:
        dtype = _stated_dtype(fields) or stored_dtype
    model = load_weights(model_class, config, tensors, dtype=dtype, mesh=mesh, progress=progress)
    return model, _load_tokenizer(folder)


def load_config(source: str | os.PathLike[str]) -> ModelConfig:
    """Read a model's description alone: of a folder its config.json, of a .gguf file its header, and no weights.

    Args:
        source: as `load` takes it; of a hub id only config.json and generation_config.json are fetched.

    Raises:
        FileNotFoundError: nothing is there, or no config.json.
        ValueError: an unsupported or damaged description.
    """
    path = _local(source)
    if path.is_file():
        from mustafar_jax.models.gguf import open_gguf  # not every caller has such a file

        return open_gguf(path)[0]
    folder = path if path.is_dir() else _download(source, ["config.json", "generation_config.json"])
    return _read_config(folder, _read_json(folder / "config.json"))[1]


def _local(source: str | os.PathLike[str]) -> Path:
    """Where a source would lie, were it no hub id; FileNotFoundError for what can be nothing but a file, and is not."""
    path = Path(source)
    if path.suffix == ".gguf" and not path.exists():
        raise FileNotFoundError(f"source={str(source)!r}: there is no such file")
    return path


def load_weights(
    model_class: type[M],
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> M:
    """Make a model of a checkpoint's tensors, reading one at a time.

    What is held beside the model is never more than the tensor being read: it is cast, put on its devices and dropped.

    Args:
        model_class: Llama or a subclass.
        config: the model's shape.
        tensors: by Hugging Face name, in Hugging Face's shapes; what is not needed is refused, not skipped.
        dtype, mesh, progress: as `load` takes them.

    Raises:
        ValueError: naming every tensor that is missing, unexpected or of another shape than the model wants; before
            any is read.
    """
    dtype = _check_dtype(dtype)
    mesh = None if mesh is None else _check_mesh(mesh)
    graph, state = nnx.split(_abstract_model(model_class, config, dtype))
    parameters = {_stored_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    _check_fit({name: _stored_shape(variable) for name, (_, variable) in parameters.items()}, tensors, config)
    total = sum(math.prod(variable.shape) * dtype.itemsize for _, variable in parameters.values())
    done = 0
    loaded = []
    for name, (path, variable) in parameters.items():
        weight = _place(_read(name, tensors[name]), variable, dtype, mesh)
        loaded.append((path, variable.replace(weight)))
        done += weight.nbytes
        if progress is not None:
            progress(done, total)
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _abstract_model(model_class: type[M], config: ModelConfig, dtype: np.dtype[Any]) -> M:
    """The model with shapes in place of weights."""
    # Tracing every layer's initialisers takes seconds for a deep model; all layers are alike, so one is traced.
    shallow = dataclasses.replace(config, num_layers=1)
    model = shapes_of(lambda: model_class(shallow, dtype=dtype, rngs=nnx.Rngs(0)))
    model.layers = nnx.List([nnx.clone(model.layers[0]) for _ in range(config.num_layers)])
    model.config = config
    return model


def open_safetensors(folder: Path) -> tuple[dict[str, LazyTensor], str]:
    """The tensors of a Hugging Face folder, by name, and the dtype that most of them have; none is read.

    Raises:
        FileNotFoundError: no safetensors, or files that the index names are missing (all of them named).
        ValueError: a damaged file, or tensors that do not hold floating-point numbers (all of them named).
    """
    tensors: dict[str, LazyTensor] = {}
    kinds: dict[str, str] = {}
    for file in _safetensors_files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    entry = opened.get_slice(name)
                    kinds[name] = entry.get_dtype()
                    read = functools.partial(_read_safetensor, file, name)
                    tensors[name] = LazyTensor(tuple(entry.get_shape()), read)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short: {error}") from error
    if refused := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _DTYPES and not _is_extra(name)]:
        raise ValueError(f"tensors of unsupported types, {', '.join(_DTYPES)} are supported: {', '.join(refused)}")
    most_common = collections.Counter(kinds.values()).most_common(1)
    return tensors, _DTYPES.get(most_common[0][0], "float32") if most_common else "float32"


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{folder} lacks files that {index.name} names: {', '.join(missing)}")
        return files
    if single.exists():
        return [single]
    found = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.safetensors") for file in folder.glob(pattern)
    )
    raise FileNotFoundError(
        f"{folder} has neither {index.name} nor {single.name}"
        + (f", but {', '.join(found)}; only safetensors under these names are read" if found else "")
    )


def _read_safetensor(file: Path, name: str) -> np.ndarray:
    # Opened anew each time: a file that stays mapped counts with all its pages read so far as memory in use.
    with safe_open(file, framework="numpy") as opened:
        return opened.get_tensor(name)


def _stored_name(path: tuple[Any, ...]) -> str:
    """The Hugging Face name of a parameter: modules are called the same, and every leaf but a bias is a weight."""
    *modules, leaf = map(str, path)
    name = ".".join([*modules, "bias" if leaf == "bias" else "weight"])
    return name if modules[0] == "lm_head" else f"model.{name}"


def _stored_shape(variable: nnx.Variable[Any]) -> tuple[int, ...]:
    """The shape in the checkpoint: heads and their channels are one axis there."""
    sizes: list[int] = []
    for axis, size in zip(_axes(variable), variable.shape, strict=True):
        if axis == "head_dim":
            sizes[-1] *= size
        else:
            sizes.append(size)
    return tuple(sizes)


def _axes(variable: nnx.Variable[Any]) -> tuple[str, ...]:
    return variable.get_metadata()["out_sharding"]


def _is_extra(name: str) -> bool:
    return bool(_HARMLESS.search(name))


def _check_fit(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor], config: ModelConfig) -> None:
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted and name not in ignored and not _is_extra(name)]
    misshaped = [
        f"{name} {tensors[name].shape}, wanted {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(groups.values()):
        lines = [f"  {what}: {', '.join(names)}" for what, names in groups.items() if names]
        raise ValueError("the checkpoint's tensors do not fit the model:\n" + "\n".join(lines))


def _read(name: str, tensor: LazyTensor) -> np.ndarray:
    array = tensor.read()
    if array.shape != tuple(tensor.shape):
        raise ValueError(f"{name} was announced with shape {tuple(tensor.shape)} and read with {array.shape}")
    return array


def _place(array: np.ndarray, variable: nnx.Variable[Any], dtype: np.dtype[Any], mesh: Mesh | None) -> jax.Array:
    """Put a tensor on the devices that hold it; returns when it is there, so that the host's copy can be dropped."""
    array = array.astype(dtype, copy=False).reshape(variable.shape)
    sharding = None if mesh is None else _sharding(variable, mesh)
    return jax.block_until_ready(jax.device_put(array, sharding))


def _sharding(variable: nnx.Variable[Any], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Split the axes that `MESH_AXES` names where the mesh divides them."""

    def mesh_axis(name: str, size: int) -> str | None:
        axis = MESH_AXES.get(name)
        return axis if axis is not None and size % mesh.shape[axis] == 0 else None

    return NamedSharding(mesh, PartitionSpec(*map(mesh_axis, _axes(variable), variable.shape)))


def _check_mesh(mesh: Mesh) -> Mesh:
    if absent := sorted(set(MESH_AXES.values()) - set(mesh.axis_names)):
        raise ValueError(f"mesh has the axes {mesh.axis_names}; it must have {', '.join(map(repr, absent))}")
    # The models leave it to the compiler to split activations, whatever kind of axes the caller's mesh has.
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        return check_dtype(dtype)
    except TypeError as error:
        raise ValueError(*error.args) from None


def _read_config(folder: Path, fields: Mapping[str, Any]) -> tuple[type[Llama], ModelConfig]:
    """The model class and its description that config.json's fields, and generation_config.json, give."""
    model_class = _model_class(fields)
    generation = folder / "generation_config.json"
    return model_class, model_class.read_config(fields, _read_json(generation) if generation.exists() else None)


def _model_class(fields: Mapping[str, Any]) -> type[Llama]:
    kind = fields.get("model_type")
    model_class = MODELS.get(kind) if isinstance(kind, str) else None
    if model_class is None:
        raise ValueError(f"model_type={kind!r} in config.json, supported: {', '.join(map(repr, MODELS))}")
    architectures = fields.get("architectures") or [model_class.architecture]
    if architectures != [model_class.architecture]:
        raise ValueError(f"{architectures=} in config.json, supported: {[model_class.architecture]}")
    return model_class


def _stated_dtype(fields: Mapping[str, Any]) -> str | None:
    """The dtype that config.json states, in transformers 5's spelling or the older one."""
    stated = fields.get("dtype") or fields.get("torch_dtype")
    if stated is not None and stated not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype={stated!r} in config.json, supported: 'bfloat16', 'float16', 'float32'")
    return stated


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, an object is wanted")
    return content


def _load_tokenizer(folder: Path) -> Any:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # takes a second to import, and not every caller wants text

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _load_gguf(file: Path, dtype: DTypeLike | None, mesh: Mesh | None, progress: Progress | None) -> tuple[Llama, Any]:
    # Imported here: not every caller has such a file.
    from mustafar_jax.models.gguf import open_gguf
    from mustafar_jax.models.tokenizer import load_gguf_tokenizer

    config, tensors = open_gguf(file)
    if dtype is None:  # CPUs take twice as long for a bfloat16 token, which XLA emulates there
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = load_weights(Llama, config, tensors, dtype=dtype, mesh=mesh, progress=progress)
    return model, load_gguf_tokenizer(file)


def _download(source: str | os.PathLike[str], patterns: list[str]) -> Path:
    """Fetch those of a hub id's files that fit the patterns into the hub's cache, or find them there."""
    import huggingface_hub  # only hub ids need it

    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"source={str(source)!r} is no folder, no .gguf file, and no hub id that can be fetched: {error}"
        ) from error
