"""Which device and precision are taken, and what is refused before anything is loaded."""

from pathlib import Path

import pytest
import torch

import visualglm
from visualglm.backends.torch import load
from visualglm.backends.torch.load import choose_device, choose_dtype
from visualglm.config import VisualGLMConfig
from visualglm.errors import DeviceError

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def test_auto_and_cpu():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == choose_device(CPU) == CPU


@needs_no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "cuda:99999999999"])
def test_cuda_on_a_machine_without_it(name: str):
    with pytest.raises(DeviceError, match=rf"The device '{name}' is not to be had here; this machine has cpu\."):
        choose_device(name)


@pytest.mark.parametrize("name", ["meta", "gpu", "", "cpu:1", "cuda:", "hpu", "mkldnn", "CUDA"])
def test_unknown_devices(name: str):
    """torch itself takes "meta", and calculates nothing on it."""
    with pytest.raises(DeviceError, match=r"is unknown; give auto, cpu, cuda, cuda:1, mps or npu\."):
        choose_device(name)


def test_ascend_without_its_package():
    with pytest.raises(DeviceError, match="torch_npu"):
        choose_device("npu:0")


def test_precisions(tiny_config: VisualGLMConfig):
    released, cuda = VisualGLMConfig(), torch.device("cuda")
    assert choose_dtype("auto", tiny_config, CPU) == "float32", "a small model is quick in float32 everywhere"
    assert choose_dtype("auto", released, CPU) == "bfloat16", "float16 is slow on a CPU"
    assert choose_dtype("auto", released, cuda) == "float16"
    for dtype in ("float32", "bfloat16"):
        assert choose_dtype("auto", released.model_copy(update={"dtype": dtype}), CPU) == dtype
    assert choose_dtype("float16", released, CPU) == "float16", "what is asked for is given"
    with pytest.raises(DeviceError, match="The precision 'int8' is unknown; give auto, float32, float16, bfloat16"):
        choose_dtype("int8", released, CPU)


def test_too_little_memory_is_told_before_loading(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load, "available_memory", lambda: 500 * 2**20)
    with pytest.raises(DeviceError, match=r"The model takes 60\d MiB \(.*\), but cpu has 500 MiB left; close other"):
        visualglm.load(tiny_model_dir, backend="torch", device="cpu")
