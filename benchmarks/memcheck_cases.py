"""What `memcheck` launches: all kernels on small inputs, recorded as jax launches them.

What a kernel must not look at holds NaN, and bitmaps of more entries than a row has slots.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import mustafar_jax as mj
from benchmarks import cupti, device_time
from mustafar_jax import layout
from mustafar_jax.codecs import codec_of
from mustafar_jax.layout import Pairs
from mustafar_jax.operands import Mean, PackedAttention, Tail
from mustafar_jax.pallas_kernels.mosaic import decode_attention as mosaic_decode_attention
from mustafar_jax.pallas_kernels.mosaic import lowering
from mustafar_jax.pallas_kernels.mosaic.launch import MosaicParams
from mustafar_jax.pallas_kernels.triton import decode_attention, spmv
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.code_pack import Code, code_pack
from mustafar_jax.pallas_kernels.triton.launch import DecodeParams
from mustafar_jax.pallas_kernels.triton.prune_pack import Prune, prune_pack
from mustafar_jax.rows import RowFormat, Rows

BF16, F16 = jnp.bfloat16, jnp.float16
LENGTHS = [0, 63, 200, 41]
"""Packed rows that the sequences of a batch have, at most."""
SINKS, RECENT = 4, 37


class Attention(NamedTuple):
    """Decode attention of a batch: slots of a row, 0 for rows without a bitmap; the other fields as there."""

    head_dim: int
    dtype: Any
    group: int
    k_slots: int
    v_slots: int
    rows: int
    splits: int
    kv_heads: int = 1
    window: int | None = None
    centred: bool = False
    warps: int = 4
    k_bits: int = 16
    v_bits: int = 16
    teams: int = 1


ATTENTION = {
    "one query head": Attention(128, BF16, 1, 40, 40, 224, 2),
    "16 query heads, a window": Attention(64, F16, 16, 20, 32, 256, 2, kv_heads=2, window=90),
    "8 query heads, slots in fours": Attention(128, F16, 8, 36, 4, 96, 1),
    "dense keys": Attention(128, F16, 2, 0, 64, 256, 3),
    "dense values": Attention(64, BF16, 3, 32, 0, 224, 1, window=150),
    "centred": Attention(128, BF16, 4, 64, 64, 320, 3, centred=True),
    "centred, all held": Attention(64, F16, 5, 20, 64, 224, 2, kv_heads=2, centred=True),
    "centred, 2 query heads": Attention(128, BF16, 2, 40, 40, 256, 2, window=70, centred=True),
    "centred, 8 query heads, 12 warps": Attention(128, BF16, 8, 40, 40, 448, 1, centred=True, warps=12),
    "centred, 16 query heads": Attention(128, BF16, 16, 40, 40, 128, 1, window=33, centred=True),
}


CODES = {
    "4 bits, centred, 4 teams": Attention(128, BF16, 4, 0, 0, 320, 3, 1, None, True, k_bits=4, v_bits=4, teams=4),
    "keys in 8 bits, values in 2": Attention(64, F16, 9, 0, 0, 224, 2, 2, 90, k_bits=8, v_bits=2),
    "values in 4 bits": Attention(64, BF16, 1, 20, 0, 224, 2, v_bits=4, teams=3),
    "keys pruned in 4 bits": Attention(128, BF16, 4, 40, 0, 224, 2, 1, None, True, k_bits=4, v_bits=2, teams=3),
}
"""What the Mosaic GPU kernel alone takes."""


def attention(kernels: Any, params: Any, case: Attention) -> None:
    """Both kernels of a backend, the second of which merges."""
    query, key, value, tail, packed_lengths, mean = _attention_data(case)
    recent = jnp.array([RECENT, 0, 3, 20], jnp.int32)
    lengths, scale = packed_lengths + SINKS + recent, case.head_dim**-0.5
    turned = {"turned_keys": case.k_bits < 16 and not case.k_slots, "turned_values": case.v_bits < 16}
    operands = PackedAttention(query, key, value, tail, lengths, packed_lengths, mean, scale, case.window, **turned)
    kernels.decode_attention(operands, params=params)


def triton_attention(case: Attention) -> None:
    """Through Triton."""
    attention(decode_attention, DecodeParams(case.splits), case)


def mosaic_attention(case: Attention) -> None:
    """Through Mosaic GPU."""
    attention(mosaic_decode_attention, MosaicParams(case.splits, case.warps, case.teams), case)


def products(head_dim: int, dtype: Any, slots: int, group: int) -> None:
    """Queries with packed keys, and probabilities with packed values."""
    rng = np.random.default_rng(3)
    rows = _rows(rng, (2, 2, 224, head_dim), dtype, slots)
    spmv.key_spmv(_normal(rng, (2, 2, group, head_dim), dtype), rows)
    spmv.value_spmv(_normal(rng, (2, 2, group, 224), dtype), rows, params=DecodeParams(2))


def prunes(
    head_dim: int, dtype: Any, slots: Sequence[int], head_axis: int, *, centred: bool, weighed: bool = False
) -> None:
    """Keys, and values where there are slots for them; rows to the end of source and target, and one sequence none."""
    rng = np.random.default_rng(4)
    shape = (3, 2, 133, head_dim) if head_axis == 1 else (3, 133, 2, head_dim)
    targets = [_rows(rng, (3, 2, 160, head_dim), dtype, count) for count in slots]
    mean = _mean(rng, 3, 2, head_dim)
    found = [
        Prune(
            _normal(rng, shape, dtype),
            target,
            mean if centred and i == 0 else None,
            rescale=centred and i == 1,
            weight=jnp.abs(_normal(rng, (3, 2, head_dim), jnp.float32)) if weighed and i == 0 else None,
        )
        for i, target in enumerate(targets)
        if target.bitmap is not None
    ]
    first, start, held = (jnp.array(x, jnp.int32) for x in ([37, 0, 5], [64, 0, 160], [96, 32, 96]))
    prune_pack(found, first, start, held, rows=96, head_axis=head_axis)


def codes(head_dim: int, dtype: Any, bits: int, slots: int, pairs: Pairs, *, centred: bool) -> None:
    """Keys or values to codes, turned where there is no bitmap; to the same rows as `prunes`."""
    rng = np.random.default_rng(5)
    target = _rows(rng, (3, 2, 160, head_dim), dtype, slots, bits, pairs)
    weight = jnp.abs(_normal(rng, (3, 2, head_dim), jnp.float32)) if slots else None
    mean = _mean(rng, 3, 2, head_dim) if centred else None
    code = Code(_normal(rng, (3, 133, 2, head_dim), dtype), target, slots, mean, weight, turn=not slots)
    first, start, held = (jnp.array(x, jnp.int32) for x in ([37, 0, 5], [64, 0, 160], [96, 32, 96]))
    code_pack([code], first, start, held, rows=96, head_axis=2)


CASES: dict[str, Callable[[], None]] = {
    **{f"triton, {name}": functools.partial(triton_attention, case) for name, case in ATTENTION.items()},
    **{f"mosaic, {name}": functools.partial(mosaic_attention, case) for name, case in (ATTENTION | CODES).items()},
    "products, 20 query heads": functools.partial(products, 128, BF16, 40, 20),
    "products, 3 query heads": functools.partial(products, 64, F16, 36, 3),
    "prune, plain": functools.partial(prunes, 64, BF16, (20, 32), 2, centred=False),
    "prune, keys alone": functools.partial(prunes, 128, F16, (36,), 1, centred=False),
    "prune, centred, rescaled": functools.partial(prunes, 128, BF16, (64, 40), 1, centred=True),
    "prune, weighed": functools.partial(prunes, 64, BF16, (20, 32), 2, centred=False, weighed=True),
    "prune, centred, weighed, rescaled": functools.partial(prunes, 128, BF16, (40, 40), 2, centred=True, weighed=True),
    "prune, centred, rescaled, 64": functools.partial(prunes, 64, F16, (64, 20), 2, centred=True),
    "code, 4 bits, centred": functools.partial(codes, 128, BF16, 4, 0, "channels", centred=True),
    "code, 2 bits, 64": functools.partial(codes, 64, F16, 2, 0, "tokens", centred=False),
    "code, pruned in 4 bits": functools.partial(codes, 128, BF16, 4, 40, "channels", centred=True),
}


def prepare(folder: pathlib.Path, only: str) -> int:
    """Run all cases and write their launches, each as NAME.json and .npz; 1 if one could not be recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"jax {jax.__version__} on {jax.devices('cuda')[0].device_kind}")
    recorder = cupti.Recorder()
    failed = []
    for name, case in CASES.items():
        if only not in name:
            continue
        try:
            with spied(recorder, folder, name):
                case()
        except Exception:
            traceback.print_exc(limit=-4)
            failed.append(name)
    print(f"{len(failed)} cases could not be recorded" + (f": {'; '.join(failed)}" if failed else ""))
    return int(bool(failed))


@contextlib.contextmanager
def spied(recorder: cupti.Recorder, folder: pathlib.Path, name: str) -> Iterator[None]:
    """Record what is launched through Triton and Mosaic GPU meanwhile."""
    pallas_call, kernel_call = tl.pallas_call, lowering.kernel_call

    def triton_call(kernel: Any, **options: Any) -> Callable[..., Any]:
        call = pallas_call(kernel, **options)
        aliases = {out: operand for operand, out in options.get("input_output_aliases", {}).items()}
        label = f"{name}, {options['name']}".replace(" ", "_").replace(",", "")
        return lambda *operands: record(recorder, folder / label, call, operands, aliases)

    def mosaic_call(body: Any, *operands: jax.Array, **options: Any) -> Any:
        label = f"{name}, {body.func.__name__}".replace(" ", "_").replace(",", "")
        return record(recorder, folder / label, functools.partial(kernel_call, body, **options), operands, {})

    with (
        mock.patch.object(tl, "pallas_call", triton_call),
        mock.patch.object(lowering, "kernel_call", mosaic_call),
    ):
        yield


def record(
    recorder: cupti.Recorder,
    path: pathlib.Path,
    call: Callable[..., Any],
    operands: Sequence[jax.Array],
    aliases: Mapping[int, int],
) -> Any:
    """Call what launches one kernel, and write the launch.

    Args:
        recorder: it sees the launch.
        path: of the files, without their endings.
        call: takes the operands; its results are the kernel's own.
        operands: the kernel's.
        aliases: by the number of a result, the operand whose place it takes.

    Returns:
        The results.
    """
    compiled = jax.jit(call).lower(*operands).compile(compiler_options=device_time.NO_GRAPHS)
    before = [_bytes(x) for x in operands]
    recorder.launches.clear()
    results = jax.block_until_ready(compiled(*operands))
    arrays = [*operands, *jax.tree.leaves(results)]
    launch, pointers = _find(recorder.launches, [x.unsafe_buffer_pointer() for x in arrays], aliases)
    after = before + [_bytes(x) for x in arrays[len(operands) :]]
    for number, content in enumerate(after[len(operands) :]):
        before.append(before[aliases[number]] if number in aliases else np.full_like(content, 0xFF))
    contents: dict[str, Any] = {"cubin": np.frombuffer(recorder.cubin(launch.name), np.uint8)}
    contents |= {f"before{i}": x for i, x in enumerate(before)} | {f"after{i}": x for i, x in enumerate(after)}
    np.savez(path.with_suffix(".npz"), **contents)
    facts = launch._asdict() | {"params": [x.hex() for x in launch.params]}
    path.with_suffix(".json").write_text(json.dumps(facts | {"buffers": len(arrays), "pointers": pointers}))
    print(f"{path.name}: {launch.name}, {len(launch.params)} parameters, {len(pointers)} pointers", flush=True)
    return results


def _bytes(x: jax.Array) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def _find(
    launches: Sequence[cupti.Launch], addresses: Sequence[int], aliases: Mapping[int, int]
) -> tuple[cupti.Launch, list[tuple[int, int, int]]]:
    """The launch that is given all buffers, and where in its parameters: (parameter, byte, buffer)."""
    buffer_at = {address: number for number, address in enumerate(addresses)}
    # XLA copies an operand that a result replaces, to where the result stands
    needed = {address for number, address in enumerate(addresses) if number not in aliases.values()}
    for launch in reversed(launches):
        pointers = []
        for number, param in enumerate(launch.params):
            for offset in range(0, len(param) - 7, 8):
                word = int.from_bytes(param[offset : offset + 8], "little")
                if word in buffer_at:
                    pointers.append((number, offset, buffer_at[word]))
        if needed <= {addresses[buffer] for *_, buffer in pointers}:
            return launch, pointers
    raise LookupError(f"none of {[x.name for x in launches]} was given all of {len(addresses)} buffers")


def _attention_data(case: Attention) -> tuple[jax.Array, Rows, Rows, Tail, jax.Array, Mean | None]:
    """Query, keys, values, tail, packed lengths and mean."""
    rng, batch = np.random.default_rng(2), len(LENGTHS)
    lengths = np.minimum(LENGTHS, case.rows)
    shape = (batch, case.kv_heads, case.rows, case.head_dim)
    seen = np.arange(case.rows) < lengths[:, None]
    key = _hidden(_rows(rng, shape, case.dtype, case.k_slots, case.k_bits), seen)
    value = _hidden(_rows(rng, shape, case.dtype, case.v_slots, case.v_bits, "tokens"), seen)
    dense = (batch, case.kv_heads, SINKS + RECENT, case.head_dim)
    tail = Tail(_normal(rng, dense, case.dtype), _normal(rng, dense, case.dtype), SINKS)
    query = _normal(rng, (batch, case.kv_heads, case.group, case.head_dim), case.dtype)
    mean = _mean(rng, batch, case.kv_heads, case.head_dim) if case.centred else None
    return query, key, value, tail, jnp.asarray(lengths, jnp.int32), mean


def _normal(rng: np.random.Generator, shape: Sequence[int], dtype: Any) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def _mean(rng: np.random.Generator, batch: int, kv_heads: int, head_dim: int) -> Mean:
    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    return Mean(_normal(rng, (batch, kv_heads, head_dim), jnp.float32), frequencies.astype(np.float32), SINKS)


def _rows(
    rng: np.random.Generator, shape: Sequence[int], dtype: Any, slots: int, bits: int = 16, pairs: Pairs = "channels"
) -> Rows:
    """Of every entry where there are no slots; else of 0, 1, slots / 2 or slots, in any channels or the last ones."""
    x = _normal(rng, shape, dtype)
    if slots == 0:
        return RowFormat(shape[-1], np.dtype(dtype), None, codec_of("bits", bits, pruned=False), pairs).pack(x)
    channels = np.broadcast_to(np.arange(shape[-1]), shape)
    order = np.where(rng.random((*shape[:-1], 1)) < 0.3, channels[..., ::-1], rng.permuted(channels, axis=-1))
    return mj.pack(x, order < rng.choice([0, 1, slots // 2, slots, slots], (*shape[:-1], 1)), slots=slots, bits=bits)


def _hidden(rows: Rows, seen: np.ndarray) -> Rows:
    """Rows with NaN and full bitmaps where bool [B, S] does not hold."""
    if rows.scale is not None:
        hidden = layout.to_lanes(jnp.asarray(~seen))[:, None]
        rows = dataclasses.replace(rows, scale=jnp.where(hidden, jnp.nan, rows.scale))
    if rows.bitmap is None:
        if rows.codec.bits:
            return rows
        return dataclasses.replace(rows, payload=jnp.where(seen[:, None, :, None], rows.payload, jnp.nan))
    of_blocks = seen.reshape(seen.shape[0], 1, -1, 1, 32, 1)
    return dataclasses.replace(
        rows,
        bitmap=jnp.where(seen[:, None, :, None], rows.bitmap, jnp.uint32(0xFFFFFFFF)),
        payload=rows.payload if rows.codec.bits else jnp.where(of_blocks, rows.payload, jnp.nan),
    )
