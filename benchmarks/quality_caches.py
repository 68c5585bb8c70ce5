"""The caches whose quality `benchmarks.quality_sweep` measures: every pruning rule, every format, their neighbours."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import mustafar_jax as mj
from mustafar_jax.generation import DENSE
from mustafar_jax.pruning import Context, Method, largest, magnitude_bits
from mustafar_jax.quality.quantised import Quantised

Config = mj.CompressionConfig


@dataclasses.dataclass(frozen=True)
class CountedMethod(Method):
    """A rule by magnitude, or magnitude times query, that keeps `count` entries of every vector."""

    count: int = 0

    def kept(self, head_dim: int, sparsity: float) -> float:
        """The fraction of entries that the masks keep."""
        return self.count / head_dim


@dataclasses.dataclass(frozen=True)
class Counted(Config):
    """A config with an explicit number of kept entries, which `keep_count` would round up, in as many slots as that."""

    count: int = 4

    @property
    def key_method(self) -> Method:
        """The largest, weighted by the recent queries where k_method is "output_aware"."""
        by_query = self.k_method == "output_aware"
        return CountedMethod(functools.partial(_mask, self.count, by_query), needs_queries=by_query, count=self.count)

    @property
    def value_method(self) -> Method:
        """The largest."""
        return CountedMethod(functools.partial(_mask, self.count, False), count=self.count)


def _mask(count: int, by_query: bool, x: jax.Array, sparsity: float, context: Context) -> jax.Array:
    if by_query:
        assert context.queries is not None
        x = x.astype(jnp.float32) * jnp.abs(context.queries).sum(axis=2, keepdims=True)
    return largest(magnitude_bits(x), count)


class Cache(NamedTuple):
    """What is measured: its rule, which of keys (K) and values (V) it compresses, and how to make it."""

    rule: str
    pruned: str
    config: Config
    is_named_in_full: bool = False

    @property
    def name(self) -> str:
        """Unique, and fit for a folder."""
        config = self.config
        sparsity = "" if self.is_named_in_full else f" {max(config.k_sparsity, config.v_sparsity):g}"
        words = f"{self.rule} {self.pruned}{sparsity}"
        return re.sub(r"[^\w.]+", "-", words)


def rules() -> list[Cache]:
    """What chooses entries, of keys, of values and of both, in 16 bits; the dense one first."""
    found = [Cache("dense", "", DENSE)]
    for s in (0.5, 0.7):
        found += [Cache(rule, "K", Config(s, 0, k_method=method)) for rule, method in _KEYS.items()]
        found += [Cache(rule, "V", Config(0, s, v_method=method)) for rule, method in _VALUES.items()]
    found += [Cache("2:4", "K", Config(0.5, 0, k_method="2:4")), Cache("2:4", "V", Config(0, 0.5, v_method="2:4"))]
    found += [Cache("2:4", "K+V", Config(0.5, 0.5, k_method="2:4", v_method="2:4"))]
    for s in (0.5, 0.7, 0.75):
        found += [
            Cache("magnitude", "K+V", Config(s, s)),
            Cache("recommended", "K+V", Config.recommended(s, s)),
            Cache("recommended, unweighed", "K+V", Config.recommended(s, s, weigh_keys=False)),
            Cache("recommended, output-aware", "K+V", Config.recommended(s, s, k_method="output_aware")),
        ]
    for s in (0.5, 0.7):
        found += [
            Cache("output-aware", "K+V", Config(s, s, k_method="output_aware")),
            Cache("ThinK", "K+V", Config(s, s, k_method="think", v_method="think")),
        ]
    found += [
        Cache("magnitude, 19 of 64", "K+V", Counted(0.7, 0.7, count=19)),
        Cache("recommended, 13 of 64", "K+V", Counted.recommended(0.75, 0.75, count=13)),
        Cache(
            "recommended, unweighed, 13 of 64",
            "K+V",
            Counted.recommended(0.75, 0.75, weigh_keys=False, count=13),
        ),
        Cache(
            "recommended, output-aware, 13 of 64",
            "K+V",
            Counted.recommended(0.75, 0.75, k_method="output_aware", count=13),
        ),
    ]
    return found + [Cache(f"int{bits}", "K+V", Quantised(bits=bits)) for bits in (4, 3, 2)]


def codes() -> list[Cache]:
    """How packed rows are coded, of keys, of values and of both, beside KIVI and what is recommended in 16 bits."""
    presets = [Cache(name, "K+V", Config.preset(name), True) for name in ("fast", "balanced", "small")]
    windows = {"balanced": ((4, 128), (64, 32), (64, 256)), "small": ((4, 32), (64, 32), (64, 256))}
    longer = [
        Cache(f"{name}, {sinks} sinks, {recent} recent", "K+V", Config.preset(name, **_window(sinks, recent)), True)
        for name, others in windows.items()
        for sinks, recent in others
    ]
    both = [
        ("8 bits", _keys(8) | _values(8)),
        ("rotated 4, not centred", _keys(4, center_keys=False) | _values(4)),
        ("rotated 3, not centred", _keys(3, center_keys=False) | _values(3)),
        ("rotated 4, rotated 3", _keys(4) | _values(3)),
        ("rotated 3", _keys(3) | _values(3)),
        ("rotated 3, rotated 2", _keys(3) | _values(2)),
        ("rotated 2", _keys(2) | _values(2)),
        ("1/2 in 4, rotated 4", _pruned(0.5, 4) | _values(4)),
        ("1/2 in 4, rotated 3", _pruned(0.5, 4) | _values(3)),
        ("1/2 in 4, rotated 2", _pruned(0.5, 4) | _values(2)),
        ("3/8 in 4, rotated 3", _pruned(0.625, 4) | _values(3)),
        ("3/8 in 4, rotated 2", _pruned(0.625, 4) | _values(2)),
        ("1/4 in 4, rotated 2", _pruned(0.75, 4) | _values(2)),
        ("1/2 in 4, 1/2 in 4", _pruned(0.5, 4) | {"v_sparsity": 0.5, "v_bits": 4, "rescale_values": True}),
    ]
    found = [Cache("dense", "", DENSE), *presets, *longer]
    found += [Cache(name, "K+V", _coded(**fields), True) for name, fields in both]
    found += [Cache("recommended", "K+V", Config.recommended(s, s)) for s in (0.5, 0.7)]
    found += [Cache("published", "K+V", Config(s, s)) for s in (0.5, 0.7)]
    found += [Cache(f"KIVI-{bits}", "K+V", Quantised(bits=bits, sink_tokens=4), True) for bits in (4, 3, 2)]
    found += [Cache("KIVI-2, 128 recent", "K+V", Quantised(bits=2, **_window(4, 128)), True)]
    keys = {f"rotated {bits}": _keys(bits) for bits in (8, 4, 3, 2)}
    keys |= {"4, not rotated": _keys(4, rotate_keys=False), "3, not centred": _keys(3, center_keys=False)}
    keys |= {f"{1 - s:g} in {bits}": _pruned(s, bits) for s in (0.5, 0.7) for bits in (16, 8, 4)}
    keys |= {f"{1 - s:g} in 4": _pruned(s, 4) for s in (0.625, 0.75)}
    found += [Cache(name, "K", _coded(**fields), True) for name, fields in keys.items()]
    values = {f"rotated {bits}": _values(bits) for bits in (8, 4, 3, 2)}
    values |= {"4, not rotated": _values(4, rotate_values=False)}
    values |= {f"0.5 in {bits}": {"v_sparsity": 0.5, "v_bits": bits, "rescale_values": True} for bits in (16, 8, 4)}
    return found + [Cache(name, "V", _coded(**fields), True) for name, fields in values.items()]


CACHES = {"rules": rules, "codes": codes}
"""The lists by name."""


def caches() -> list[Cache]:
    """All of all lists; those of one name are the same cache."""
    return list({cache.name: cache for make in CACHES.values() for cache in make()}.values())


def _coded(**fields: Any) -> Config:
    return Config(**({"k_sparsity": 0, "v_sparsity": 0, "sink_tokens": 4} | fields))


def _keys(bits: int, *, rotate_keys: bool = True, center_keys: bool = True) -> dict[str, Any]:
    return {"k_bits": bits, "rotate_keys": rotate_keys, "center_keys": center_keys}


def _pruned(sparsity: float, bits: int) -> dict[str, Any]:
    return {"k_sparsity": sparsity, "k_bits": bits, "center_keys": True, "weigh_keys": True}


def _values(bits: int, *, rotate_values: bool = True) -> dict[str, Any]:
    return {"v_bits": bits, "rotate_values": rotate_values}


def _window(sinks: int, recent: int) -> dict[str, Any]:
    return {"sink_tokens": sinks, "residual_length": recent}


_KEYS = {"magnitude": "magnitude", "output-aware": "output_aware", "ThinK": "think"}
_VALUES = {
    "magnitude": "magnitude",
    "channel magnitude": "channel_magnitude",
    "channel output-aware": "channel_output_aware",
    "ThinK": "think",
}
