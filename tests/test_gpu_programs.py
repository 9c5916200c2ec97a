"""Programs compiled for an H100 without one: few kernels a layer, no buffer that grows with tokens times context, caches in place."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "gpu_programs.py"


@pytest.fixture(scope="module")
def programs():
    if importlib.util.find_spec("jax_cuda13_plugin") is None or importlib.util.find_spec("jax_plugins") is None:
        pytest.skip("no jax-cuda13-plugin and jax-cuda13-pjrt: pip install --no-deps both in JAX's version (no GPU needed)")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_decode_step_starts_few_kernels_a_layer(programs):
    """22 of them, two the experts': 30 before those were the Hopper kernel's, an expert matmul by XLA (a loop) counted as one."""
    assert programs["kernels_per_layer"] <= 22
    assert programs["kernels"][1]["__cudnn$fmhaSoftmax"] == 4 and programs["kernels"][1]["mosaic_gpu_v2"] == 8  # one and two a layer
    assert not {"sort", "scatter", "conditional", "custom-call", "dot"} & set(programs["kernels"][1])
    assert programs["kernels"][1]["while"] == programs["kernels"][0]["while"]  # the sampler's


def test_the_cache_is_written_in_place(programs):
    for name in ("decode", "prefill"):
        assert programs[name]["alias"] >= programs["cache"] > 268e6, name


def test_no_buffer_grows_with_the_context(programs):
    """131,072 tokens of context: the cache of one full layer is 268 MB, the float32 scores of a chunk of 4,096 tokens would be 137 GB."""
    assert programs["decode"]["temp"] < 50e6
    assert programs["prefill"]["temp"] < 500e6 and programs["prefill_kernels"]["__cudnn$fmhaSoftmax"] == 3  # past and chunk of the full layer


def test_training_attention_takes_cudnns_backward_pass_and_no_mask(programs):
    """8,192 tokens packed: T x T of bfloat16 for 64 heads would be 8.6 GB."""
    assert programs["gradient_kernels"]["__cudnn$fmhaSoftmaxBackward"] == 1 and programs["gradient"]["temp"] < 500e6
