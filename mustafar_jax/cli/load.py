"""The model that a command's options name."""

import argparse
from typing import Any

from rich.progress import Progress

from mustafar_jax.cli.render import bar


def load_model(options: argparse.Namespace, progress: Progress) -> tuple[Any, Any]:
    """The model and its tokenizer, None if it has none."""
    from mustafar_jax import models  # brings Flax and transformers, which --help need not wait for

    return models.load(options.model, dtype=options.dtype, progress=bar(progress, "loading"))


def load_with_tokenizer(options: argparse.Namespace, progress: Progress) -> tuple[Any, Any]:
    """The model and its tokenizer; ValueError where it has none."""
    model, tokenizer = load_model(options, progress)
    return model, _wanted(options, tokenizer)


def open_with_tokenizer(options: argparse.Namespace) -> tuple[Any, Any]:
    """The opened checkpoint, of which no weights are read yet, and its tokenizer; ValueError where it has none."""
    from mustafar_jax import models

    checkpoint = models.open_checkpoint(options.model, dtype=options.dtype)
    return checkpoint, _wanted(options, checkpoint.load_tokenizer())


def _wanted(options: argparse.Namespace, tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError(f"--model {options.model} holds no tokenizer, which turning text into tokens needs")
    return tokenizer
