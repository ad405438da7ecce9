"""The arithmetic that options ask for."""

import pytest
import torch

from d2ft_fl.engine.numerics import Numerics
from tests.conftest import training_options


def test_arithmetic_is_plain_unless_told_otherwise():
    assert Numerics() == Numerics(torch.float32, False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision,dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_options_decide_the_type_of_products_and_what_is_computed_again(
    precision, dtype, checkpointing
):
    found = Numerics.of(training_options(precision=precision, checkpointing=checkpointing))
    assert found == Numerics(dtype, checkpointing)
    assert found.mixed == (precision == "bf16")
    assert found.cast(torch.ones(2)).dtype == dtype


def test_a_model_in_double_precision_is_not_mixed():
    exact = Numerics(torch.float64)
    whole = torch.ones(2, dtype=torch.float64)
    assert not exact.mixed
    assert exact.cast(whole) is whole
