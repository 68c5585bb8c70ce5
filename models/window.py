"""The sliding window: how config.json says that layers attend within one, which all layers share or none has.

Mistral's layers all have the window that `sliding_window` gives. Qwen's families have fields for how it is used:
`use_sliding_window`, and `layer_types` or, where it is absent, the first layer with the window, `max_window_layers`.
"""

import reprlib
from collections.abc import Container, Mapping
from typing import Any

from mustafar_jax.models.fields import is_size, is_token

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_window(known: Container[str], fields: Mapping[str, Any]) -> int | None:
    """The window that all layers have, of a config.json without `window_problem`; None where they have none.

    Args:
        known: the names of the family's fields; where `use_sliding_window` is none of them, it changes nothing.
        fields: the content of config.json, with defaults.
    """
    window = _stated(known, fields)
    if window is None or not _is_chosen_by_layer(known):
        return window
    layer_types = fields.get("layer_types")
    full = fields["max_window_layers"] > 0 if layer_types is None else layer_types[0] == _FULL
    return None if full else window


def window_problem(known: Container[str], fields: Mapping[str, Any]) -> str | None:
    """Why not all layers attend alike, or what is wrong with `layer_types`, in words; None where nothing is."""
    layer_types, layers = fields.get("layer_types"), fields.get("num_hidden_layers")
    if layer_types is None:
        return _first_layer_problem(known, fields)
    usual = _FULL if _stated(known, fields) is None else _SLIDING
    wanted = (_FULL, _SLIDING) if usual == _SLIDING and _is_chosen_by_layer(known) else (usual,)
    if not isinstance(layer_types, list) or not any(all(kind == one for kind in layer_types) for one in wanted):
        supported = " or ".join(map(repr, wanted))
        return f"layer_types={reprlib.repr(layer_types)}, supported: the same for all layers, {supported}"
    if len(layer_types) != layers:
        return f"layer_types names {len(layer_types)} layers, num_hidden_layers={layers}"
    return None


def _first_layer_problem(known: Container[str], fields: Mapping[str, Any]) -> str | None:
    if _stated(known, fields) is None or not _is_chosen_by_layer(known):
        return None
    first, layers = fields["max_window_layers"], fields["num_hidden_layers"]
    if is_token(first) and is_size(layers) and 0 < first < layers:
        return (
            f"max_window_layers={first} of num_hidden_layers={layers} layers attend to all tokens, the others within "
            "sliding_window, supported: the same for all layers"
        )
    return None


def _stated(known: Container[str], fields: Mapping[str, Any]) -> Any:
    unused = _is_chosen_by_layer(known) and not fields["use_sliding_window"]
    return None if unused else fields.get("sliding_window")


def _is_chosen_by_layer(known: Container[str]) -> bool:
    return "use_sliding_window" in known
