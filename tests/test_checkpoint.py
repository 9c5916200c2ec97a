"""Reading checkpoints: every layout, every mesh, and one line about whatever is wrong with them."""

import json
import shutil
import struct

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from by_hand import assert_same_bits, random_weights, read_directory, read_file, write_file
from conftest import DATA

from gptoss_jax.checkpoint import CheckpointError, load, load_weights
from gptoss_jax.checkpoint.opening import open_checkpoint
from gptoss_jax.config import ConfigError, GptOssConfig
from gptoss_jax.model.weights import declare
from gptoss_jax.sharding import make_mesh

TINY = DATA / "tiny_checkpoint"
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
WIDE = GptOssConfig(  # no two dims equal, and all of them divide by what the meshes below ask
    vocab_size=208, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=5)


@pytest.fixture(scope="module")
def truth():
    return read_directory(TINY)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(TINY, tmp_path / "copy", ignore=shutil.ignore_patterns("original"))


@pytest.fixture
def original(tmp_path):
    return shutil.copytree(TINY / "original", tmp_path / "original")


def make_single_file(path):
    tensors = read_directory(path)
    for file in [*path.glob("*.safetensors"), path / INDEX]:
        file.unlink()
    write_file(path / "model.safetensors", tensors)


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_shard(path, change, shard=SHARD):
    tensors = read_file(path / shard)
    change(tensors)
    write_file(path / shard, tensors)


def edit_header(file, change):
    """Rewrite the header alone: a length and bytes that fit it, data untouched."""
    content = file.read_bytes()
    size, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size:])


def error_of(path):
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_weights(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


# What is read


def test_hugging_face_shards_load_bit_for_bit(truth):
    config, weights = load_weights(TINY)
    assert_same_bits(weights, truth)
    assert config.hidden_size == 64 and config.quantized


def test_original_layout_loads_bit_for_bit_itself_and_from_the_directory_above(original, truth):
    assert_same_bits(load_weights(original)[1], truth)
    assert_same_bits(load_weights(original.parent)[1], truth)


def test_original_layout_in_several_files_needs_no_index(original, truth):
    tensors = list(read_file(original / "model.safetensors").items())
    (original / "model.safetensors").unlink()
    write_file(original / "a.safetensors", dict(tensors[::2]))
    write_file(original / "b.safetensors", dict(tensors[1::2]))
    assert_same_bits(load_weights(original)[1], truth)


def test_the_index_decides_which_files_are_read_and_one_file_needs_none(copy, truth):
    shutil.copy(copy / SHARD, copy / "model-00009-of-00002.safetensors")
    (copy / SHARD).rename(copy / "weights.safetensors")
    edit_json(copy / INDEX, lambda index: index["weight_map"].update(
        {name: "weights.safetensors" for name, file in index["weight_map"].items() if file == SHARD}))
    assert_same_bits(load_weights(copy)[1], truth)
    make_single_file(copy)
    assert_same_bits(load_weights(copy)[1], truth)


def test_float32_is_the_exact_value_of_dense_weights_and_leaves_packed_ones_packed(truth):
    _, weights = load_weights(TINY, dtype="float32")
    for name, expected in truth.items():
        wanted = np.uint8 if expected.dtype == np.uint8 else np.float32
        assert weights[name].dtype == wanted
        np.testing.assert_array_equal(np.asarray(weights[name]), expected.astype(wanted))


@pytest.mark.parametrize("axes", [dict(expert=4, tensor=2), dict(tensor=2, fsdp=4), dict(fsdp=8), dict(fsdp=2, expert=2, data=2)], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "bfloat16"])
def test_weights_on_a_mesh_lie_as_the_rules_say_and_equal_the_stored_ones(tmp_path, axes, packed):
    config = WIDE.replace(quantized=packed)
    stored = random_weights(declare(config, packed=packed))
    write_file(tmp_path / "model.safetensors", stored)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    _, weights = load_weights(tmp_path, mesh=make_mesh(**axes))
    assert_same_bits(weights, stored)
    experts = weights["model.layers.0.mlp.experts.down_proj" + "_blocks" * packed]
    split = axes.get("expert", 1) * axes.get("fsdp", 1) * axes.get("tensor", 1)
    assert all(shard.data.size * split == experts.size for shard in experts.addressable_shards)


def test_fused_qkv_of_the_original_layout_is_read_on_a_mesh(truth):
    assert_same_bits(load_weights(TINY / "original", mesh=make_mesh(fsdp=2, expert=2, data=2))[1], truth)


def test_a_loaded_weight_may_be_donated_without_touching_its_replicas():
    array = load_weights(TINY, mesh=make_mesh(data=8))[1]["lm_head.weight"]
    before = np.asarray(array).copy()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    for shard in after.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), before + before.dtype.type(1))


def test_progress_counts_the_bytes_up_to_the_total():
    seen = []
    load_weights(TINY, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (314784, 314784)


def test_load_returns_a_model_that_holds_the_weights(truth):
    assert_same_bits(load(TINY).weights(), truth)


# What is refused


def test_a_path_that_is_no_checkpoint_is_named(tmp_path):
    assert error_of(tmp_path / "nowhere") == f"{tmp_path}/nowhere: no such directory, expected a checkpoint directory"
    assert f"{tmp_path}/config.json: no such file" in error_of(tmp_path)
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file: a file" in error_of(tmp_path / "file")


@pytest.mark.parametrize(("content", "said"), [
    ("{", "config.json: not readable as JSON"),
    ("[]", "config.json: a JSON list found, expected an object"),
    ('{"model_type": "llama"}', "config.json: config: model_type is 'llama', expected 'gpt_oss'"),
])
def test_a_config_that_is_not_gpt_oss_is_named(copy, content, said):
    (copy / "config.json").write_text(content)
    assert said in error_of(copy)


def test_a_missing_shard_is_named_with_the_index_that_asks_for_it(copy):
    (copy / SHARD).unlink()
    assert error_of(copy) == f"{copy / INDEX}: 1 file it names not found: {SHARD}"


@pytest.mark.parametrize(("keep", "said"), [(5, "truncated: 5 bytes"), (40, "corrupt or truncated"), (-50_000, "truncated: "), (-1, "truncated: ")])
def test_a_truncated_shard_is_named_with_the_bytes_found_and_stated(copy, keep, said):
    (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:keep])
    assert f"{copy / SHARD}: {said}" in error_of(copy)


def test_trailing_bytes_are_refused(copy):
    with (copy / SHARD).open("ab") as file:
        file.write(b"x")
    assert f"{copy / SHARD}: corrupt: " in error_of(copy)


def test_a_header_that_is_not_json_is_refused(copy):
    content = bytearray((copy / SHARD).read_bytes())
    content[8:20] = b"\xff" * 12
    (copy / SHARD).write_bytes(content)
    assert f"{copy / SHARD}: corrupt: its header is not readable as JSON" in error_of(copy)


@pytest.mark.parametrize(("change", "said"), [
    ({"dtype": "Q9"}, "dtype 'Q9' found, expected one of BOOL, U8"),
    ({"shape": [63]}, "has 128 bytes, expected 126 for BF16 [63]"),
    ({"shape": [-64]}, "expected dtype, shape and data_offsets"),
    ({"shape": "x"}, "expected dtype, shape and data_offsets"),
    ({"data_offsets": [0, 128]}, "starts at byte"),
    ({"data_offsets": [128, 0]}, "bytes, expected 128"),
], ids=str)
def test_a_header_that_contradicts_itself_is_refused(copy, change, said):
    holder = json.loads((copy / INDEX).read_text())["weight_map"][NORM]
    edit_header(copy / holder, lambda header: header[NORM].update(change))
    message = error_of(copy)
    assert said in message and str(copy / holder) in message


def test_all_missing_and_unexpected_tensors_and_wrong_shapes_and_dtypes_are_listed_at_once(copy):
    make_single_file(copy)

    def spoil(tensors):
        for layer in range(2):
            del tensors[f"model.layers.{layer}.self_attn.sinks"]
        tensors["model.layers.1.mlp.surprise"] = tensors["model.layers.0.self_attn.q_proj.bias"]
        tensors[NORM] = tensors[NORM][:-1]
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32)

    edit_shard(copy, spoil, "model.safetensors")
    message = error_of(copy)
    assert "2 tensors missing: model.layers.{0-1}.self_attn.sinks" in message
    assert "1 tensor found that the configuration doesn't have: model.layers.1.mlp.surprise" in message
    assert f"{NORM}: shape [63] found, [64] expected" in message
    assert "lm_head.weight: dtype float32 found, bfloat16 expected" in message


def test_hundreds_of_missing_tensors_are_summed_up(copy):
    edit_json(copy / "config.json", lambda config: config.update(num_hidden_layers=300, layer_types=None))
    message = error_of(copy)
    assert "5662 tensors missing: model.layers.{2-299}.input_layernorm.weight" in message


def test_original_layout_names_its_own_tensors(original):
    edit_shard(original, lambda tensors: tensors.pop("block.1.attn.qkv.weight"), "model.safetensors")
    assert error_of(original) == f"{original}: 1 tensor missing: block.1.attn.qkv.weight"


def test_an_index_that_lies_about_a_file_is_refused(copy):
    moved = next(iter(read_file(copy / SHARD)))
    edit_json(copy / INDEX, lambda index: index["weight_map"].update({moved: "model-00000-of-00002.safetensors"}))
    assert error_of(copy) == f"{copy / INDEX}: 1 tensor not found where it says: {moved} in model-00000-of-00002.safetensors"


def test_a_tensor_that_the_index_leaves_out_is_named(copy):
    edit_json(copy / INDEX, lambda index: index["weight_map"].pop(NORM))
    assert f"{copy / INDEX}: 1 tensor found that it doesn't list there: {NORM} in model-0" in error_of(copy)


@pytest.mark.parametrize(("content", "said"), [
    ("{", "not readable as JSON"), ('{"metadata": {}}', "no weight_map found"),
    ('{"weight_map": {"a": "../b.safetensors"}}', "expected files of its own directory")])
def test_an_unreadable_index_is_refused(copy, content, said):
    (copy / INDEX).write_text(content)
    message = error_of(copy)
    assert str(copy / INDEX) in message and said in message


def test_shards_without_an_index_are_refused(copy):
    (copy / INDEX).unlink()
    assert error_of(copy) == f"{copy}: 3 other .safetensors files found, expected model.safetensors or {INDEX}"


def test_an_unknown_dtype_is_refused():
    with pytest.raises(CheckpointError, match="dtype: 'float16' found, expected 'bfloat16' or 'float32'"):
        load_weights(TINY, dtype="float16")


def test_any_damage_to_a_header_is_one_clear_error_or_harmless(copy):
    content = (copy / SHARD).read_bytes()
    size, = struct.unpack("<Q", content[:8])
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(0, 8 + size)] ^= rng.integers(1, 256)
        (copy / SHARD).write_bytes(damaged)
        try:
            open_checkpoint(copy)
        except CheckpointError as error:
            assert str(copy) in str(error) and "\n" not in str(error)


def test_a_file_that_the_index_does_not_name_is_left_alone_where_orbax_refuses_the_directory(copy, truth):
    """Why safetensors aren't read by Orbax: should this ever fail, look again."""
    write_file(copy / "consolidated.safetensors", {NORM: truth[NORM]})
    assert_same_bits(load_weights(copy)[1], truth)
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context, pytest.raises(ValueError, match=f"Duplicate tensor {NORM} found in multiple files"):
        ocp.metadata(copy)
