"""Small models of random weights."""

import dataclasses

import pytest

from mustafar_jax.models import Llama, Mistral
from tests.mustafar_jax.generation.setting import TINY, random_model


@pytest.fixture(scope="module")
def llama() -> Llama:
    return random_model(Llama, TINY)


@pytest.fixture(scope="module")
def mistral() -> Llama:
    return random_model(Mistral, dataclasses.replace(TINY, sliding_window=48))
