"""The rotary tables against those of the original, at the size of the released model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from visualglm.backends.torch.chatglm import rotary_table, rotate
from visualglm.config import TextConfig

GOLDEN = Path(__file__).parent.parent / "goldens" / "rotary" / "golden.npz"
# Half a unit in the last place of an angle is this share of it.
ROUNDING = 2.0**-24


def table(**options: object) -> np.ndarray:
    return rotary_table(TextConfig.model_validate(options), torch.device("cpu")).numpy()


def test_tables_are_those_of_the_original():
    with np.load(GOLDEN) as golden:
        positions = golden["positions"]
        expected = np.stack([golden["fp32_cos"], golden["fp32_sin"]])
    # Libraries differ in the last bit of a power, and the angle is that times the position.
    allowed = 2 * ROUNDING * (1 + positions[:, None])
    assert (np.abs(table()[:, positions] - expected) <= allowed).all()


def test_float16_frequencies_are_those_of_the_original_cast_to_float16():
    with np.load(GOLDEN) as golden:
        positions = golden["positions"]
        expected = np.stack([golden["satfp16_cos"], golden["satfp16_sin"]])
    found = table(rotary_inv_freq_dtype="float16")[:, positions].astype(np.float16)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-11)
    assert np.abs(table()[:, positions] - expected).max() > 0.1, "exact frequencies turn otherwise"


def test_a_turn_depends_on_distances_only():
    config = TextConfig(hidden_size=64, num_attention_heads=2, intermediate_size=8)
    tables = rotary_table(config, torch.device("cpu"))
    q, k = torch.randn(2, 1, 2, 1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()

    def score(q_position: list[int], k_position: list[int]) -> torch.Tensor:
        (q_turned, k_turned) = (
            rotate(x, *tables[:, torch.tensor([[position]])].unsqueeze(2))
            for x, position in ((q, q_position), (k, k_position))
        )
        return (q_turned * k_turned).sum(-1)

    torch.testing.assert_close(score([9, 4], [2, 3]), score([109, 64], [102, 63]), rtol=0, atol=1e-4)
    assert not torch.allclose(score([9, 4], [2, 3]), score([9, 4], [3, 3]), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_turn_is_computed_in_float32(dtype: torch.dtype):
    config = TextConfig(hidden_size=64, num_attention_heads=2, intermediate_size=8)
    tables = rotary_table(config, torch.device("cpu"))[:, torch.tensor([[[1000, 700]]])].unsqueeze(2)
    x = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = rotate(x, *tables)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned, rotate(x.float(), *tables).to(dtype), rtol=0, atol=0)
