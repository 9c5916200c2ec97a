"""Attention in rows split over devices, against whole rows on one, at the edges of shards and windows, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from gptoss_jax.kernels.attention import reference
from gptoss_jax.model import ring
from gptoss_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quickly_compiled")
N, K, H = 6, 2, 8


def split(mesh, window):
    """Attention as a function of whole rows, whose heads and tokens lie on the mesh."""
    wide, narrow = P("data", "context", "tensor"), P("data", "context")

    def local(q, k, v, sinks, positions, segments):
        return ring.attention(q, k, v, sinks, positions=positions, segments=segments, window=window, axis="context")

    return jax.shard_map(local, mesh=mesh, in_specs=(wide, wide, wide, P("tensor"), narrow, narrow), out_specs=wide, check_vma=False)


def whole(window):
    def attend(q, k, v, sinks, positions, segments):
        return reference.attention(q, k, v, sinks, q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments,
                                   window=window)

    return attend


def packed_rows(T):
    """Two rows: one segment alone; three, one of which spans shards, and padding."""
    column = np.arange(T)
    starts = np.stack([np.zeros(T, int), np.select([column >= T - 2, column >= T // 2 + 1, column >= 3], [T - 2, T // 2 + 1, 3], 0)])
    segments = np.where(starts == T - 2, 0, starts + 1)
    return jnp.asarray(column - starts, jnp.int32), jnp.asarray(segments, jnp.int32)


def arrays(T, dtype=np.float32):
    random = np.random.default_rng(T)
    q, k, v, g = (jnp.asarray(random.standard_normal((2, T, heads, H)), dtype) for heads in (N, K, K, N))
    return q, k, v, jnp.asarray(random.standard_normal(N) * 2, dtype), g


def results(attend, q, k, v, sinks, g, tags):
    """(output, gradients of q, k, v and sinks)"""
    out, pull_back = jax.vjp(lambda *arrays: attend(*arrays, *tags), q, k, v, sinks)
    return out, *pull_back(g)


@pytest.mark.parametrize("window, x64", [(None, False), (1, False), (7, False), (8, False), (7, True)])  # shards of 6: 7 reaches one shard back, 8 two
def test_attention_and_gradients_of_split_rows_are_those_of_whole_rows(window, x64):
    mesh, tags = make_mesh(tensor=2, context=4), packed_rows(24)
    with jax.enable_x64(x64):
        ours, expected = (jax.jit(functools.partial(results, attend, tags=tags))(*arrays(24)) for attend in (split(mesh, window), whole(window)))
    for name, a, b in zip(("out", "q", "k", "v", "sinks"), ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6, err_msg=name)


def test_split_rows_in_bfloat16_stay_near_float32():
    mesh, tags = make_mesh(data=2, context=4), packed_rows(24)
    ours, expected = (jax.jit(functools.partial(results, attend, tags=tags))(*arrays(24, dtype))
                      for attend, dtype in ((split(mesh, None), jnp.bfloat16), (whole(None), np.float32)))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))  # 2^-8 an operation


@pytest.mark.parametrize(("window", "hops"), [(None, 7), (1, 0), (65, 1), (66, 2), (4096, 7)])
def test_keys_travel_no_further_than_the_window_reaches(window, hops, monkeypatch):
    """Shards of 64 tokens on eight devices."""
    seen, around = [], ring._around
    monkeypatch.setattr(ring, "_around", lambda *arguments: seen.append(arguments[-1]) or around(*arguments))
    program = jax.make_jaxpr(functools.partial(results, split(make_mesh(context=8), window)))(*arrays(512), packed_rows(512))
    assert seen == [hops, hops]  # forward, backward
    assert "all_gather" not in str(program)


def test_memory_of_a_device_grows_with_its_tokens_not_with_the_row():
    def of_a_device(context, T):
        mesh = make_mesh(context=context, devices=jax.devices()[:context])
        places = [NamedSharding(mesh, P(None, *axes)) for axes in (["context"],) * 3 + ([],) + (["context"],)]
        program = jax.jit(functools.partial(results, split(mesh, None)), in_shardings=(*places, places[0]))
        memory = program.lower(*arrays(T), packed_rows(T)).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    assert of_a_device(8, 2048) < 1.01 * of_a_device(4, 1024)
