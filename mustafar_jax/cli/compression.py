"""The options that say how a cache is compressed, and the config that they make."""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

from mustafar_jax.config import CompressionConfig
from mustafar_jax.pruning import KEY_METHODS, VALUE_METHODS

SIDES = {"k": "keys", "v": "values"}


class Flag(NamedTuple):
    """An option that sets a field of the config.

    Attributes:
        sides: of what it says something, "k", "v" or "kv": where none of these is pruned it has no effect. "" for
            what decides whether they are.
        settings: the keyword arguments of `add_argument`.
    """

    sides: str
    settings: Mapping[str, Any]


def _sparsity(letter: str) -> Flag:
    default = getattr(CompressionConfig, f"{letter}_sparsity")
    return Flag("", {"type": float, "help": f"removed of each {SIDES[letter][:-1]}; 0: dense ({default})"})


def _method(letter: str, methods: Mapping[str, Any]) -> Flag:
    default = getattr(CompressionConfig, f"{letter}_method")
    text = f"rule that prunes {SIDES[letter]} ({default}); with --published-rule as its paper has it"
    return Flag(letter, {"choices": methods, "help": text})


def _number(sides: str, text: str) -> Flag:
    return Flag(sides, {"type": int, "help": text})


def _switch(sides: str, text: str) -> Flag:
    return Flag(sides, {"action": argparse.BooleanOptionalAction, "help": text})


FLAGS = {
    "k_sparsity": _sparsity("k"),
    "v_sparsity": _sparsity("v"),
    "k_method": _method("k", KEY_METHODS),
    "v_method": _method("v", VALUE_METHODS),
    "v_slots": _number("v", "room in a packed value, where its rule keeps unequal rows"),
    "residual_length": _number("kv", f"recent tokens kept dense ({CompressionConfig.residual_length})"),
    "sink_tokens": _number("kv", "first tokens kept dense; 4, or 0 with --published-rule"),
    "center_keys": _switch("k", "prune keys by their distance from the mean key"),
    "weigh_keys": _switch("k", "prune keys by what the prompt's last queries use as well"),
    "rescale_values": _switch("v", "give what is kept of a value the value's norm"),
    "group": _number("kv", f"tokens pruned at once, a multiple of 32; {CompressionConfig.group} unless given"),
}
"""By the config's field. What is not given is as in `CompressionConfig.recommended`."""


def flag_of(field: str) -> str:
    """How the command line spells it."""
    return f"--{field.replace('_', '-')}"


def add_compression(command: argparse.ArgumentParser) -> None:
    """Add all of them."""
    for field, flag in FLAGS.items():
        command.add_argument(flag_of(field), **flag.settings)
    command.add_argument(
        "--published-rule",
        action="store_true",
        help="prune as the methods' papers do: without dense sink tokens, centred and weighed keys and rescaled values",
    )


def config_of(options: argparse.Namespace) -> CompressionConfig:
    """The config; ValueError for values out of range, and for an option that has no effect beside the others."""
    given = {field: value for field in FLAGS if (value := getattr(options, field)) is not None}
    make = CompressionConfig if options.published_rule else CompressionConfig.recommended
    config = make(**given)
    for field in given:
        _check_effect(flag_of(field), FLAGS[field].sides, config)
    if options.published_rule:
        _check_effect("--published-rule", "kv", config)
    return config


def _check_effect(flag: str, sides: str, config: CompressionConfig) -> None:
    dense = [side for side in sides if getattr(config, f"{side}_sparsity") == 0]
    if sides and len(dense) == len(sides):
        sparsities = " and ".join(f"{flag_of(f'{side}_sparsity')} 0" for side in dense)
        what = " and ".join(SIDES[side] for side in dense)
        raise ValueError(f"{flag} has no effect with {sparsities}, which leaves {what} as they are")
