from pathlib import Path

import numpy as np
import pytest
import torch

from visualglm.checkpoint.rotary import check_rotary, rotary_tensor
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.config import TextConfig
from visualglm.errors import CheckpointError

TEXT = TextConfig()
HALF = TEXT.head_dim // 2
# As the original code computes them.
FREQUENCIES = 1.0 / (10000 ** (torch.arange(0, HALF, 2).float() / HALF))


def stored(values: torch.Tensor) -> LazyTensor:
    array = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
    return LazyTensor(str(values.dtype).removeprefix("torch."), tuple(values.shape), lambda: array)


@pytest.mark.parametrize(
    "values",
    [FREQUENCIES, FREQUENCIES.half(), FREQUENCIES.bfloat16(), FREQUENCIES.half().float()],
    ids=["float32", "float16", "bfloat16", "rounded"],
)
def test_what_the_original_stores_is_accepted(values: torch.Tensor) -> None:
    check_rotary(Path("x"), {"inv_freq": stored(values)}, TEXT)


@pytest.mark.parametrize(
    "values",
    [
        FREQUENCIES * 1.001,
        FREQUENCIES.half().nextafter(torch.tensor(2.0).half()),
        FREQUENCIES[:-1],
        FREQUENCIES * torch.nan,
    ],
    ids=["scaled", "next", "short", "nan"],
)
def test_others_are_refused_by_name(values: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"x: inv_freq does not hold the rotary frequencies of base 10000"):
        check_rotary(Path("x"), {"inv_freq": stored(values)}, TEXT)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_computed_frequencies_are_those_of_torch(dtype: str) -> None:
    computed = rotary_tensor(TEXT, dtype).array()
    expected = stored(FREQUENCIES.to(getattr(torch, dtype))).array()
    if dtype == "float32":
        np.testing.assert_allclose(computed, expected, rtol=2e-7)
    else:
        np.testing.assert_array_equal(computed, expected)
