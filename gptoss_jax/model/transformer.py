"""gpt-oss: one forward for training, prefill and decode. Source: openai/gpt-oss `gpt_oss/torch/model.py`."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax import sharding
from gptoss_jax.config import GptOssConfig
from gptoss_jax.kernels.decode_matmul import decode_matmul, decode_matmul_scored
from gptoss_jax.kernels.decode_matmul import mosaic_gpu as products
from gptoss_jax.model import arrangement
from gptoss_jax.model import cache as cache_lib
from gptoss_jax.model.attention import QKV, Attention
from gptoss_jax.model.linear import Linear, RMSNorm
from gptoss_jax.model.moe import MoE
from gptoss_jax.model.rope import rope_tables


REMAT_POLICIES = {"none": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                  "layer": jax.checkpoint_policies.nothing_saveable}


_ACTIVATIONS = ("embed", "final_norm")
_LAYER_ACTIVATIONS = ("attn_norm", "attn_out", "after_attn", "mlp_norm", "router_logits", "router_indices", "router_weights", "mlp_out", "hidden")


class Capture:
    """Named activations asked for by patterns (`layers.3.hidden`, `layers.*.router_logits`); does nothing for names nobody asked for.

    prefix: what every name given to it has before it.
    """

    def __init__(self, patterns: str | Sequence[str], prefix: str = ""):
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self.prefix = prefix
        self.values: dict[str, jax.Array] = {}

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        if any(fnmatch.fnmatchcase(self.prefix + name, pattern) for pattern in self.patterns):
            self.values[self.prefix + name] = value
        return value

    def check(self, layers: int) -> None:
        """Raise ValueError for a pattern that matches nothing in a model of so many layers."""
        names = [*_ACTIVATIONS, *(f"layers.{index}.{name}" for index in range(layers) for name in _LAYER_ACTIVATIONS)]
        for pattern in self.patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"capture {pattern!r} matches no activation; there are {', '.join(_ACTIVATIONS)} and, in layers.N, "
                                 f"{', '.join(sorted(_LAYER_ACTIVATIONS))}")


class Layer(nnx.Module):
    def __init__(self, config: GptOssConfig, index: int, weights: Mapping[str, jax.Array]):
        prefix = f"model.layers.{index}"
        self.input_layernorm = RMSNorm(weights, f"{prefix}.input_layernorm", config.rms_norm_eps)
        self.self_attn = Attention(config, index, weights)
        self.post_attention_layernorm = RMSNorm(weights, f"{prefix}.post_attention_layernorm", config.rms_norm_eps)
        self.mlp = MoE(config, index, weights)

    def __call__(self, x_BTD, rope, positions, segments, real, cache, chunk, last_B, mesh, keep: Capture, transport: str = "gather", lean: bool = False):
        """Return (x after the layer [B, T, D], or [B, 1, D] of the token that `last_B` gives of each row; the new cache or None)."""
        with jax.named_scope("attention"):
            if cache is not None and x_BTD.shape[1] == 1 and self._decodes_in_few_kernels():
                x_BTD, normed, scores, early, cache = self._decode(x_BTD[:, 0], rope, cache, chunk, keep)
            else:
                early = None
                out, cache = self.self_attn(keep("attn_norm", self.input_layernorm(x_BTD)), rope, positions, segments, cache, chunk, mesh)
                x_BTD = x_BTD + keep("attn_out", out)
                if last_B is not None:
                    x_BTD, real = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1), None  # of a row without any, somebody's
                normed = self.post_attention_layernorm(x_BTD)
                scores = self.mlp.router(normed, jnp.float32, mesh=mesh, biased=False)
            keep("after_attn", x_BTD)
        with jax.named_scope("mlp"):
            logits, indices, weights = self.mlp.route(scores)
            keep("router_logits", logits)
            out = self.mlp(keep("mlp_norm", normed), scores, keep("router_indices", indices), keep("router_weights", weights), real, mesh, transport, lean,
                           early)
            x_BTD = x_BTD + keep("mlp_out", out)
        return keep("hidden", sharding.constrain(x_BTD, ("batch", "tokens", None), mesh)), cache

    def _decodes_in_few_kernels(self) -> bool:
        """Return whether projections are joined, as on a single GPU, and those after them have no adapters, for which there is no kernel."""
        return hasattr(self.self_attn, QKV) and self.self_attn.o_proj.lora_A is None and self.mlp.router.lora_A is None

    def _decode(self, x_BD, rope, cache, chunk, keep: Capture):
        """Do all before the experts for one token a row. Returns (x after attention, its norm, the router's scores, all [B, 1, ...]; the latter two's
        EarlyScores or None; the new cache)."""
        for_hopper, early = self.self_attn.for_hopper, None
        output, norm, router = self.self_attn.o_proj, self.post_attention_layernorm, self.mlp.router
        after = output.weight[...], output.bias[...], norm.weight[...], router.weight[...]
        if for_hopper and not keep.patterns and (found := self.self_attn.decode_block(x_BD, self.input_layernorm, rope, cache, chunk, after)):
            x_BD, early, cache = found
        else:
            qkv_BJ, _, normed_BD = self.input_layernorm.before(getattr(self.self_attn, QKV), x_BD, for_hopper=for_hopper)
            keep("attn_norm", normed_BD[:, None])
            attended_BI, cache = self.self_attn.decode(qkv_BJ, rope, cache, chunk, x_BD.dtype)
            arrays = attended_BI, *after[:2], x_BD, *after[2:]
            if for_hopper and not keep.patterns and products.unmet_scored(*arrays) is None:
                x_BD, early = decode_matmul_scored(*arrays, epsilon=norm.epsilon, for_hopper=True)
            else:
                out_BD, _, _ = decode_matmul(*arrays[:3], for_hopper=for_hopper)
                keep("attn_out", out_BD[:, None])
                scores_BE, x_BD, normed_BD = norm.before(router, x_BD, out_BD, for_hopper=for_hopper)
        if early is not None:
            normed_BD, scores_BE = norm(x_BD), early.scores()  # where a kernel takes the early ones, of no use and not computed
        return x_BD[:, None], normed_BD[:, None], scores_BE[:, None], early, cache


class GptOss(nnx.Module):
    """The model: an nnx.Module and a pytree. A weight's path in it is its Hugging Face name, without the leading `model.`.

    weights: every array by Hugging Face name (`model.weights.declare`), experts packed or dense; or `arrays()` of a model. Activations have
    the dtype of the embedding. mesh: where the weights lie, if on several devices; `jax.set_mesh` takes precedence. Raises ValueError for
    a name that isn't the model's, KeyError for one that is missing.
    """

    def __init__(self, config: GptOssConfig, weights: Mapping[str, jax.Array], *, mesh=None):
        self.config = config
        self.mesh = mesh
        self.embed_tokens = Linear(weights, "model.embed_tokens")  # only its weight is used: a row is a token's embedding
        self.layers = nnx.List([Layer(config, i, weights) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(weights, "model.norm", config.rms_norm_eps)
        self.lm_head = Linear(weights, "lm_head")
        if unknown := sorted(weights.keys() - self.arrays().keys()):  # an adapter's with a slip, say, would be of no effect
            raise ValueError(f"{unknown[0]}: no such weight")

    def __call__(self, tokens, *, positions=None, segment_ids=None, cache=None, capture=()):
        """Return logits float32 [B, T, V]; then the new cache if one was given; then {name: activation} if `capture` asks for any.

        tokens: int32 [B, T]. segment_ids: int32 [B, T], tokens attend within their segment, 0 is padding (whose logits mean nothing);
        with a cache only "0 or not" counts, and the real tokens of a row must be contiguous. positions: int32 [B, T], consecutive within a
        segment; by default they count from 0 in each segment, or go on where the cache ends.
        cache: from `make_cache`; never modified, the new one is returned. With `lengths` None it is taken to be empty.
        capture: names or shell patterns of activations, e.g. "layers.*.router_logits". There are `embed`, `final_norm`, and in each
        layer `attn_norm`, `attn_out`, `after_attn`, `mlp_norm`, `router_logits`, `router_indices`, `router_weights`, `mlp_out`, `hidden`.
        """
        recorder = Capture(capture)
        recorder.check(self.config.num_hidden_layers)
        x, cache = self.hidden_states(tokens, positions=positions, segment_ids=segment_ids, cache=cache, capture=recorder)
        outputs = (self.unembed(x),)
        if cache is not None:
            outputs += (cache,)
        if recorder.patterns:
            outputs += (recorder.values,)
        return outputs if len(outputs) > 1 else outputs[0]

    def hidden_states(self, tokens, *, positions=None, segment_ids=None, cache=None, capture: Capture | None = None, dtype=None,
                      prepare: Callable[[str, jax.Array], jax.Array] | None = None, remat: str = "none", expert_transport: str = "gather", last: bool = False):
        """Return (what `unembed` takes, [B, T, D]; the new cache or None), for callers that need logits of few positions only.

        last: of each row's last real token only, [B, 1, D], for which the last layer computes no more than keys, values and attention of the others.
        dtype: of activations, by default the embedding's. For training: prepare(name, weight) gives each weight of a layer as it is used,
        where it is used; remat is one of REMAT_POLICIES: what is kept for the backward pass, the rest being computed again;
        expert_transport: see `MoE`.
        """
        _check_inputs(self.config, tokens, positions, segment_ids, cache)
        if positions is not None:
            positions = positions.astype(jnp.int32)  # their differences are negative, and so are those of padding
        capture = capture or Capture(())
        mesh = sharding.ambient_mesh() or self.mesh
        shift_B = lengths_B = chunk = None
        if cache is not None:
            empty = cache.lengths is None and positions is None
            lengths_B = jnp.zeros(len(tokens), jnp.int32) if cache.lengths is None else cache.lengths
            if segment_ids is not None and tokens.shape[1] > 1:  # a chunk's padding is behind its tokens
                shift_B = -jnp.argmax(segment_ids != 0, axis=1)
                tokens, segment_ids, positions = jax.tree.map(lambda x: _roll(x, shift_B), (tokens, segment_ids, positions))
        real = None if segment_ids is None else segment_ids != 0
        if positions is None:
            positions = _positions(tokens.shape, segment_ids, lengths_B)
        if cache is not None:
            chunk = cache_lib.locate(jnp.ones(tokens.shape, bool) if real is None else real, positions, empty)
        T = tokens.shape[1]
        last_B = None if not last or T == 1 else jnp.full(len(tokens), T - 1) if real is None else T - 1 - jnp.argmax(real[:, ::-1], axis=1)
        rope = rope_tables(self.config, positions)
        x = capture("embed", self.embed_tokens.weight[...][tokens].astype(dtype or self.embed_tokens.weight[...].dtype))
        x = sharding.constrain(x, ("batch", "tokens", None), mesh)

        layer_caches = []
        for index, layer in enumerate(self.layers):
            run = functools.partial(_run_alike if prepare is None else functools.partial(_run, prepare=prepare), patterns=capture.patterns,
                                    prefix=f"layers.{index}." if prepare or capture.patterns else "", mesh=mesh, transport=expert_transport,
                                    lean=remat != "none")
            if remat != "none":
                run = jax.checkpoint(run, policy=REMAT_POLICIES[remat])
            with jax.named_scope(f"layer{index}"):
                layer_cache = None if cache is None else cache.layers[index]
                ends = last_B if index + 1 == len(self.layers) else None
                x, layer_cache, values = run(layer, x, rope, (positions, segment_ids, real), layer_cache, chunk, ends)
                layer_caches.append(layer_cache)
                capture.values |= values
        if cache is not None:
            cache = cache_lib.Cache(jnp.where(chunk.positions[:, 0] >= 0, chunk.end, lengths_B), tuple(layer_caches))
        x = capture("final_norm", self.norm(x))
        if shift_B is not None:
            x, capture.values = jax.tree.map(lambda values: _roll(values, -shift_B), (x, capture.values))
        return x, cache

    def unembed(self, x):
        """Return logits float32 [..., V] of final hidden states [..., D]."""
        return self.lm_head(x, jnp.float32, mesh=sharding.ambient_mesh() or self.mesh)

    def arrange(self) -> None:
        """Rearrange weights in place for the GPU that holds them, if one does; `weights` still gives them as published. See `arrangement`."""
        arrangement.arrange(self)

    def arrays(self) -> dict[str, jax.Array]:
        """Return what the constructor takes: every array as it is kept, the published weights but for what `arrange` made of them."""
        named = {}
        for path, variable in nnx.to_flat_state(nnx.state(self)):
            name = ".".join(str(part) for part in path)
            named[name if name.startswith("lm_head") else f"model.{name}"] = variable.get_raw_value()  # abstract weights have no [...]
        return named

    def weights(self) -> Mapping[str, jax.Array]:
        """Return every weight by its Hugging Face name, in the checkpoint's shapes; what `arrange` changed is put back when it is looked up."""
        return arrangement.published(self.config, self.arrays())

    def replace(self, weights: Mapping[str, jax.Array]) -> GptOss:
        """Return a model with some weights exchanged by name. Raises ValueError for a name or shape that isn't the model's."""
        named = self.weights()
        for name, value in weights.items():
            if name not in named:
                raise ValueError(f"{name}: no such weight")
            if value.shape != named[name].shape:
                raise ValueError(f"{name}: shape {value.shape} found, expected {named[name].shape}")
        return GptOss(self.config, arrangement.exchanged(self.config, self.arrays(), weights), mesh=self.mesh)


def _check_inputs(config: GptOssConfig, tokens, positions, segment_ids, cache) -> None:
    """Raise ValueError for what `GptOss` can't take."""
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens: {tokens.dtype}{list(tokens.shape)} found, expected integers [batch, tokens], one or more")
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name}: shape {array.shape} found, expected that of tokens, {tokens.shape}")
    if positions is not None and not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions: {positions.dtype} found, expected integers")
    if cache is not None:
        fitting = [(len(tokens), config.num_key_value_heads, config.head_dim)] * config.num_hidden_layers
        if (found := [(layer.keys.shape[0], *layer.keys.shape[2:]) for layer in cache.layers]) != fitting:
            stated, expected = (f"{len(dims)} layers of {dims[0]}" for dims in (found, fitting))
            raise ValueError(f"cache: {stated} found, expected {expected} (rows, key-value heads, head width)")


_roll = jax.vmap(functools.partial(jnp.roll, axis=0))  # each row's tokens by its own shift


def _run(layer: Layer, x, rope, tags, cache, chunk, last_B, *, prefix: str, patterns: tuple[str, ...], mesh, transport: str, lean: bool, prepare=None):
    """Return (x after the layer, its new cache, what `patterns` ask for): results, so that they can leave a rematerialised function."""
    keep = Capture(patterns, prefix)
    if prepare is not None:
        x, layer = _prepared(x, layer, f"model.{prefix}", prepare)
    x, cache = layer(x, rope, *tags, cache, chunk, last_B, mesh, keep, transport, lean)
    return x, cache, keep.values


# Layers that are alike, and whose names don't matter, are traced once: two of 20b's 24, whose first token then comes after 3.5 s, not 7.2.
_run_alike = jax.jit(_run, static_argnames=("prefix", "patterns", "mesh", "transport", "lean"))


def _prepared(x, layer: Layer, prefix: str, prepare: Callable[[str, jax.Array], jax.Array]):
    """Return x and the layer with every array replaced by prepare(prefix and path, array).

    The gradients of both come together: a compiler that put off those of the weights until the optimizer needs them would keep what they are
    made of, 97 MB a layer of 20b at 2,048 tokens. Of a layer with adapters these are what is differentiated.
    """
    graph, state = nnx.split(layer)
    flat = [(path, prefix + ".".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]
    arrays = {name: variable[...] for _, name, variable in flat}
    adapters = {name: array for name, array in arrays.items() if name.endswith(("lora_A", "lora_B"))}
    x, together = _together(x, adapters or {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)})
    arrays |= together
    return x, nnx.merge(graph, nnx.from_flat_state([(path, variable.replace(prepare(name, arrays[name]))) for path, name, variable in flat]))


@jax.custom_vjp
def _together(x, arrays):
    return x, arrays


_together.defvjp(lambda x, arrays: ((x, arrays), None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


def _positions(shape, segment_ids, lengths_B):
    """Count tokens from 0 in each segment or, with a cache, on from each row's length."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segment_ids is None:
        return index if lengths_B is None else index + lengths_B[:, None]
    if lengths_B is not None:
        last_B = jnp.maximum((segment_ids != 0).sum(axis=1, dtype=jnp.int32) - 1, 0)  # the real tokens come first
        return jnp.minimum(index, last_B[:, None]) + lengths_B[:, None]
    starts = jnp.concatenate([jnp.ones((shape[0], 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
