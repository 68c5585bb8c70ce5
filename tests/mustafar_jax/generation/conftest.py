"""Small models of random weights. Each layer is compiled: two are for what may take one for another."""

import dataclasses

import pytest

from mustafar_jax.models import Llama, Mistral
from tests.mustafar_jax.generation.setting import TINY, random_model


@pytest.fixture(scope="module")
def llama() -> Llama:
    return random_model(Llama, TINY)


@pytest.fixture(scope="module")
def one_layer() -> Llama:
    return random_model(Llama, dataclasses.replace(TINY, num_layers=1))


@pytest.fixture(scope="module")
def mistral() -> Llama:
    return random_model(Mistral, dataclasses.replace(TINY, num_layers=1, sliding_window=48))
