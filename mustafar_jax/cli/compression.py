"""The options that say how a cache is compressed, and the config that they make."""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from mustafar_jax.codecs import WHOLE
from mustafar_jax.config import PRESETS, CompressionConfig
from mustafar_jax.pruning import KEY_METHODS, VALUE_METHODS

SIDES = {"k": "keys", "v": "values"}


class Flag(NamedTuple):
    """An option that sets a field of the config.

    Attributes:
        sides: of what it says something, "k", "v" or "kv"; "" for what decides whether these are compressed.
        settings: the keyword arguments of `add_argument`.
        of_pruning: whether it has an effect only where one of its sides is pruned; else it has one where a side is
            coded, too.
    """

    sides: str
    settings: Mapping[str, Any]
    of_pruning: bool = False


def _sparsity(letter: str) -> Flag:
    return Flag("", {"type": float, "help": f"fraction removed of each {SIDES[letter][:-1]}; 0: none"})


def _bits(letter: str) -> Flag:
    text = f"of each entry of {SIDES[letter]} that is held, 8 or 4 where they are pruned; 16: as it is"
    return Flag("", {"type": int, "choices": sorted(WHOLE, reverse=True), "help": text})


def _method(letter: str, methods: Mapping[str, Any]) -> Flag:
    text = f"rule that prunes {SIDES[letter]}; with --preset published as its paper has it"
    return Flag(letter, {"choices": methods, "help": text}, of_pruning=True)


def _number(sides: str, text: str) -> Flag:
    return Flag(sides, {"type": int, "help": text})


def _switch(sides: str, text: str, *, of_pruning: bool = True) -> Flag:
    return Flag(sides, {"action": argparse.BooleanOptionalAction, "help": text}, of_pruning)


FLAGS = {
    "k_sparsity": _sparsity("k"),
    "v_sparsity": _sparsity("v"),
    "k_bits": _bits("k"),
    "v_bits": _bits("v"),
    "k_method": _method("k", KEY_METHODS),
    "v_method": _method("v", VALUE_METHODS),
    "v_slots": Flag("v", {"type": int, "help": "room in a packed value, where its rule keeps unequal rows"}, True),
    "residual_length": _number("kv", "recent tokens kept dense"),
    "sink_tokens": _number("kv", "first tokens kept dense"),
    "center_keys": _switch("k", "store keys as their distance from the mean key", of_pruning=False),
    "weigh_keys": _switch("k", "prune keys by what the prompt's last queries use as well"),
    "rescale_values": _switch("v", "give what is kept of a value the value's norm"),
    "group": _number("kv", "tokens pruned at once, a multiple of 32"),
    "rotate_keys": _switch("k", "turn keys before they are coded without a bitmap", of_pruning=False),
    "rotate_values": _switch("v", "turn values before they are coded without a bitmap", of_pruning=False),
}
"""By the config's field. What is not given is as in the preset."""


def flag_of(field: str) -> str:
    """How the command line spells it."""
    return f"--{field.replace('_', '-')}"


def add_compression(command: argparse.ArgumentParser) -> None:
    """Add all of them."""
    group = command.add_argument_group("the cache", "What is not given is as in the preset.")
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help="where the other options begin: fast (4 bits), balanced (keys 4, values 2), small (keys pruned in 4, "
        "values 2), recommended (pruned, with what helps it), published (pruned as the methods' papers have it), dense "
        "(fast; recommended beside options of pruning)",
    )
    for field, flag in FLAGS.items():
        group.add_argument(flag_of(field), **flag.settings)


def config_of(options: argparse.Namespace) -> CompressionConfig:
    """The config; ValueError for values out of range, and for an option that has no effect beside the others."""
    given = {field: value for field in FLAGS if (value := getattr(options, field)) is not None}
    begins = "recommended" if any(_is_of_pruning(field) for field in given) else "fast"
    config = CompressionConfig.preset(options.preset or begins, **given)
    for field in given:
        _check_effect(flag_of(field), FLAGS[field], config)
    return config


def _is_of_pruning(field: str) -> bool:
    return FLAGS[field].of_pruning or field.endswith("_sparsity")


def _check_effect(name: str, flag: Flag, config: CompressionConfig) -> None:
    unpruned = [side for side in flag.sides if getattr(config, f"{side}_sparsity") == 0]
    coded = [side for side in flag.sides if getattr(config, f"{side}_bits") < 16]
    if flag.sides and len(unpruned) == len(flag.sides) and (flag.of_pruning or not coded):
        bits = "" if flag.of_pruning else " and {} 16"
        sparsities = " and ".join(
            f"{flag_of(f'{side}_sparsity')} 0{bits.format(flag_of(f'{side}_bits'))}" for side in unpruned
        )
        what = " and ".join(SIDES[side] for side in unpruned)
        raise ValueError(f"{name} has no effect with {sparsities}, which leaves every entry of {what}")


def packed_rows(config: CompressionConfig, head_dim: int, dtype: DTypeLike) -> str:
    """What packed rows are, in words: the bits of an entry, and the fraction that pruning removes."""
    sparsities, bits = config.true_sparsity(head_dim), config.entry_bits(head_dim, np.dtype(dtype))
    removed = ["" if sparsity == 0 else f" ({sparsity:.4g} removed)" for sparsity in sparsities]
    keys, values = (f"{width:.4g}" for width in bits)
    return f"bits of a packed entry: keys {keys}{removed[0]}, values {values}{removed[1]}"
