"""Programs compiled for an H100 without one: few kernels a layer, no buffer that grows with tokens times context, caches in place."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
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
    """6 of them at batch 1 (6.5 with jax 0.11): a kernel each for norm and q, k and v; attention, its output and the router; choosing; the experts;
    their sum; and, of a long cache, two more, as attention of its parts and their merging are kernels of their own. Of more tokens router and routing are kernels, and gate and up, and down: 8.5.
    Chosen within gate and up, a token's experts took a kernel less and, on an H200, more time. Before the experts were one kernel there were 7.5 at
    batch 1, before dense products had one 13.5 and, at batch 4, 15.5, before routing and attention had, 22 and 26.5, before the experts had, 30."""
    assert programs["kernels_per_layer"] <= (6 if jax.__version_info__ >= (0, 12) else 6.5) and programs["kernels_per_layer_of_4_rows"] <= 8.5
    for (few, many), in_all in ((programs["kernels"][:2], 18), (programs["kernels"][2:4], 28)):
        assert many["mosaic_gpu_v2"] == in_all
        assert set(many) <= {"copy", "fusion", "mosaic_gpu_v2"}  # no loop
    assert programs["sorts"] == [[]] * 6  # nor scatters, in a fusion or alone


def test_a_decode_step_of_256_rows_starts_half_as_many_kernels_a_layer_as_it_did(programs):
    """16, four of our own: attention, routing and two products of experts; 33 when routing was by sorting."""
    assert programs["kernels_per_layer_of_256_rows"] <= 16 and programs["kernels"][5]["mosaic_gpu_v2"] == 4 * 4


def test_a_sampled_token_starts_few_kernels(programs):
    """3 of them greedy, 11 drawn, 32 by top-p, 52 by top-k, too, 56 for 256 rows (one more with jax 0.11): 3 in each of a cut's 6 passes. By halving, a filtered
    token started 477. No pass keeps what it compares: 32 bounds by 201,088 ids by 256 rows would be 1.6 GB of booleans, the logits are 206 MB."""
    for found, most in zip(programs["sampler_kernels"], (3, 11, 32, 52, 52, 56), strict=True):
        assert set(found) == {"fusion"} and found["fusion"] <= most + (jax.__version_info__ < (0, 12))
    assert programs["sampler_of_256_rows"]["temp"] < 500e6


def test_the_cache_is_written_in_place(programs):
    for name in ("decode", "prefill"):
        assert programs[name]["alias"] >= programs["cache"] > 268e6, name


def test_no_buffer_grows_with_the_context(programs):
    """131,072 tokens of context: the cache of one full layer is 268 MB, the float32 scores of a chunk of 8,192 tokens would be 275 GB."""
    assert programs["decode"]["temp"] < 50e6
    assert programs["prefill"]["temp"] < 560e6 and programs["prefill_kernels"]["__cudnn$fmhaSoftmax"] == 3  # past and chunk of the full layer


def test_no_buffer_of_a_prefill_grows_with_the_layers(programs):
    """The cache is written as soon as there is something to write: put off, that kept 88 MB a layer."""
    assert programs["prefill_of_4_layers"]["temp"] < 1.01 * programs["prefill"]["temp"]


def test_a_prompt_of_one_chunk_attends_to_nothing_else(programs):
    """57 operations of two layers, 62 when experts' rows were sorted, which is one that a GPU takes several kernels for. Attending to an empty past took 20 more."""
    found = programs["one_chunk_kernels"]
    assert found["__cudnn$fmhaSoftmax"] == 2 and set(found) == {"fusion", "__cudnn$fmhaSoftmax", "mosaic_gpu_v2"} and sum(found.values()) <= 60
    assert programs["one_chunk"]["temp"] < 560e6
    assert programs["one_chunk"]["alias"] >= 2 * (128 + 8192) * 512 * 2  # keys and values of a ring and of a full layer, in place


def test_training_attention_takes_cudnns_backward_pass_and_no_mask(programs):
    """8,192 tokens packed: T x T of bfloat16 for 64 heads would be 8.6 GB."""
    assert programs["gradient_kernels"]["__cudnn$fmhaSoftmaxBackward"] == 1 and programs["gradient"]["temp"] < 500e6


def test_training_starts_five_kernels_of_our_own_for_a_layers_experts_and_no_loop(programs):
    """4,096 tokens of 20b: two products forward, gate and up again and two transposed ones backward. What there is of 16,640 rows takes 0.1 GB of D, or
    F, and 0.2 of gate and up, which are there twice at most."""
    found = programs["trained_experts_kernels"]
    assert found["mosaic_gpu_v2"] == 5 and set(found) == {"fusion", "mosaic_gpu_v2"} and sum(found.values()) <= 61  # 58 and 59 when written
    assert programs["trained_experts"]["temp"] < 800e6
