"""The options that say how tokens are drawn."""

import argparse
from typing import Any

import jax

from mustafar_jax.arguments import parse_seed


def add_sampling(command: argparse.ArgumentParser) -> None:
    """How tokens are drawn."""
    group = command.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    group.add_argument("--top-k", type=int, help="with --temperature: draw from so many of the likeliest (all)")
    group.add_argument("--top-p", type=float, help="with --temperature: draw from the likeliest, up to this sum (1)")
    group.add_argument("--min-p", type=float, help="with --temperature: draw from what is so probable, relatively (0)")
    group.add_argument("--seed", type=parse_seed, help="with --temperature: of the random draws (0)")


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """How tokens are drawn, as `generate` takes it; ValueError for an option without effect."""
    given = {name: value for name in ("top_k", "top_p", "min_p", "seed") if (value := vars(options)[name]) is not None}
    if options.temperature == 0:
        for name in given:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} has no effect with --temperature 0, which takes the likeliest token")
        return {}
    key = jax.random.key(given.pop("seed", 0))
    return {"temperature": options.temperature, "key": key, **given}
