"""What a softmax layer's attention was seen to do on some text: where a converted layer can start from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SINKS = 4
"""Tokens at the beginning of a text that heads attend to for lack of anything better, whatever they say."""


@dataclass(frozen=True)
class Seen:
    """Means over tokens, float64.

    Attributes:
        query_moment: of q q^T, (Hq, D, D), rotary embedding applied as in all of these.
        key_mean: of k, (Hk, D).
        key_moment: of (k - mean) (k - mean)^T, (Hk, D, D).
        distance_mass: attention weight of the token n steps back, (Hq, N), the first SINKS tokens of the text left out.
        sink_mass: attention weight of those, (Hq,).
    """

    query_moment: Tensor
    key_mean: Tensor
    key_moment: Tensor
    distance_mass: Tensor
    sink_mass: Tensor

    def reach(self, nearest: int = 0) -> Tensor:
        """The mean distance in tokens of what lies `nearest` tokens back or more, counted from there, (Hq,); at least 1."""
        far = self.distance_mass[:, nearest:]
        steps = far.new_tensor(range(far.shape[1]))
        return ((far * steps).sum(1) / far.sum(1).clamp(min=1e-12)).clamp(min=1.0)
