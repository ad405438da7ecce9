"""Importance of a subnet from weights and gradients, element by element."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """A kind of score that needs gradients, as a sum over the elements of a subnet.

    An example counts with the absolute value of the sum.

    Attributes:
        element: (weights, gradient) of some rows -> what to add up, of the same shape.
        per_parameter: Whether the sum is divided by the subnet's number of parameters.
    """

    element: Callable[[Tensor, Tensor], Tensor]
    per_parameter: bool


MEASURES = {
    "fisher": Measure(lambda w, g: g.square(), per_parameter=True),
    "gradient": Measure(lambda w, g: g.abs(), per_parameter=True),
    "taylor": Measure(lambda w, g: w * g, per_parameter=False),
}
