"""The memory plan: bytes against hand arithmetic and against compiled programs, the search, what is refused."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from gptoss_jax import command, devices, generate, plan, sharding
from gptoss_jax.config import FULL, PRESETS, SLIDING, GptOssConfig
from gptoss_jax.inference import memory_plan
from gptoss_jax.devices import Plan
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.memory_plan import Planner
from gptoss_jax.model import GptOss, cost
from gptoss_jax.training import memory_plan as training_plan

SMALL = GptOssConfig(vocab_size=512, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2,
                     num_attention_heads=8, num_key_value_heads=4, head_dim=16, sliding_window=32, max_position_embeddings=512)

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
LORA_20B, FULL_20B = (str(CONFIGS / f"{name}.yaml") for name in ("sft_lora_20b", "sft_full_20b"))


def experts_by_hand(experts):
    """Bytes of one layer's experts of the published shapes: 17 bytes for 32 weights, 90 such blocks a row, and bfloat16 biases."""
    return experts * (5760 + 2880) * (90 * 17 + 2)


def weights_by_hand(layers, experts, expert_shards=1):
    attention = 2 * (2880 * (64 + 8 + 8) * 64 + (64 + 8 + 8) * 64 + 64 * 64 * 2880 + 2880 + 64)
    rest = 2 * (2 * 2880 + experts * 2880 + experts)
    return layers * (attention + rest + experts_by_hand(experts) // expert_shards) + 2 * (2 * 201_088 * 2880 + 2880)


@pytest.mark.parametrize("name, layers, experts, published", [("gpt-oss-20b", 24, 32, 13_761_264_768), ("gpt-oss-120b", 36, 128, 65_248_815_744)])
def test_weights_are_what_hand_arithmetic_and_the_published_files_say(name, layers, experts, published):
    assert cost.weight_bytes(PRESETS[name]) == weights_by_hand(layers, experts) == published
    assert cost.weight_bytes(PRESETS[name], mesh=cost.abstract_mesh(expert=8)) == weights_by_hand(layers, experts, 8)


def test_the_cache_grows_on_full_layers_only():
    config = PRESETS["gpt-oss-120b"]
    slot = 2 * 8 * 64 * 2  # keys and values of a token in a layer, bfloat16
    assert cost.cache_bytes(config, 1, 131_072) == slot * 18 * (131_072 + 128) == 4_836_556_800
    assert cost.cache_bytes(config, 16, 64) == 16 * slot * 36 * 64
    assert cost.cache_bytes(config, 16, 1024, mesh=cost.abstract_mesh(data=4, tensor=2)) == slot * 18 * (1024 + 128) * 16 // 8


def test_decode_reads_what_hand_arithmetic_says():
    attention, router = 2 * 2880 * (64 + 8 + 8 + 64) * 64, 2 * 2880 * 128
    experts = (5760 + 2880) * 90 * 17
    fixed = 36 * (attention + router) + 2 * 201_088 * 2880
    cache = 2 * 8 * 64 * 2 * 18 * (1000 + 128)
    assert cost.decode_bytes(PRESETS["gpt-oss-120b"], 1, 1000) == fixed + 36 * 4 * experts + cache
    every_expert = cost.decode_bytes(PRESETS["gpt-oss-120b"], 4096, 1) - 4096 * 2 * 8 * 64 * 2 * 36
    assert every_expert == fixed + 36 * 128 * experts


def test_prefill_counts_the_keys_each_query_sees_and_of_the_last_layer_one_token():
    config = SMALL.replace(sliding_window=3)
    per_token = 96 * (2 * 128 + 2 * 64 + 8) + 2 * 3 * 96 * 64
    seen = (1 + 2 + 3 + 3 + 3) + 5
    assert cost.prefill_flops(config, 2, 5) == 2 * 2 * ((5 + 1) * per_token + 4 * 96 * 2 * 64 + 2 * 128 * seen + 512 * 96)


@pytest.fixture(scope="module")
def planned():
    return Planner(SMALL, "cpu").at(2, 256)


def test_the_compiled_step_holds_weights_and_cache_and_little_else(planned):
    assert planned.parts["weights"] == cost.weight_bytes(SMALL) and planned.parts["cache"] == cost.cache_bytes(SMALL, 2, 256)
    assert planned.padding < 1000  # token ids, lengths, settings
    assert set(planned.temporaries) == {"prefill", "decode"} and all(0 < size < 1e8 for size in planned.temporaries.values())
    assert planned.needed == planned.parts["weights"] + planned.parts["cache"] + planned.padding + max(planned.temporaries.values())
    assert planned.collectives == {"prefill": {}, "decode": {}}


def test_a_context_of_any_length_is_planned_with_the_slots_that_decodes_kernel_takes():
    engine = Engine(GptOss(SMALL, cost.abstract_weights(SMALL, device=jax.devices()[0])), max_context=301)
    (_, cache, *_), _ = engine.lower(1, 301)["decode"].args_info
    assert {keys.shape[1] for keys, _ in cache.layers} == {32, 304}
    assert memory_plan.by_arithmetic(SMALL, 1, 301, memory=0).parts["cache"] == cost.cache_bytes(SMALL, 1, 304)


def test_a_mesh_divides_the_weights_and_shows_its_collectives():
    config = SMALL.replace(num_hidden_layers=1)
    found = Planner(config, "cpu", {"expert": 4}).at(1, 64)
    assert found.parts["weights"] == cost.weight_bytes(config, mesh=cost.abstract_mesh(expert=4)) < cost.weight_bytes(config)
    count, size = found.collectives["decode"]["all-reduce"]
    assert count >= 1 and size >= 96 * 2  # of the layer's output


def test_collectives_are_counted_with_the_bytes_of_their_results():
    mesh = sharding.make_mesh(expert=8)
    place = jax.NamedSharding(mesh, P("expert"))
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "expert"), mesh=mesh, in_specs=P("expert"), out_specs=P()))
    step = devices.compile_step(total, jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=place))
    assert step.collectives == {"all-reduce": (1, 2 * 3 * 4)}
    assert step.memory.arguments_bytes == 24 and step.memory.peak_bytes >= 48
    text = """
      %a = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), dimensions={0}
      %b = bf16[32,8]{1,0} all-gather-done(%a)
      %c = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%y)
      %d = (u8[7]{0}, pred[5]{0}) all-to-all(%z, %w)
    """
    assert devices.collectives(text) == {"all-gather": (1, 512), "collective-permute": (1, 40), "all-to-all": (1, 12)}


def test_a_collectives_operands_count_for_nothing_and_it_counts_once_however_often_it_is_written():
    text = """
      %a = ((f32[8,1,128]{2,1,0}), f32[1,1,128]{2,1,0}) reduce-scatter-start(%x), channel_id=1
      %b = f32[1,1,128]{2,1,0} reduce-scatter-done(%a)
      %c = ((bf16[2,9]{1,0}), bf16[2,9]{1,0}) all-reduce-start(%y), channel_id=6
      %d = f32[5]{0} all-reduce-start(%y), channel_id=7
      %e = ((s32[1,4]{1,0:T(8,128)(2,1)S(1)}, pred[1]{0}), (s32[8,4]{1,0:T(8,128)(2,1)S(1)}, pred[8]{0})) all-gather-start(%z, %w)
    """
    assert devices.collectives(text) == {"reduce-scatter": (1, 512), "all-reduce": (2, 36 + 20), "all-gather": (1, 136)}
    text = """
        %begins = s32[8,2]{1,0:T(2,128)} all-gather(%p), channel_id=1, frontend_attributes={chain_id="0"}
        %meanwhile = s32[8,2]{1,0:T(2,128)S(1)} all-gather(%p), channel_id=1, frontend_attributes={chain_id="0"}
        %ends = s32[8,2]{1,0:T(2,128)} all-gather(%p), channel_id=1, frontend_attributes={chain_id="0"}
        %next = s32[8,2]{1,0:T(2,128)} all-gather(%q), channel_id=1, frontend_attributes={chain_id="1"}
        %others = s32[8,2]{1,0} all-gather(%r), channel_id=1
        %equal = s32[8,2]{1,0} all-gather(%s), channel_id=1
    """
    assert devices.collectives(text) == {"all-gather": (4, 256)}


@pytest.mark.parametrize("temporaries, memory", [(lambda batch, context: 10_000, 2_000_000), (lambda batch, context: 300 * batch * context, 3_000_000),
                                                 (lambda batch, context: 50_000 + 40 * batch * context, 2_000_000)], ids=["even", "steep", "both"])
def test_the_longest_context_and_largest_batch_fit_and_the_next_ones_hardly_would(monkeypatch, temporaries, memory):
    config = SMALL.replace(max_position_embeddings=1 << 20)
    weights = cost.weight_bytes(config)
    planner = Planner(config, "cpu")
    planner.memory = weights + 40 * memory

    def compiled(config, batch, context, guess=False):
        return Plan(planner.memory, {"weights": weights, "cache": cost.cache_bytes(config, batch, context)}, temporaries={"decode": temporaries(batch, context)})

    def needs(batch, context):
        return weights + cost.cache_bytes(config, batch, context) + temporaries(batch, context)

    monkeypatch.setattr(planner, "_compile", compiled)
    known = planner.at(2, 2048)
    longest, largest = planner.longest_context(2, known, 2048), planner.largest_batch(2048, known, 2)
    assert needs(2, longest) <= planner.memory < needs(2, int(longest * 1.1) + 1024)
    assert needs(largest, 2048) <= planner.memory < needs(4 * largest, 2048)
    planner.memory = weights
    assert planner.longest_context(2, known, 2048) is None


def planned_by(monkeypatch, temporaries, memory, **changed):
    """Return a planner of SMALL, changed, whose compiled steps take temporaries(batch, context) beside `memory` more bytes than its weights."""
    config = SMALL.replace(**{"max_position_embeddings": 1 << 17} | changed)
    planner, weights = Planner(config, "cpu"), cost.weight_bytes(config)
    planner.memory, planner.compiled = weights + memory, []

    def compiled(config, batch, context, guess=False):
        planner.compiled.append((batch, context))
        parts = {"weights": weights, "cache": cost.cache_bytes(config, batch, context)}
        return Plan(planner.memory, parts, temporaries={"decode": temporaries(batch, context)})

    monkeypatch.setattr(planner, "_compile", compiled)
    return planner


@pytest.mark.parametrize("temporaries", [lambda batch, context: 10_000 * batch * context, lambda batch, context: batch * context**2,
                                         lambda batch, context: 10**8 + 10_000 * batch * min(context, 9000) + 100 * batch * context,
                                         lambda batch, context: 10**8 if context < 5000 else 10**10], ids=["steep", "square", "bent", "jump"])
def test_where_the_plan_does_not_fit_a_smaller_context_and_batch_are_found(monkeypatch, temporaries):
    planner = planned_by(monkeypatch, temporaries, 2 * 10**8)
    assert planner.at(1, 1 << 17).needed > planner.memory and planner.at(2048, 4096).needed > planner.memory
    longest, largest = planner.longest_context(1, planner.at(1, 1 << 17), 1 << 17), planner.largest_batch(4096, planner.at(2048, 4096), 2048)
    assert planner.at(1, longest).needed <= planner.memory < planner.at(1, longest + 1024).needed
    assert planner.at(largest, 4096).needed <= planner.memory < planner.at(2 * largest, 4096).needed
    assert len(planner.compiled) < 25


def test_none_fits_only_where_the_smallest_was_refused(monkeypatch):
    planner = planned_by(monkeypatch, lambda batch, context: 10**8, 2 * 10**7)
    assert planner.longest_context(1, planner.at(1, 4096), 4096) is None and (1, 16) in planner.compiled
    assert planner.largest_batch(4096, planner.at(8, 4096), 8) is None and (1, 4096) in planner.compiled


def test_never_less_is_said_to_fit_than_was_just_shown_to(monkeypatch):
    planner = planned_by(monkeypatch, lambda batch, context: 1000 * batch * context, 2 * 10**6)
    for batch, context in (1, 1500), (8, 128):
        planner.memory = planner.at(batch, context).needed
        assert planner.longest_context(batch, planner.at(batch, context), context) == context
        assert planner.largest_batch(context, planner.at(batch, context), batch) == batch


def test_what_grows_with_layers_on_a_tpu_is_in_what_fits(monkeypatch):
    monkeypatch.setattr(devices, "described", lambda *_: jax.devices()[:1])
    config = SMALL.replace(num_hidden_layers=12, max_position_embeddings=1 << 17)
    planner, weights = Planner(config, "v5e"), cost.weight_bytes(config)
    planner.memory = weights + 3 * 10**8

    def compiled(config, batch, context, guess=False):
        cache = cost.cache_bytes(config, batch, context)
        return Plan(planner.memory, {"weights": cost.weight_bytes(config), "cache": cache}, temporaries={"prefill": 10**7, "decode": 2 * cache})

    monkeypatch.setattr(planner, "_compile", compiled)
    longest, largest = planner.longest_context(1, planner.at(1, 1 << 17), 1 << 17), planner.largest_batch(4096, planner.at(1, 4096), 1)
    assert planner.at(1, longest).needed <= planner.memory < planner.at(1, longest + 1024).needed
    assert planner.at(largest, 4096).needed <= planner.memory < planner.at(2 * largest, 4096).needed


@pytest.mark.parametrize("kind", [SLIDING, FULL])
def test_of_layers_of_one_kind_not_only_the_last_is_compiled_whose_experts_get_few_tokens(monkeypatch, kind):
    config = SMALL.replace(num_hidden_layers=3, layer_types=(kind,) * 3)
    planner, weights = Planner(config, "cpu"), cost.weight_bytes(config)
    planner.memory = weights + 10**7

    def compiled(config, batch, context, guess=False):
        parts = {"weights": weights, "cache": cost.cache_bytes(config, batch, context)}
        return Plan(planner.memory, parts, temporaries={"prefill": 100 * batch * context if config.num_hidden_layers > 1 else 10})

    monkeypatch.setattr(planner, "_compile", compiled)
    largest = planner.largest_batch(512, planner.at(1, 512), 1)
    assert planner.at(largest, 512).needed <= planner.memory < planner.at(2 * largest, 512).needed


def test_a_preset_and_a_checkpoint_are_planned_by_arithmetic_without_compiling(capsys):
    assert plan.main(["gpt-oss-120b", "--arithmetic", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["weights_bytes"], facts["cache_bytes"], facts["context"]) == (65_248_815_744, 4_836_556_800, 131_072)
    assert facts["left_bytes"] == int(0.95 * 84_942_979_072) - 65_248_815_744 - 4_836_556_800 and facts["temporaries_bytes"] == {}
    assert plan.main(["gpt-oss-120b", "--arithmetic", "--device", "v5e", "--mesh", "expert=2"]) == 1
    out = capsys.readouterr().out
    assert "it does not fit" in out and "unknown: not compiled" in out and "2 x v5e: expert 2" in out
    assert plan.main(["tiny", "--arithmetic", "--device", "cpu", "--context", "100"]) == 0
    assert "context 100 tokens" in capsys.readouterr().out


def test_the_cap_of_the_search_is_not_a_finding_and_a_chunk_is_said_to_be_one(monkeypatch, capsys):
    monkeypatch.setattr(Planner, "_compile", lambda self, config, batch, context, guess=False: Plan(1 << 60, {"weights": 1, "cache": 1}, temporaries={"decode": 1},
                                                                                                    collectives={"prefill": {}, "decode": {}}))
    monkeypatch.setattr(devices, "host_memory_bytes", lambda: 1 << 60)
    assert plan.main(["tiny", "--device", "cpu", "--mesh", "data=2", "--context", "1024", "--batch", "4096"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "batch 4,096, context 1,024 tokens" in lines[0] and "largest batch at 1,024 tokens: 4,096 or more" in lines
    assert "longest context at batch 4,096: 4,096 tokens, in steps of 1,024" in lines
    assert "collectives of prefill, a chunk of 65,536 tokens, results on a device: none" in lines  # 16 of each row
    assert "collectives of decode, results on a device: none" in lines


def test_arithmetic_gives_a_device_the_memory_that_the_compiled_plan_does(monkeypatch, capsys):
    monkeypatch.setattr(devices, "host_memory_bytes", lambda: 10**9)
    assert Planner(SMALL, "cpu", {"data": 2}).memory == 5 * 10**8
    assert plan.main(["tiny", "--device", "cpu", "--mesh", "data=2", "--batch", "2", "--arithmetic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_bytes"] == 5 * 10**8
    assert plan.main([LORA_20B, "--device", "cpu", "--mesh", "expert=2", "--train.microbatches=4", "--arithmetic", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["memory_bytes"] == 5 * 10**8


@pytest.mark.parametrize("argv, said", [
    (["gpt-oss-12b"], "model 'gpt-oss-12b': no such checkpoint directory or preset"),
    (["gpt-oss-20b", "--device", "h10"], "device 'h10': no such kind, expected one of A100, H100, H200, B200, v5e, v5p, v6e, 7x, cpu; did you mean"),
    (["gpt-oss-20b", "--context", "0"], "context is 0, expected 2 to the model's maximum of 131072"),
    (["gpt-oss-20b", "--context", "131073"], "context is 131073, expected"),
    (["gpt-oss-20b", "--batch", "3"], "batch is 3, expected a power of two"),
    (["gpt-oss-20b", "--mesh", "experts=8"], "--mesh 'experts=8': 'experts=8' found, expected each of data, fsdp, expert, tensor once"),
    (["gpt-oss-20b", "--mesh", "expert=99999,data=99999"], "9,999,800,001 devices, expected at most 65,536"),
    (["gpt-oss-20b", "--mesh", "expert=²"], "'expert=²' found, expected each of data, fsdp, expert, tensor once"),
    (["gpt-oss-20b", "--mesh", "context=2"], "'context=2' found, expected each of data, fsdp, expert, tensor once"),
    (["gpt-oss-20b", "--data.batch_size", "8"], "--data.batch_size: of a training configuration, found with model 'gpt-oss-20b'"),
    (["no/such.yaml"], "no/such.yaml: No such file"),
    ([LORA_20B, "--context", "8"], "--context 8: of inference, found with a training configuration, expected --data.row_tokens 8"),
    ([LORA_20B, "--mesh", "expert=3"], "data.batch_size: 8 found, expected a multiple of 24"),
    ([LORA_20B, "--init.checkpoint", "/no/such/model"], "/no/such/model"),
    ([FULL_20B, "--mesh", "fsdp=7", "--data.batch_size=14"], "7 don't divide"),
    (["gpt-oss-20b", "--mesh", "expert=5"], "mesh axes expert 5 don't divide"),
    (["tiny", "--device", "cpu", "--mesh", "data=16"], "device cpu: 8 here, expected 16"),
    (["tiny", "--device", "v5p", "--mesh", "data=3", "--batch", "4"], "3 x v5p: expected a power of two"),
    (["gpt-oss-120b", "--arithmetic", "--device", "v5p", "--mesh", "data=3"], "3 x v5p: expected a power of two"),
    (["gpt-oss-120b", "--arithmetic", "--device", "v5e", "--mesh", "data=512"], "512 x v5e: expected at most 256"),
    (["gpt-oss-120b", "--arithmetic", "--mesh", "data=12"], "12 x H100: expected at most 8, or a multiple of the 8 of a host"),
    ([LORA_20B, "--arithmetic", "--mesh", "expert=12", "--data.batch_size=96"], "12 x H100: expected at most 8"),
])
def test_unusable_requests_are_one_line_and_exit_code_2(capsys, argv, said):
    assert plan.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("device, absent, wheels", [
    *(("H100", absent, f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}") for absent in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")),
    ("v5p", "libtpu", "libtpu")])
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(capsys, monkeypatch, device, absent, wheels):
    monkeypatch.setattr(devices, "_importable", lambda module: module != absent)
    assert plan.main(["gpt-oss-20b", "--device", device]) == 2
    err = capsys.readouterr().err
    assert f"pip install --no-deps {wheels}" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("device, module, axes", [("H100", "jax_cuda13_plugin", {}), ("B200", "jax_cuda13_plugin", {"expert": 2}),
                                                  ("v5e", "libtpu", {"expert": 4})], ids=str)
def test_steps_compile_for_a_device_that_is_not_here(device, module, axes):
    if not devices._importable(module):
        pytest.skip(f"compiling for {device} needs the wheel of {module}")
    found = Planner(SMALL, device, axes).at(1, 256)
    assert found.memory > 14e9 and found.left > 0 and found.parts["weights"] == cost.weight_bytes(SMALL, mesh=cost.abstract_mesh(**axes))
    assert ("all-reduce" in found.collectives["decode"]) == bool(axes)


def test_a_program_that_its_compiler_refuses_for_its_size_says_how_much_it_needs():
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    for message, needed in (("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (240.00G) exceeds "
                             "available HBM (15.75G).", 240 << 30), ("RESOURCE_EXHAUSTED: Used 17.50M of 15.75M hbm", 35 << 19),
                            ("RESOURCE_EXHAUSTED: no more", None)):
        Refused.message = message
        with pytest.raises(devices.OutOfMemory) as caught:
            devices.finish(Refused())
        assert caught.value.needed_bytes == needed


def test_a_program_refused_for_what_is_rounded_to_all_memory_does_not_fit(monkeypatch):
    def refused(lowered):
        raise devices.OutOfMemory("Used 15.75G of 15.75G hbm", planner.memory)

    planner = Planner(SMALL, "cpu")
    monkeypatch.setattr(devices, "finish", refused)
    assert planner.at(1, 64).left < 0


def test_of_a_guess_whose_decode_step_does_not_fit_no_prefill_is_compiled(monkeypatch):
    planner, compiled = Planner(SMALL, "cpu"), []

    def finish(lowered):
        compiled.append(lowered)
        if lowered == refused:
            raise devices.OutOfMemory("too large", None)
        return devices.CompiledStep(devices.StepMemory(0, 0, 0), {}, None)

    monkeypatch.setattr(planner, "_engine", lambda *_: types.SimpleNamespace(lower=lambda *_: {name: name for name in ("prefill", "decode")}))
    monkeypatch.setattr(devices, "finish", finish)
    for refused, guess, expected in (("decode", True, ["decode"]), ("prefill", True, ["decode", "prefill"]), ("decode", False, ["prefill", "decode"])):
        compiled.clear()
        planner._seen.clear()
        assert planner._compile(SMALL, 1, 64, guess).left < 0 and compiled == expected


def test_generate_says_what_it_will_take_and_refuses_what_does_not_fit(capfd, monkeypatch):
    monkeypatch.setattr(devices, "usable_bytes", lambda device=None: 3_000_000)
    assert generate.main(["What is 17 + 25?"]) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and [line.split()[0] for line in lines[:6]] == ["weights", "cache", "temporaries", "sum", "of", "left"] and "-" in lines[5]
    assert len(lines) == 7 and "weights and cache of 1 x 2,048 tokens take" in lines[6] and "more than the 3.00 MB free" in lines[6]
    said = []
    monkeypatch.undo()
    memory_plan.announce(SMALL, 1, 64, write=said.append)
    assert len(said) == 1 and said[0].startswith("[memory: weights 0.") and "free on this host]" in said[0]


def test_the_share_of_a_gpu_is_the_same_in_both_places_that_state_it_and_the_users_own_is_left_alone(monkeypatch):
    assert float(command.GPU_FRACTION) == devices.GPU_FRACTION
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    command.use_gpu_memory()
    assert "XLA_CLIENT_MEM_FRACTION" not in command.os.environ  # JAX refuses both


def test_layers_of_one_kind_only_are_planned_too():
    for kind in (SLIDING, FULL):
        config = SMALL.replace(layer_types=(kind, kind))
        assert memory_plan.by_arithmetic(config, 1, 512, memory=0).parts["cache"] == 2 * 2 * 4 * 16 * 2 * (32 if kind == SLIDING else 512)


# --- training ----------------------------------------------------------------------------------------------------------------------


def planned_as_json(capsys, *argv):
    code = plan.main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code < 2, err
    return code, json.loads(out)


def test_what_stays_of_a_published_model_in_training_is_what_hand_arithmetic_says(capsys):
    """Rank 8 on attention and experts of 24 layers; and 4 bytes a weight, the experts' split over all of eight devices."""
    attention = 8 * (2 * 64 * 64 + 2 * 8 * 64 + 4 * 2880)  # q and o have 4096 and 2880, k and v 512 and 2880
    experts = 8 * 32 * (2880 + 5760 + 2 * 2880)
    code, facts = planned_as_json(capsys, LORA_20B, "--arithmetic")
    assert code == 0 and facts["frozen_weights_bytes"] == 13_761_264_768 and facts["mesh"]["expert"] == 1
    assert facts["trained_weights_bytes"] == 4 * 24 * (attention + experts) and facts["batch_bytes"] == 5 * 4 * 8 * 4096
    assert 0 < facts["optimizer_state_bytes"] - 2 * facts["trained_weights_bytes"] < 100  # counts
    _, facts = planned_as_json(capsys, FULL_20B, "--arithmetic", "--mesh", "expert=4,fsdp=2")
    matrices, others = 24 * 32 * 3 * 2880 * 2880, 2 * 201_088 * 2880 + 24 * 2 * (64 + 8) * 64 * 2880
    assert facts["trained_weights_bytes"] == pytest.approx(4 * (matrices / 8 + others / 2), rel=0.002) and "frozen_weights_bytes" not in facts


TRAINED = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
           "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 20, "sliding_window": 8}


@pytest.fixture
def trained(quickly_compiled, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"model": TRAINED, "data": {"row_tokens": 16, "batch_size": 4}, "mesh": {"fsdp": 2}}))
    return str(file)


def test_a_training_step_is_planned_for_a_mesh(trained, capsys):
    code, facts = planned_as_json(capsys, trained, "--device", "cpu", "--mesh", "expert=2")
    assert code == 0 and facts["devices"] == 2 and facts["mesh"]["fsdp"] == 1
    assert facts["collectives"]["the step"]["all-gather"][0] >= 1  # tokens, to the experts
    parts = sum(facts[f"{part}_bytes"] for part in ("trained_weights", "optimizer_state", "batch", "padding"))
    assert facts["needed_bytes"] == parts + facts["temporaries_bytes"]["the step"] and facts["padding_bytes"] < 100


def test_a_deep_model_may_be_planned_from_shallow_ones(monkeypatch, capsys):
    def compiled(config, mesh, exact):
        layers = len(config.model.layer_types)
        return 0, 1000 + 7 * layers, {"all-gather": (1 + 2 * layers, 10 * layers)}

    monkeypatch.setattr(training_plan, "_compile", compiled)
    _, facts = planned_as_json(capsys, str(CONFIGS / "sft_lora_120b.yaml"), "--device", "cpu", "--quick")
    assert facts["extended"] and facts["temporaries_bytes"] == {"the step": 1000 + 7 * 36}
    assert facts["collectives"]["the step"] == {"all-gather": [1 + 2 * 36, 360]}


@pytest.mark.parametrize("words", [["--quick"], []], ids=["extended", "all layers"])
def test_a_training_step_refused_for_a_size_that_is_not_said_does_not_fit(words, monkeypatch, tmp_path, capsys):
    def refused(*_):
        raise devices.OutOfMemory("too large", None)

    monkeypatch.setattr(devices, "compile_step", refused)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"model": {**TRAINED, "num_hidden_layers": 8}, "data": {"row_tokens": 16, "batch_size": 4}}))
    code, facts = planned_as_json(capsys, str(file), "--device", "cpu", *words)
    assert code == 1 and facts["left_bytes"] < 0 < facts["temporaries_bytes"]["the step"]


@pytest.mark.parametrize("device, module, mesh", [("H100", "jax_cuda13_plugin", "data=1"), ("H200", "jax_cuda13_plugin", "expert=2,fsdp=2"),
                                                  ("v5p", "libtpu", "expert=2,fsdp=2")], ids=str)
def test_a_training_step_compiles_for_devices_that_are_not_here(device, module, mesh, trained, capsys):
    if not devices._importable(module):
        pytest.skip(f"compiling for {device} needs the wheel of {module}")
    assert plan.main([trained, "--device", device, "--mesh", mesh]) == 0
    out = capsys.readouterr().out
    assert "temporaries of the step" in out and "it fits" in out and ("collectives of the step" in out) == (mesh != "data=1")
