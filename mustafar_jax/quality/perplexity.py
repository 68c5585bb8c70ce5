"""Perplexity and divergence from dense: texts teacher-forced after a long prompt whose cache is compressed."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mustafar_jax.quality.examples import Example, first_tokens, read_text, tokens_of


def examples(
    tokenizer: Any,
    texts: Sequence[pathlib.Path],
    *,
    windows: int = 8,
    prompt: int = 1536,
    continuation: int = 512,
) -> list[Example]:
    """Windows of prompt + continuation that begin at even distances in each text; a group for each.

    Args:
        tokenizer: the model's.
        texts: UTF-8 files.
        windows: of each text.
        prompt, continuation: tokens.

    Raises:
        ValueError: a text too short for so many windows that do not overlap.
    """
    length, before = prompt + continuation, first_tokens(tokenizer)
    found = []
    for file in texts:
        ids = np.asarray(tokens_of(tokenizer, read_text(file)), np.int32)
        if len(ids) < windows * length:
            raise ValueError(f"{file} has {len(ids)} tokens; {windows} windows of {length} need {windows * length}")
        last = len(ids) - length
        starts = np.linspace(0, last, windows).astype(int) if windows > 1 else [last // 2]  # books begin with titles
        for start in starts:
            window = np.concatenate([before, ids[start : start + length - len(before)]]).astype(np.int32)
            found.append(Example(f"{file.stem}:{start}", window[:prompt], file.stem, gold=window[prompt:]))
    return found
