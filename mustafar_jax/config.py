"""How a cache is compressed."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from mustafar_jax.codecs import PLAIN, Codec, codec_of
from mustafar_jax.layout import WORD, round_slots
from mustafar_jax.pruning import KEY_METHODS, VALUE_METHODS, Method, check_sparsity
from mustafar_jax.rows import RowFormat

_BFLOAT16 = np.dtype(jnp.bfloat16)

_MOST_TOKENS = 2**30
"""Positions are of 32 bits, also those of sinks and recent tokens together."""


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """What a KV cache drops and what it keeps dense. Hashable: static under `jax.jit`.

    The defaults are the published rule (arXiv 2505.22913, section 3): per-token magnitude, a dense window of the 32
    most recent tokens. `recommended` turns on what keeps a model's output closer to dense at the same sparsity.

    Attributes:
        k_sparsity, v_sparsity: the fraction of each key or value vector that is removed, in [0, 1); 0 keeps that
            cache unpruned.
        k_bits, v_bits: of an entry that is held: 16 for the cache's own dtype, whatever that is, or codes with one
            bfloat16 scale a vector: of 8, 4, 3 or 2 bits where every entry is held, of 8 or 4 where entries are pruned.
            A cache without pruning and codes is dense.
        k_method, v_method: the rule that chooses entries, a name in `pruning.KEY_METHODS` or `VALUE_METHODS`.
        residual_length: the most recent tokens that are always dense.
        group: tokens that are pruned and packed at once, a multiple of 32.
        sink_tokens: the first tokens of a sequence that stay dense.
        center_keys: prune the distance of each key from its sequence's mean key, rotated to the token's position;
            attention adds the mean again. Needs the model's RoPE frequencies, in Hugging Face's half-split convention.
            Without effect where keys are neither pruned nor coded.
        weigh_keys: multiply what ranks a key's entries by a weight per channel that is taken from the prompt's last 512
            queries, `pruning.query_weight`; they are held without it. Where they are coded, it weighs errors, too.
            Without effect where keys are not pruned.
        rescale_values: scale what is kept of a value vector to the whole vector's L2 norm. Meant for rules that keep
            equally many entries of each vector.
        rotate_keys, rotate_values: code vectors as `rotation.turn` gives them, which makes their entries alike. For
            codes of every entry alone: what is pruned has its large entries in few channels, which a rotation would
            spread.
        v_slots: entries that a packed value has room for, where `v_method` keeps unequal rows; head_dim if None, which
            fits every mask. A value that needs more sets the cache's `overflow`.

    Raises:
        ValueError: a field out of its range, naming it.
        TypeError: a field of another type, naming it.
    """

    k_sparsity: float = 0.7
    v_sparsity: float = 0.7
    k_method: str = "magnitude"
    v_method: str = "magnitude"
    residual_length: int = 32
    group: int = 32
    sink_tokens: int = 0
    center_keys: bool = False
    rescale_values: bool = False
    v_slots: int | None = None
    weigh_keys: bool = False
    k_bits: int = 16
    v_bits: int = 16
    rotate_keys: bool = False
    rotate_values: bool = False

    def __post_init__(self) -> None:
        for name in ("k_sparsity", "v_sparsity"):
            if not isinstance(getattr(self, name), int | float):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a Python number")
            check_sparsity(name, getattr(self, name))
        codec_of("k_bits", self.k_bits, pruned=self.k_sparsity > 0)
        codec_of("v_bits", self.v_bits, pruned=self.v_sparsity > 0)
        self._check_method("k", KEY_METHODS)
        self._check_method("v", VALUE_METHODS)
        if self.weigh_keys and self.key_method.needs_queries:
            raise ValueError(
                f"weigh_keys=True must be False for k_method={self.k_method!r}, which weighs by query itself"
            )
        for name in ("residual_length", "group", "sink_tokens"):
            if not isinstance(getattr(self, name), int | np.integer):
                raise TypeError(f"{name}={getattr(self, name)!r} must be an integer")
            if getattr(self, name) > _MOST_TOKENS:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {_MOST_TOKENS}")
        for name in ("center_keys", "weigh_keys", "rescale_values", "rotate_keys", "rotate_values"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a bool")
        self._check_rotation("k", "rotate_keys")
        self._check_rotation("v", "rotate_values")
        for name in ("residual_length", "sink_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.group < WORD or self.group % WORD:
            raise ValueError(f"group={self.group} must be a positive multiple of {WORD}")
        if self.v_slots is not None:
            if not isinstance(self.v_slots, int | np.integer):
                raise TypeError(f"v_slots={self.v_slots!r} must be an integer or None")
            if self.v_slots < 1 or self.value_method.equal_rows:
                raise ValueError(f"v_slots={self.v_slots} must be at least 1, for a v_method of unequal rows")

    def _check_rotation(self, letter: str, name: str) -> None:
        sparsity, bits = getattr(self, f"{letter}_sparsity"), getattr(self, f"{letter}_bits")
        if getattr(self, name) and (sparsity > 0 or bits == 16):
            given = f"{letter}_sparsity={sparsity}, {letter}_bits={bits}"
            raise ValueError(
                f"{name}=True is for codes of every entry, {letter}_sparsity=0 and fewer bits; got {given}"
            )

    def _check_method(self, letter: str, methods: dict[str, Method]) -> None:
        name, sparsity = getattr(self, f"{letter}_method"), getattr(self, f"{letter}_sparsity")
        if name not in methods:
            raise ValueError(f"{letter}_method={name!r} must be one of {sorted(methods)}")
        if methods[name].only not in (None, sparsity) and sparsity != 0:
            raise ValueError(f"{letter}_sparsity={sparsity} must be {methods[name].only} for {letter}_method={name!r}")

    @classmethod
    def recommended(cls, k_sparsity: float = 0.7, v_sparsity: float = 0.7, **fields: Any) -> Self:
        """The preset "recommended": the published rule, dense sink tokens, centred and weighed keys, rescaled values.

        Values are rescaled only where `v_method` keeps equally many entries of each: a value of which a rule per
        channel keeps a single small entry would have it scaled up many times, which is further from the value than
        that entry alone (not measured on a model). Keys are weighed only where `k_method` does not score with queries
        itself.
        """
        return cls.preset("recommended", k_sparsity=k_sparsity, v_sparsity=v_sparsity, **fields)

    @classmethod
    def preset(cls, name: str, **fields: Any) -> Self:
        """A config by its name in `PRESETS`; `fields` override.

        What of the preset cannot go with these is left out: rotation of what they prune or do not code, weighing by a
        method that scores with queries itself, rescaling of rows that are not equal.

        Raises:
            ValueError: a name that is not there, and as the config does.
            TypeError: as the config does.
        """
        if name not in list(PRESETS):  # a list takes what cannot be hashed
            raise ValueError(f"preset {name!r} must be one of {list(PRESETS)}")
        chosen = PRESETS[name] | fields
        whole = cls(**{field: value for field, value in chosen.items() if field not in _WHERE_IT_FITS})
        fitting: dict[str, Any] = {
            field: value and (field in fields or _WHERE_IT_FITS[field](whole))
            for field, value in chosen.items()
            if field in _WHERE_IT_FITS
        }
        return dataclasses.replace(whole, **fitting)

    @property
    def is_dense(self) -> bool:
        """Whether neither keys nor values are pruned or coded: an ordinary dense cache."""
        return not (self.compresses_keys or self.v_sparsity or self.v_bits < 16)

    @property
    def compresses_keys(self) -> bool:
        """Whether keys are pruned or coded."""
        return self.k_sparsity > 0 or self.k_bits < 16

    def packed_tokens(self, length: Any) -> Any:
        """Of a sequence's first `length` tokens, how many are packed; int or integer array, as `length` is.

        They follow the sinks, come in whole groups, and leave at least `residual_length` tokens dense behind them.
        """
        groups = (length - self.sink_tokens - self.residual_length) // self.group
        return (groups + abs(groups)) // 2 * self.group  # 0 where there are fewer than none

    @property
    def shortest_packed(self) -> int:
        """The length at which a sequence has its first group packed."""
        return self.sink_tokens + self.residual_length + self.group

    @property
    def key_method(self) -> Method:
        """The rule of `k_method`."""
        return KEY_METHODS[self.k_method]

    @property
    def value_method(self) -> Method:
        """The rule of `v_method`."""
        return VALUE_METHODS[self.v_method]

    @property
    def needs_queries(self) -> bool:
        """Whether keys or values are pruned by a rule that scores with queries, or with their attention."""
        return self.needs_attention or any(method.needs_queries for method in self._methods())

    @property
    def needs_attention(self) -> bool:
        """Whether keys or values are pruned by a rule that scores with the attention that tokens receive."""
        return any(method.needs_attention for method in self._methods())

    @property
    def by_group(self) -> bool:
        """Whether the rules choose from a group of 32 tokens as they do from all of them."""
        return all(method.by_group for method in self._methods())

    def _methods(self) -> list[Method]:
        """The rules that are in use."""
        pairs = (self.k_sparsity, self.key_method), (self.v_sparsity, self.value_method)
        return [method for sparsity, method in pairs if sparsity > 0]

    def formats(self, head_dim: int, dtype: np.dtype[Any]) -> tuple[RowFormat, RowFormat]:
        """How packed keys and packed values of this dtype are stored.

        Raises ValueError where they are pruned or coded, and head_dim is no multiple of 32.
        """
        if head_dim % WORD and not self.is_dense:
            raise ValueError(f"{head_dim=} must be a multiple of {WORD} where keys or values are pruned or coded")
        slots, codecs = self.slots(head_dim), self._codecs()
        return (
            RowFormat(head_dim, dtype, slots[0] if self.k_sparsity else None, codecs[0], pairs="channels"),
            RowFormat(head_dim, dtype, slots[1] if self.v_sparsity else None, codecs[1], pairs="tokens"),
        )

    def _codecs(self) -> tuple[Codec, Codec]:
        return (
            codec_of("k_bits", self.k_bits, pruned=self.k_sparsity > 0),
            codec_of("v_bits", self.v_bits, pruned=self.v_sparsity > 0),
        )

    def slots(self, head_dim: int) -> tuple[int, int]:
        """Entries that a packed key and a packed value have room for."""
        codecs = self._codecs()
        keys = self.key_method.slots(head_dim, self.k_sparsity)
        values = self.value_method.slots(head_dim, self.v_sparsity)
        values = values if self.v_slots is None else min(self.v_slots, values)
        return round_slots(keys, codecs[0].bits), round_slots(values, codecs[1].bits)

    def removed(self, head_dim: int) -> tuple[float, float]:
        """The fractions of keys and of values that their rules are asked to remove.

        As configured; less where rows are coded and all keep equally many entries, which then fill the slots there are.
        """
        sides = (self.k_sparsity, self.key_method), (self.v_sparsity, self.value_method)
        keys, values = (
            1 - slots / head_dim if sparsity > 0 and codec != PLAIN and method.equal_rows else sparsity
            for (sparsity, method), codec, slots in zip(sides, self._codecs(), self.slots(head_dim), strict=True)
        )
        return keys, values

    def entry_bits(self, head_dim: int, dtype: np.dtype[Any] = _BFLOAT16) -> tuple[float, float]:
        """Bits that an entry of packed keys and of packed values takes, bitmaps and scales counted."""
        keys, values = (how.nbytes_of_group * 8 / (WORD * head_dim) for how in self.formats(head_dim, dtype))
        return keys, values

    def true_sparsity(self, head_dim: int) -> tuple[float, float]:
        """The fractions of packed keys and values that are really removed, after counts have been rounded."""
        keys, values = self.removed(head_dim)
        return 1 - self.key_method.kept(head_dim, keys), 1 - self.value_method.kept(head_dim, values)


_WHERE_IT_FITS: dict[str, Callable[[CompressionConfig], bool]] = {
    "rotate_keys": lambda config: config.k_sparsity == 0 and config.k_bits < 16,
    "rotate_values": lambda config: config.v_sparsity == 0 and config.v_bits < 16,
    "weigh_keys": lambda config: not config.key_method.needs_queries,
    "rescale_values": lambda config: config.value_method.equal_rows,
}
"""What presets turn on and not every config can have: where it can."""

_IMPROVED = {"sink_tokens": 4, "center_keys": True}
_CODES = _IMPROVED | {"k_sparsity": 0, "v_sparsity": 0, "rotate_keys": True, "rotate_values": True}

PRESETS: dict[str, dict[str, Any]] = {
    "fast": _CODES | {"k_bits": 4, "v_bits": 4},
    "balanced": _CODES | {"k_bits": 4, "v_bits": 2},
    "small": _CODES | {"k_sparsity": 0.7, "k_bits": 4, "v_bits": 2, "weigh_keys": True, "residual_length": 128},
    "recommended": _IMPROVED | {"weigh_keys": True, "rescale_values": True},
    "published": {},
    "dense": {"k_sparsity": 0, "v_sparsity": 0},
}
"""The fields of configs with a name; docs/quality.md says which is for what.

"fast" codes both in 4 bits, "balanced" keys in 4 and values in 2, "small" prunes keys, codes what is kept in 4 bits,
and values in 2. "recommended" prunes both, in 16 bits, with what helps that; "published" by the paper's rule. "dense"
keeps everything.
"""
