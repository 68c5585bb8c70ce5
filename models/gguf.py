"""GGUF files of the architectures of Llama and Qwen, read tensor by tensor under Hugging Face names and orders.

The header is parsed here rather than by `gguf.GGUFReader`: a file that is cut short is reported with the place and the
bytes that are missing, and long vocabularies take a twentieth of the time. The quantised formats are the `gguf`
package's.
"""

import dataclasses
import functools
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from mustafar_jax.models.config import ModelConfig
from mustafar_jax.models.gguf_config import ROPE_FACTORS, read_gguf_config
from mustafar_jax.models.llama import Llama
from mustafar_jax.models.qwen2 import Qwen2
from mustafar_jax.models.qwen3 import Qwen3
from mustafar_jax.models.tensors import LazyTensor

ARCHITECTURES: Mapping[str, type[Llama]] = {"llama": Llama, "qwen2": Qwen2, "qwen3": Qwen3}
"""The model class of each `general.architecture`; files of Mistral models state Llama's."""

# Where the rows of q and k are in the order of GGML's first RoPE; the others have Hugging Face's.
_INTERLEAVED = frozenset({"llama"})

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

# What a scalar of each metadata type is for `struct`, always little-endian.
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}

# Types that are numbers as they stand; the others come in blocks, and `gguf.dequantize` turns them into float32.
_PLAIN_DTYPES: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(jnp.bfloat16),
}
SUPPORTED_TYPES = (
    *_PLAIN_DTYPES,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
)
# Numbers dequantised at a time: bounds what a read needs beyond its result.
_CHUNK_ELEMENTS = 1 << 22

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in its file: `shape` outermost first, `kind` an integer where the type is not known."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType | int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data in the file; its kind must be a known one."""
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        return math.prod(self.shape) // block_elements * block_bytes


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says before its tensors' data: metadata by key, tensors by name, and the file's size."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    file_size: int

    @property
    def architecture(self) -> Any:
        """What the file says that its model is, and what the keys of its description begin with; None if nothing."""
        return self.metadata.get("general.architecture")


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read a GGUF file's metadata and its list of tensors; no tensor data is touched.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not a little-endian GGUF file of version 2 or 3, or cut short in its header.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {str(path)!r}")
    file_size = path.stat().st_size
    if file_size == 0:
        raise ValueError(f"{str(path)!r} is empty, not a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        tensor_count, key_count = _read_preamble(cursor)
        metadata = _read_metadata(cursor, key_count)
        tensors = _read_tensor_list(cursor, tensor_count, metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    return GGUFHeader(path, metadata, tensors, file_size)


def open_gguf(source: str | os.PathLike[str] | GGUFHeader) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Open a GGUF file of one of the `ARCHITECTURES`.

    Args:
        source: the file's path, or its header.

    Returns:
        The model's configuration, and its tensors under Hugging Face names, in Hugging Face shapes and orders:
        projections [outputs, inputs], the rows of q and k in the half-split RoPE order. `read` gives float32, or
        float16 and bfloat16 where a tensor is stored so. Without `output.weight` the embeddings are tied. Tensors
        that no model here has keep their GGUF name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a GGUF file, or cut short; another architecture, metadata that are missing or that contradict
            themselves, RoPE scaling that is neither linear nor Llama 3's; unsupported quantisations (every such
            tensor is named). Nothing of the tensors' data has been read then.
    """
    header = source if isinstance(source, GGUFHeader) else read_header(source)
    _check_architecture(header)
    _check_tensors(header)
    try:
        config = _read_config(header)
    except ValueError as error:
        raise ValueError(f"{str(header.path)!r}: {error}") from error
    tensors = {
        _hugging_face_name(tensor.name): _lazy_tensor(header, tensor, config)
        for tensor in header.tensors.values()
        if tensor.name != ROPE_FACTORS
    }
    return config, tensors


class _Cursor:
    """Reads little-endian values one after another; every read says what it is for, so that errors can."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def error(self, message: str) -> ValueError:
        return ValueError(f"{str(self.path)!r} {message}")

    def take(self, size: int, what: str) -> bytes:
        start, end = self.offset, self.offset + size
        if end > len(self.data):
            raise self.error(f"is cut short: {what} needs bytes {start} to {end}, the file has {len(self.data)}")
        self.offset = end
        return self.data[start:end]

    def scalar(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.scalar("<Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"is damaged: {what} before byte {self.offset} is not UTF-8") from error


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; returns the numbers of tensors and of metadata keys."""
    magic = cursor.data[: len(_MAGIC)]
    if magic != _MAGIC[: len(magic)]:
        raise cursor.error(f"is not a GGUF file: it starts with {magic!r}, not {_MAGIC!r}")
    cursor.take(len(_MAGIC), "the magic")
    version = cursor.scalar("<I", "the version")
    if version & 0xFFFF == 0:
        raise cursor.error("is a big-endian GGUF file; only little-endian ones are supported")
    if version not in _VERSIONS:
        raise cursor.error(f"is a GGUF file of version {version}; supported are {_VERSIONS}")
    return cursor.scalar("<Q", "the tensor count"), cursor.scalar("<Q", "the metadata count")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.text(f"metadata key {index} of {count}")
        what = f"metadata {key!r}"
        if key in metadata:
            raise cursor.error(f"is damaged: {what} is there twice")
        metadata[key] = _read_value(cursor, cursor.scalar("<I", what), what)
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == GGUFValueType.ARRAY:
        item_kind = cursor.scalar("<I", what)
        return _read_array(cursor, item_kind, cursor.scalar("<Q", what), what)
    if kind == GGUFValueType.STRING:
        return cursor.text(what)
    return cursor.scalar(_scalar_layout(cursor, kind, what), what)


def _read_array(cursor: _Cursor, kind: int, count: int, what: str) -> list[Any]:
    if kind == GGUFValueType.STRING:
        return [cursor.text(what) for _ in range(count)]
    dtype = np.dtype(_scalar_layout(cursor, kind, what))
    return np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype).tolist()


def _scalar_layout(cursor: _Cursor, kind: int, what: str) -> str:
    try:
        return _SCALARS[GGUFValueType(kind)]
    except (KeyError, ValueError) as error:  # an array within an array, or no type at all
        raise cursor.error(f"is damaged: {what} has value type {kind}, which cannot stand there") from error


def _read_tensor_list(cursor: _Cursor, count: int, alignment: Any) -> dict[str, GGUFTensor]:
    """Read the entries, then turn their offsets, which count from the end of the header, into the file's."""
    entries: dict[str, GGUFTensor] = {}
    for index in range(count):
        tensor = _read_tensor_entry(cursor, f"the entry of tensor {index} of {count}")
        if tensor.name in entries:
            raise cursor.error(f"is damaged: tensor {tensor.name!r} is there twice")
        entries[tensor.name] = tensor
    if not isinstance(alignment, int) or alignment <= 0:
        raise cursor.error(f"is damaged: general.alignment is {alignment!r}, it must be a positive integer")
    start = -(-cursor.offset // alignment) * alignment
    return {name: dataclasses.replace(entry, offset=entry.offset + start) for name, entry in entries.items()}


def _read_tensor_entry(cursor: _Cursor, what: str) -> GGUFTensor:
    name = cursor.text(what)
    what = f"the entry of tensor {name!r}"
    rank = cursor.scalar("<I", what)
    dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, what))
    kind, offset = cursor.scalar("<I", what), cursor.scalar("<Q", what)
    known = kind in set(GGMLQuantizationType)
    return GGUFTensor(name, dims[::-1], GGMLQuantizationType(kind) if known else kind, offset)


def _check_architecture(header: GGUFHeader) -> None:
    architecture = header.architecture
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"{str(header.path)!r}: general.architecture is {architecture!r}; supported are "
            f"{', '.join(map(repr, ARCHITECTURES))} ('llama' is that of SmolLM and Mistral models too)"
        )
    parts = header.metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise ValueError(f"{str(header.path)!r} is one of {parts} parts of a model; merge them into one file first")
    key = f"{architecture}.expert_count"
    if experts := header.metadata.get(key, 0):
        raise ValueError(f"{str(header.path)!r}: {key} is {experts}; mixtures of experts are unsupported")


def _check_tensors(header: GGUFHeader) -> None:
    """Check every tensor's type, its rows' length and that its data lies within the file."""
    tensors = header.tensors.values()
    unsupported = [f"{t.name} ({_kind_name(t.kind)})" for t in tensors if t.kind not in SUPPORTED_TYPES]
    if unsupported:
        raise ValueError(
            f"{str(header.path)!r} holds tensors of unsupported quantisations: {', '.join(unsupported)}; "
            f"supported are {', '.join(kind.name for kind in SUPPORTED_TYPES)}"
        )
    ragged = [f"{t.name} {t.shape}" for t in tensors if not _has_whole_blocks(t)]
    if ragged:
        raise ValueError(f"{str(header.path)!r} is damaged: tensors not of whole blocks: {', '.join(ragged)}")
    missing = [t for t in tensors if t.offset + t.nbytes > header.file_size]
    if missing:
        first = min(missing, key=lambda t: t.offset)
        raise ValueError(
            f"{str(header.path)!r} is cut short: tensor {first.name!r} needs bytes {first.offset} to "
            f"{first.offset + first.nbytes}, the file has {header.file_size} ({len(missing)} of {len(tensors)} "
            "tensors are incomplete)"
        )


def _has_whole_blocks(tensor: GGUFTensor) -> bool:
    block_elements, _ = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    return math.prod(tensor.shape) > 0 and tensor.shape != () and tensor.shape[-1] % block_elements == 0


def _kind_name(kind: GGMLQuantizationType | int) -> str:
    return kind.name if isinstance(kind, GGMLQuantizationType) else f"type {kind}"


def _read_config(header: GGUFHeader) -> ModelConfig:
    factors = header.tensors.get(ROPE_FACTORS)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    rope_factors = None if factors is None else _read_tensor(header.path, factors)
    config = read_gguf_config(header.architecture, header.metadata, shapes, rope_factors)
    return dataclasses.replace(config, **ARCHITECTURES[header.architecture].always)


def _hugging_face_name(name: str) -> str:
    match name.split("."):
        case [part, suffix] if part in _TOP_NAMES:
            return f"{_TOP_NAMES[part]}.{suffix}"
        case ["blk", layer, part, suffix] if part in _BLOCK_NAMES:
            return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{suffix}"
    return name


def _lazy_tensor(header: GGUFHeader, tensor: GGUFTensor, config: ModelConfig) -> LazyTensor:
    read: Callable[[], np.ndarray] = functools.partial(_read_tensor, header.path, tensor)
    part = tensor.name.split(".")[-2] if "." in tensor.name else ""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    num_heads = heads.get(part) if header.architecture in _INTERLEAVED else None
    if num_heads is not None and tensor.shape[0] == num_heads * config.head_dim:
        read = functools.partial(_read_uninterleaved, read, num_heads)
    return LazyTensor(tensor.shape, read)


def _read_uninterleaved(read: Callable[[], np.ndarray], num_heads: int) -> np.ndarray:
    """The file has the two channels that RoPE turns side by side; Hugging Face's order has them head_dim / 2 apart."""
    weight = read()
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _read_tensor(path: Path, tensor: GGUFTensor) -> np.ndarray:
    kind = GGMLQuantizationType(tensor.kind)
    if kind in _PLAIN_DTYPES:
        count = math.prod(tensor.shape)
        return _read_array_at(path, tensor, _PLAIN_DTYPES[kind], count).reshape(tensor.shape)
    return _read_quantised(path, tensor, kind)


def _read_quantised(path: Path, tensor: GGUFTensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Dequantise some rows at a time, so that little more than the float32 result is ever held."""
    width = tensor.shape[-1]
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = width // block_elements * block_bytes
    result = np.empty((math.prod(tensor.shape[:-1]), width), np.float32)
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, len(result), step):
        rows = result[start : start + step]
        raw = _read_array_at(path, tensor, np.dtype(np.uint8), rows.shape[0] * row_bytes, start * row_bytes)
        rows[:] = dequantize(raw.reshape(len(rows), row_bytes), kind)
    return result.reshape(tensor.shape)


def _read_array_at(path: Path, tensor: GGUFTensor, dtype: np.dtype[Any], count: int, start: int = 0) -> np.ndarray:
    """Read `count` numbers that begin `start` bytes into the tensor's data."""
    # Read, not mapped: pages of a mapping would count as this process's memory long after the tensor was converted.
    array = np.fromfile(path, dtype, count, offset=tensor.offset + start)
    if len(array) != count:
        raise ValueError(f"{str(path)!r} was cut short while it was open: tensor {tensor.name!r} is incomplete")
    return array
