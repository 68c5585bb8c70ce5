import itertools
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from mustafar_jax.models import Llama, Mistral, Qwen2, Qwen3
from tests.models.odd import HF_SMALL

FULL, SLIDING = "full_attention", "sliding_attention"
LAYERS = 3
VALUES: dict[str, list[Any]] = {
    "use_sliding_window": [True, False, ...],
    "sliding_window": [7, None, ...],
    "max_window_layers": [0, 1, 2, 3, 28, ...],
    "layer_types": [
        ...,
        None,
        [FULL] * 3,
        [SLIDING] * 3,
        [FULL, SLIDING, FULL],
        [FULL] * 2,
        [],
        ["chunked_attention"] * 3,
    ],
}


@pytest.mark.parametrize(("model_class", "config_class"), [(Qwen2, Qwen2Config), (Qwen3, Qwen3Config)])
def test_qwen_s_window_is_that_of_transformers_layers_or_refused(model_class, config_class):
    found = set()
    for values in itertools.product(*VALUES.values()):
        stated = {name: value for name, value in zip(VALUES, values, strict=True) if value is not ...}
        fields = HF_SMALL | {"num_hidden_layers": LAYERS} | stated
        windows = windows_of_layers(config_class, fields)
        found.add(tuple(windows))
        if len(set(windows)) == 1:
            assert model_class.read_config(fields).sliding_window == windows[0], stated
        else:
            with pytest.raises(ValueError, match=r"(layer_types|max_window_layers).*(supported|num_hidden_layers)"):
                model_class.read_config(fields)
    assert {(), (7,) * 3, (None,) * 3, (None, 7, 7), (None, None, 4096), (None, 7, None)} <= found


def windows_of_layers(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> list[int | None]:
    """The window of each layer in transformers; none where it computes nothing."""
    try:
        config: Any = config_class(**fields)
    except StrictDataclassError:
        return []
    kinds = set(config.layer_types)
    if not kinds <= {FULL, SLIDING} or (SLIDING in kinds and config.sliding_window is None):  # an error when it runs
        return []
    return [config.sliding_window if kind == SLIDING else None for kind in config.layer_types[:LAYERS]]


def test_layers_that_differ_are_named():
    fields = HF_SMALL | {"use_sliding_window": True, "max_window_layers": 1}
    with pytest.raises(ValueError, match=r"max_window_layers=1 of num_hidden_layers=2 layers attend to all"):
        Qwen2.read_config(fields)
    with pytest.raises(ValueError, match=r"layer_types=.* the same for all layers, 'full_attention' or 'sliding_att"):
        Qwen2.read_config(fields | {"layer_types": [FULL, SLIDING]})
    with pytest.raises(ValueError, match=r"layer_types=.* the same for all layers, 'full_attention'$"):
        Qwen2.read_config(fields | {"layer_types": [SLIDING] * 2, "use_sliding_window": False})


@pytest.mark.parametrize(("model_class", "window"), [(Llama, None), (Mistral, 7), (Mistral, None)])
def test_other_families_have_one_window_whatever_qwen_s_fields_say(model_class, window):
    fields = HF_SMALL | {"sliding_window": window, "use_sliding_window": False, "max_window_layers": 1}
    assert model_class.read_config(fields).sliding_window == window
