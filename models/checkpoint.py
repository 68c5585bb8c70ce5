"""Checkpoints: Hugging Face folders, hub ids and GGUF files, streamed tensor by tensor into a model."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.typing import DTypeLike

from mustafar_jax.cache.checks import check_dtype
from mustafar_jax.models.config import ModelConfig
from mustafar_jax.models.folder import open_safetensors, read_config_files
from mustafar_jax.models.llama import Llama, shapes_of
from mustafar_jax.models.mistral import Mistral
from mustafar_jax.models.qwen2 import Qwen2
from mustafar_jax.models.qwen3 import Qwen3
from mustafar_jax.models.tensors import EMBEDDING, HEAD, LazyTensor, is_harmless
from mustafar_jax.models.tokenizer_folder import load_folder_tokenizer
from mustafar_jax.sharding import CacheSharding, as_auto, check_axes, weight_spec

MODELS: Mapping[str, type[Llama]] = {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3}
"""The model class of each `model_type` of config.json."""

_MANY_LAYERS = 1000
_log = logging.getLogger("mustafar_jax")

M = TypeVar("M", bound=Llama)
AnyMesh = TypeVar("AnyMesh", Mesh, AbstractMesh)
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
        mesh: devices to spread the weights over, with axes of `sharding.AXES`; None puts all on the default device.
            Each device gets its part of a tensor from the file: neither it nor the host ever holds the whole model.
            `generate` spreads caches over the same mesh.
        progress: called as `progress(done, total)` after each tensor, in bytes.

    Returns:
        The model, and the tokenizer: None where the source holds none.

    Raises:
        FileNotFoundError: nothing is there, or files of the checkpoint are missing (all of them named).
        ValueError: an unsupported or damaged checkpoint, a tokenizer that cannot be read, or tensors that do not fit
            the model (all of them named); a mesh that the model cannot be split over, before any weight is read.
    """
    checkpoint = open_checkpoint(source, dtype=dtype)
    if mesh is not None:
        check_mesh(mesh, checkpoint.config)
    tokenizer = checkpoint.load_tokenizer()  # before the weights, which take longer
    return checkpoint.load_model(mesh=mesh, progress=progress), tokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its model's description and tensors, of which none is read, and their dtype to be."""

    path: Path
    model_class: type[Llama]
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    dtype: DTypeLike

    def load_tokenizer(self) -> Any:
        """The tokenizer, None where there is none; an error for files that cannot be read, named."""
        if self.path.is_dir():
            return load_folder_tokenizer(self.path)
        from mustafar_jax.models.tokenizer import load_gguf_tokenizer  # not every caller has such a file

        return load_gguf_tokenizer(self.path)

    def load_model(self, *, mesh: Mesh | None = None, progress: Progress | None = None) -> Llama:
        """Read the weights; arguments and errors are those of `load`."""
        return load_weights(self.model_class, self.config, self.tensors, dtype=self.dtype, mesh=mesh, progress=progress)


def open_checkpoint(source: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> Checkpoint:
    """Open a checkpoint, so that its tokenizer is at hand before its weights are read, or without them.

    Args:
        source, dtype: as `load` takes them; of a hub id, the weights are fetched, too.

    Raises:
        FileNotFoundError, ValueError: as `load` does, but for the tokenizer, and tensors that do not fit the model.
    """
    dtype = None if dtype is None else _check_dtype(dtype)
    path = _local(source)
    if path.is_file():
        from mustafar_jax.models.gguf import ARCHITECTURES, open_gguf, read_header  # not every caller has such a file

        if dtype is None:  # CPUs take twice as long for a bfloat16 token, which XLA emulates there
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        header = read_header(path)
        config, tensors = open_gguf(header)
        return Checkpoint(path, ARCHITECTURES[header.architecture], config, tensors, dtype)
    folder = path if path.is_dir() else _download(source, ["*.json", "model*.safetensors", "tokenizer*", "*.jinja"])
    fields, generation = read_config_files(folder)
    model_class = _model_class(fields)
    config = model_class.read_config(fields, generation)
    tensors, stored_dtype = open_safetensors(folder)
    if dtype is None:
        dtype = _stated_dtype(fields) or stored_dtype
    return Checkpoint(folder, model_class, config, tensors, dtype)


def load_config(source: str | os.PathLike[str]) -> ModelConfig:
    """Read a model's description alone: of a folder its config.json, of a .gguf file its header, and no weights.

    Args:
        source: as `load` takes it; of a hub id only config.json and generation_config.json are fetched.

    Returns:
        The description. A head that differs from the embedding it is said to be tied to shows in the weights alone.

    Raises:
        FileNotFoundError: nothing is there, or no config.json.
        ValueError: an unsupported or damaged description.
    """
    path = _local(source)
    if path.is_file():
        from mustafar_jax.models.gguf import open_gguf  # not every caller has such a file

        return open_gguf(path)[0]
    folder = path if path.is_dir() else _download(source, ["config.json", "generation_config.json"])
    fields, generation = read_config_files(folder)
    return _model_class(fields).read_config(fields, generation)


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
    mesh = None if mesh is None else check_mesh(mesh, config)
    if config.num_layers > max(_MANY_LAYERS, len(tensors)):  # before as many are made, and named one by one
        raise ValueError(f"num_layers={config.num_layers} is more than the checkpoint's {len(tensors)} tensors hold")
    config, tensors = _settle_head(config, tensors)
    graph, state = nnx.split(_abstract_model(model_class, config, dtype))
    parameters = {_stored_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    _check_fit({name: _stored_shape(variable) for name, (_, variable) in parameters.items()}, tensors)
    total = sum(math.prod(variable.shape) * dtype.itemsize for _, variable in parameters.values())
    done = 0
    loaded = []
    for name, (path, variable) in parameters.items():
        weight = _place(name, tensors[name], variable, dtype, mesh)
        loaded.append((path, variable.replace(weight)))
        done += weight.nbytes
        if progress is not None:
            progress(done, total)
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _settle_head(
    config: ModelConfig, tensors: Mapping[str, LazyTensor]
) -> tuple[ModelConfig, Mapping[str, LazyTensor]]:
    """Whether a head that is said to be tied to the embedding is, and the tensors without one that is.

    As in transformers: either of the two stands for both, and a head with other numbers is a head of its own.
    """
    if not config.tie_word_embeddings or HEAD not in tensors:
        return config, tensors
    headless = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    if EMBEDDING not in tensors:
        return config, headless | {EMBEDDING: tensors[HEAD]}
    if np.array_equal(_read(EMBEDDING, tensors[EMBEDDING]), _read(HEAD, tensors[HEAD])):
        return config, headless
    _log.warning("tie_word_embeddings is true, but %s differs from %s: each is used as it is", HEAD, EMBEDDING)
    return dataclasses.replace(config, tie_word_embeddings=False), tensors


def _abstract_model(model_class: type[M], config: ModelConfig, dtype: np.dtype[Any]) -> M:
    """The model with shapes in place of weights."""
    # Tracing every layer's initialisers takes seconds for a deep model; all layers are alike, so one is traced.
    shallow = dataclasses.replace(config, num_layers=1)
    model = shapes_of(lambda: model_class(shallow, dtype=dtype, rngs=nnx.Rngs(0)))
    model.layers = nnx.List([nnx.clone(model.layers[0]) for _ in range(config.num_layers)])
    model.config = config
    return model


def _stored_name(path: tuple[Any, ...]) -> str:
    """The Hugging Face name of a parameter: modules are called the same, and every leaf but a bias is a weight."""
    *modules, leaf = map(str, path)
    name = ".".join([*modules, "bias" if leaf == "bias" else "weight"])
    return name if modules[0] == "lm_head" else f"model.{name}"


def _stored_shape(variable: nnx.Variable[Any]) -> tuple[int, ...]:
    """The shape in the checkpoint: heads and their channels are one axis there, but where channels stand alone."""
    sizes: list[int] = []
    for axis, size in zip(_axes(variable), variable.shape, strict=True):
        if axis == "head_dim" and sizes:
            sizes[-1] *= size
        else:
            sizes.append(size)
    return tuple(sizes)


def _axes(variable: nnx.Variable[Any]) -> tuple[str, ...]:
    return variable.get_metadata()["out_sharding"]


def _check_fit(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor]) -> None:
    groups = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted and not is_harmless(name)],
        "of another shape": [
            f"{name} {tensors[name].shape}, wanted {shape}"
            for name, shape in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    lines = [f"  {what}: {', '.join(names)}" for what, names in groups.items() if names]
    if groups["missing"] == [HEAD]:
        lines.append("  a model whose head is its embedding says tie_word_embeddings: true in config.json")
    if lines:
        raise ValueError("the checkpoint's tensors do not fit the model:\n" + "\n".join(lines))


def _read(name: str, tensor: LazyTensor) -> np.ndarray:
    array = tensor.read()
    if array.shape != tuple(tensor.shape):
        raise ValueError(f"{name} was announced with shape {tuple(tensor.shape)} and read with {array.shape}")
    return array


def _place(
    name: str, tensor: LazyTensor, variable: nnx.Variable[Any], dtype: np.dtype[Any], mesh: Mesh | None
) -> jax.Array:
    """Put a tensor on the devices that hold it; returns when it is there, so that the host's copy can be dropped."""
    if mesh is None:
        array = _read(name, tensor).astype(dtype, copy=False).reshape(variable.shape)
        return jax.block_until_ready(jax.device_put(array))

    @functools.lru_cache(maxsize=1)  # devices that hold the same part follow each other
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        part = tensor.read_part(tuple(slice(*both) for both in _stored_bounds(variable, bounds)))
        return part.astype(dtype, copy=False).reshape([stop - start for start, stop in bounds])

    def part_of(index: Any) -> np.ndarray:
        return read(*(each.indices(size)[:2] for each, size in zip(index, variable.shape, strict=True)))

    sharding = NamedSharding(mesh, weight_spec(_axes(variable), variable.shape, mesh))
    return jax.block_until_ready(jax.make_array_from_callback(variable.shape, sharding, part_of))


def _stored_bounds(variable: nnx.Variable[Any], bounds: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Where a part of a parameter begins and ends along each axis that the checkpoint has; heads' channels go whole."""
    stored: list[tuple[int, int]] = []
    for axis, size, (start, stop) in zip(_axes(variable), variable.shape, bounds, strict=True):
        if axis == "head_dim" and stored:
            stored[-1] = stored[-1][0] * size, stored[-1][1] * size
        else:
            stored.append((start, stop))
    return stored


def spread(model: M, mesh: Mesh) -> M:
    """A model with its weights on the devices of a mesh, as `load(mesh=)` has them.

    Raises ValueError for a mesh that the model cannot be split over.
    """
    mesh = check_mesh(mesh, model.config)
    graph, state = nnx.split(model)

    def place(variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        value = variable[...]
        return variable.replace(
            jax.device_put(value, NamedSharding(mesh, weight_spec(_axes(variable), value.shape, mesh)))
        )

    placed = [(path, place(variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def check_mesh(mesh: AnyMesh, config: ModelConfig) -> AnyMesh:
    """The mesh, with axes that are all Auto; ValueError where the model, or its caches, cannot be split over it."""
    check_axes(mesh)
    sharding = CacheSharding.of(mesh).for_heads(config.num_kv_heads)
    if config.num_heads % sharding.size("kv_heads"):
        devices = f"mesh axis {sharding.kv_heads!r} has {sharding.size('kv_heads')} devices"
        raise ValueError(f"{devices}, and the model {config.num_heads} query heads; wanted a divisor of these")
    if sharding.size("context") > 1 and config.sliding_window is not None:
        raise ValueError(
            f"mesh axis {sharding.context!r} splits the tokens, and the model has a sliding window of "
            f"{config.sliding_window} tokens: wanted {sharding.context}=1"
        )
    # The models leave it to the compiler to split activations, whatever kind of axes the caller's mesh has.
    auto: AnyMesh = as_auto(mesh)
    return auto


def _check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        return check_dtype(dtype)
    except TypeError as error:
        raise ValueError(*error.args) from None


def _model_class(fields: Mapping[str, Any]) -> type[Llama]:
    kind = fields.get("model_type")
    model_class = MODELS.get(kind) if isinstance(kind, str) else None
    if model_class is None:
        raise ValueError(f"model_type={kind!r} in config.json, supported: {', '.join(map(repr, MODELS))}")
    headless = model_class.architecture.replace("ForCausalLM", "Model")
    supported = [model_class.architecture], [headless]
    architectures = fields.get("architectures") or supported[0]
    if architectures not in supported:
        raise ValueError(f"{architectures=} in config.json, supported: {' and '.join(map(str, supported))}")
    return model_class


def _stated_dtype(fields: Mapping[str, Any]) -> str | None:
    """The dtype that config.json states, in transformers 5's spelling or the older one."""
    stated = fields.get("dtype") or fields.get("torch_dtype")
    if stated is not None and stated not in ("bfloat16", "float16", "float32"):
        raise ValueError(
            f"dtype={stated!r} in config.json, supported: 'bfloat16', 'float16', 'float32'; pass one of them as dtype"
        )
    return stated


def _download(source: str | os.PathLike[str], patterns: list[str]) -> Path:
    """Fetch those of a hub id's files that fit the patterns into the hub's cache, or find them there."""
    import huggingface_hub  # only hub ids need it

    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"source={str(source)!r} is no folder, no .gguf file, and no hub id that can be fetched: {error}"
        ) from error
