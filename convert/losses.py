"""What a softmax layer has and a linear one has not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from convert.errors import ConversionError
from hf_linattn.config import sliding_windows

_SINKS = re.compile(r"\.(\d+)\.(?:.+\.)?sinks$")


def dropped_features(config: Any, linear: list[bool], weights: Iterable[str] = ()) -> list[dict[str, Any]]:
    """What linear layers leave behind of the source's attention.

    Args:
        config: the source's configuration.
        linear: for each layer, whether it becomes linear.
        weights: the names of the source's.

    Returns:
        One entry a feature: ``what``, its ``value`` in the source, the ``layers`` it is dropped from, and ``note``.

    Raises:
        ConversionError: windows that are none.
    """
    dropped = []
    try:
        windows = sliding_windows(config)
    except ValueError as error:
        raise ConversionError(f"config.json: {error}") from None
    windowed = [layer for layer, is_linear in enumerate(linear) if is_linear and windows[layer] is not None]
    if windowed:
        note = "a linear layer sees all earlier tokens; its decay starts within the window"
        dropped.append({"what": "sliding_window", "value": windows[windowed[0]], "layers": windowed, "note": note})
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None and any(linear):
        note = "scores of unit-length queries and keys are bounded by the temperature"
        layers = [i for i, is_linear in enumerate(linear) if is_linear]
        dropped.append({"what": "attn_logit_softcapping", "value": softcap, "layers": layers, "note": note})
    with_sinks = sorted({int(found[1]) for found in map(_SINKS.search, weights) if found})
    if of_linear := [layer for layer in with_sinks if layer < len(linear) and linear[layer]]:
        note = "a linear layer's weights sum to 1 over the tokens; the weights stay in the checkpoint, without effect"
        dropped.append({"what": "attention sinks", "value": "learned", "layers": of_linear, "note": note})
    return dropped
