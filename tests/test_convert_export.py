"""Writing checkpoints: there and back without a bit changed, complete or not at all, and never over something else unasked."""

import json
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
from by_hand import assert_same_bits, random_weights, read_directory, read_file, write_file
from conftest import DATA

from gptoss_jax import convert, export, mxfp4
from gptoss_jax.checkpoint import CheckpointError, load_weights, resolve, save_huggingface, store
from gptoss_jax.checkpoint.destination import appearing
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model.weights import declare
from gptoss_jax.sharding import make_mesh

TINY = DATA / "tiny_checkpoint"
SMALL = GptOssConfig(
    vocab_size=208, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=5, eos_token_id=(7, 9), pad_token_id=3)
SIDECARS = {"tokenizer.json": b'{"a":  1}\r\n', "chat_template.jinja": b"{{ x }}", "LICENSE": b"\xff\x00 any bytes",
            "generation_config.json": b"{ }"}


@pytest.fixture
def source(tmp_path):
    path = shutil.copytree(TINY, tmp_path / "source", ignore=shutil.ignore_patterns("original"))
    for name, content in SIDECARS.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def truth():
    return read_directory(TINY)


def run(command, *arguments):
    return command.main([str(argument) for argument in arguments])


def decoded(tensors):
    """What transformers stores for bfloat16 experts: [E, in, out], by the format's own definition."""
    result = {}
    for name, array in tensors.items():
        if name.endswith("_blocks"):
            codes = np.stack([array & 15, array >> 4], axis=-1)
            values = np.array(mxfp4.VALUES, np.float32)[codes].reshape(*array.shape[:-1], 32)
            scales = tensors[name.replace("_blocks", "_scales")].astype(np.float32)
            values = values * np.exp2(scales - 127)[..., None]
            matrix = values.reshape(*array.shape[:2], -1).swapaxes(1, 2)
            result[name.removesuffix("_blocks")] = matrix.astype(tensors["lm_head.weight"].dtype)
        elif not name.endswith("_scales"):
            result[name] = array
    return result


# There and back


def test_hugging_face_to_orbax_to_hugging_face_changes_no_byte_of_any_tensor_or_file(source, tmp_path, truth, capsys):
    assert run(convert, source, tmp_path / "orbax") == 0
    assert run(export, tmp_path / "orbax", tmp_path / "back") == 0
    assert_same_bits(read_directory(tmp_path / "back"), truth)
    for file in ("config.json", "manifest.json", *SIDECARS):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    said = capsys.readouterr()
    assert said.out == "" and "converted 0.31 of 0.31 MB" in said.err and "MB/s" in said.err


def test_original_layout_exports_as_hugging_face_with_a_config_made_for_it(tmp_path, truth):
    assert run(export, TINY / "original", tmp_path / "direct") == 0
    assert run(convert, TINY / "original", tmp_path / "orbax") == 0
    assert run(export, tmp_path / "orbax", tmp_path / "back") == 0
    for path in (tmp_path / "direct", tmp_path / "back"):
        assert_same_bits(read_directory(path), truth)
        config = GptOssConfig.from_file(path / "config.json")
        assert config == GptOssConfig.from_file(TINY / "original" / "config.json")
        assert not (path / "dtypes.json").exists()


@pytest.mark.parametrize("axes", [dict(expert=4, tensor=2), dict(fsdp=8)], ids=str)
def test_an_orbax_checkpoint_loads_on_any_mesh_and_in_float32(tmp_path, axes):
    weights = random_weights(declare(SMALL))
    save_huggingface(tmp_path / "hf", SMALL, weights)
    assert run(convert, tmp_path / "hf", tmp_path / "orbax") == 0
    mesh = make_mesh(**axes)
    config, loaded = load_weights(tmp_path / "orbax", mesh=mesh)
    assert config == SMALL
    assert_same_bits(loaded, weights)
    assert loaded["lm_head.weight"].sharding.mesh == mesh
    exact = load_weights(tmp_path / "orbax", dtype="float32")[1]
    assert_same_bits(exact, {name: w if w.dtype == np.uint8 else w.astype(np.float32) for name, w in weights.items()})


@pytest.mark.parametrize("command", [convert, export], ids=["convert", "export"])
def test_tiny_is_the_embedded_checkpoint(command, tmp_path):
    assert run(command, "tiny", tmp_path / "copy") == 0
    assert_same_bits(load_weights(tmp_path / "copy")[1], read_directory(resolve("tiny")))


def test_relative_paths_mean_the_working_directory(source, tmp_path, truth, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(convert, "source", "orbax") == 0
    assert run(export, "orbax", "deeper/back") == 0
    assert_same_bits(read_directory(tmp_path / "deeper" / "back"), truth)


def test_an_orbax_checkpoint_larger_than_a_group_is_complete(tmp_path, source, truth, monkeypatch):
    monkeypatch.setattr(store, "GROUP_BYTES", 30_000)
    assert run(convert, source, tmp_path / "orbax") == 0
    assert_same_bits(load_weights(tmp_path / "orbax")[1], truth)


def test_bfloat16_export_holds_the_decoded_experts_and_says_so(source, tmp_path, truth):
    assert run(export, source, tmp_path / "plain", "--format", "bfloat16") == 0
    assert_same_bits(read_directory(tmp_path / "plain"), decoded(truth))
    config, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "plain", source))
    del theirs["quantization_config"]
    assert config == theirs | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_bfloat16_experts_load_convert_and_export_to_mxfp4(source, tmp_path, truth):
    run(export, source, tmp_path / "plain", "--format", "bfloat16")
    assert_same_bits(load_weights(tmp_path / "plain")[1], decoded(truth))
    assert run(convert, tmp_path / "plain", tmp_path / "orbax") == 0
    assert run(export, tmp_path / "orbax", tmp_path / "packed") == 0
    written = read_directory(tmp_path / "packed")
    assert {name: (w.shape, w.dtype) for name, w in written.items()} == {name: (w.shape, w.dtype) for name, w in truth.items()}
    assert_same_bits(decoded(written), decoded(truth))  # on the grid already: encoding changes no value
    quantization = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "mxfp4"


def test_files_are_cut_by_size_and_named_and_indexed_as_transformers_does(tmp_path):
    weights = random_weights(declare(SMALL))
    save_huggingface(tmp_path / "hf", SMALL, weights, max_shard_bytes=100_000)
    files = sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    assert index["weight_map"] == {name: file for file in files for name in sorted(read_file(tmp_path / "hf" / file))}
    assert all(sum(w.nbytes for w in read_file(tmp_path / "hf" / file).values()) <= 100_000 for file in files)
    assert_same_bits(load_weights(tmp_path / "hf")[1], weights)


def test_trained_float32_weights_are_saved_rounded_and_encoded_with_the_tokenizer_of_their_base(source, tmp_path):
    config = GptOssConfig.from_file(source / "config.json")
    weights = random_weights(declare(config, dtype="float32", packed=False))
    save_huggingface(tmp_path / "trained", config, weights, sidecars_from=source)
    _, loaded = load_weights(tmp_path / "trained")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    blocks, scales = mxfp4.encode(weights[name].swapaxes(1, 2), steady=True)
    np.testing.assert_array_equal(np.asarray(loaded[f"{name}_blocks"]), blocks)
    np.testing.assert_array_equal(np.asarray(loaded[f"{name}_scales"]), scales)
    np.testing.assert_array_equal(np.asarray(loaded["lm_head.weight"]), weights["lm_head.weight"].astype(loaded["lm_head.weight"].dtype))
    for file in ("config.json", *SIDECARS):
        assert (tmp_path / "trained" / file).read_bytes() == (source / file).read_bytes()


def test_sharded_arrays_are_saved_as_they_are(tmp_path):
    weights = random_weights(declare(SMALL))
    save_huggingface(tmp_path / "one", SMALL, weights)
    _, sharded = load_weights(tmp_path / "one", mesh=make_mesh(expert=4, tensor=2))
    save_huggingface(tmp_path / "two", SMALL, sharded)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()


def test_our_files_start_on_aligned_bytes_and_say_they_are_for_torch(tmp_path):
    save_huggingface(tmp_path / "hf", SMALL, random_weights(declare(SMALL)))
    content = (tmp_path / "hf" / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(entry["data_offsets"][0] % 2 == 0 for entry in header.values() if entry["dtype"] == "BF16")


# Complete or not at all


@pytest.mark.parametrize("command", [convert, export], ids=["convert", "export"])
def test_an_existing_destination_stays_untouched_without_overwrite_and_is_replaced_with_it(command, source, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("x")
    (tmp_path / "there" / "config.json").write_text("{}")
    assert run(command, source, tmp_path / "there") == 2
    assert f"{tmp_path}/there: exists already" in capsys.readouterr().err
    assert (tmp_path / "there" / "precious").exists()
    assert run(command, source, tmp_path / "there", "--overwrite") == 0
    assert not (tmp_path / "there" / "precious").exists()
    load_weights(tmp_path / "there")


@pytest.mark.parametrize("command", [convert, export], ids=["convert", "export"])
def test_what_appears_at_the_destination_meanwhile_stays(command, source, tmp_path, monkeypatch, capsys):
    from gptoss_jax.checkpoint import opening

    read = opening.read_shard

    def read_while_another_writes(*arguments):
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / "precious").write_text("x")
        return read(*arguments)

    monkeypatch.setattr(opening, "read_shard", read_while_another_writes)
    assert run(command, source, tmp_path / "there") == 2
    assert f"{tmp_path}/there: exists already" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.rglob("*") if source not in [file, *file.parents]) == ["precious", "there"]


def test_what_was_to_be_replaced_stays_when_the_new_one_cannot_take_its_place(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("x")
    with pytest.raises(FileNotFoundError), appearing(tmp_path / "there", overwrite=True):
        pass  # nothing is written, so nothing can be renamed
    assert [file.name for file in tmp_path.rglob("*")] == ["there", "config.json"]


def test_what_a_killed_process_has_left_is_named(source, tmp_path, capsys):
    (tmp_path / ".[new].incomplete-abc").mkdir()
    (tmp_path / ".newer.incomplete-abc").mkdir()
    assert run(export, source, tmp_path / "[new]") == 0
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{tmp_path}/.[new].incomplete-abc: left by a killed process") and "incomplete" not in "".join(others)


@pytest.mark.parametrize("command", [convert, export], ids=["convert", "export"])
def test_an_interrupted_run_leaves_the_old_destination_and_nothing_else(command, source, tmp_path, monkeypatch):
    from gptoss_jax.checkpoint import opening

    assert run(command, source, tmp_path / "there") == 0
    before = sorted(file.name for file in tmp_path.iterdir())
    read, calls = opening.read_shard, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(opening, "read_shard", interrupted)
    monkeypatch.setattr(store, "GROUP_BYTES", 1_000)
    assert run(command, source, tmp_path / "there", "--overwrite") == 130
    assert run(command, source, tmp_path / "new") == 130
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    load_weights(tmp_path / "there")


def test_ctrl_c_waits_for_what_orbax_is_writing_and_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    written = []

    def finalize(path):
        time.sleep(0.2)  # until the main thread waits: a signal that finds it in a callback of garbage collection is lost
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        path.mkdir()
        written.append(path)

    monkeypatch.setattr(store.ocp.partial, "finalize", finalize)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    try:
        assert run(convert, source, tmp_path / "new") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(written) == 1 and [file.name for file in tmp_path.iterdir()] == ["source"]
    assert capsys.readouterr().err.endswith(" s\n\npython -m gptoss_jax.convert: interrupted\n")


@pytest.mark.parametrize("command", [convert, export], ids=["convert", "export"])
@pytest.mark.parametrize(("destination", "said"), [
    ("source", "the source itself"), ("source/../source", "the source itself"), ("source/inside", "is inside"), (".", "is inside"),
    ("source/config.json/x", "is inside"), ("file/below", "is a file, expected a directory"), ("mount", "a mount point"),
    ("models", "expected a checkpoint to replace")])
def test_a_destination_that_would_destroy_or_nest_is_refused(command, destination, said, source, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mount")
    shutil.copytree(source, tmp_path / "models" / "gpt-oss-20b")
    assert run(command, source, tmp_path / destination, "--overwrite") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    load_weights(source)


def test_a_bad_source_is_one_line_and_exit_code_2_and_debug_shows_the_traceback(source, tmp_path, capsys):
    (source / "model-00001-of-00002.safetensors").unlink()
    for command in (convert, export):
        assert run(command, source, tmp_path / "new") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "1 file it names not found: model-00001-of-00002.safetensors" in error
        assert run(command, source, tmp_path / "new", "--debug") == 2
        assert "Traceback" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [convert, export], ids=["convert", "export"])
def test_a_disk_that_takes_no_more_is_one_line_and_exit_code_2_and_leaves_nothing(command, source, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        assert run(command, source, tmp_path / "new") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "File too large" in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_bad_flags_are_exit_code_2_and_help_is_0(capsys):
    assert run(export, "a", "b", "--format", "float16") == 2
    assert "invalid choice: 'float16'" in capsys.readouterr().err
    assert run(convert, "only-one") == 2
    assert run(convert, "--help") == 0


@pytest.mark.parametrize("damage", ["missing", "truncated", "metadata"])
def test_a_damaged_orbax_checkpoint_is_one_line_before_anything_is_read(damage, source, tmp_path, capsys):
    run(convert, source, tmp_path / "orbax")
    state = tmp_path / "orbax" / "state"
    if damage == "metadata":
        (tmp_path / "orbax" / store.MANIFEST).unlink()  # as if Orbax alone had written it
        (state / "_METADATA").unlink()
        said = "Orbax can't read it: "
    else:
        file = max((file for file in state.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        size, name = file.stat().st_size, file.relative_to(tmp_path / "orbax")
        said = f"1 file missing: {name}" if damage == "missing" else f"{name} has {size - 1} bytes, expected {size}"
        file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    assert run(export, tmp_path / "orbax", tmp_path / "back") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/orbax: " in error and said in error and error.count("\n") == 1
    assert not (tmp_path / "back").exists()


def test_weights_that_do_not_fit_their_config_are_not_saved(tmp_path):
    weights = random_weights(declare(SMALL))
    del weights["model.norm.weight"]
    weights["lm_head.weight"] = weights["lm_head.weight"].T
    said = r"1 tensor missing: model\.norm\.weight; lm_head\.weight: shape \[96, 208\] found, \[208, 96\] expected"
    with pytest.raises(CheckpointError, match=said):
        save_huggingface(tmp_path / "hf", SMALL, weights)
    with pytest.raises(CheckpointError, match="format: 'int8' found, expected 'mxfp4' or 'bfloat16'"):
        save_huggingface(tmp_path / "hf", SMALL, weights, format="int8")
    assert not (tmp_path / "hf").exists()


def test_numbers_that_mxfp4_cannot_hold_are_named(tmp_path):
    weights = random_weights(declare(SMALL, packed=False))
    weights["model.layers.1.mlp.experts.down_proj"][3, 2, 1] = np.inf
    with pytest.raises(mxfp4.Mxfp4Error, match=r"model\.layers\.1\.mlp\.experts\.down_proj: an infinity or NaN found"):
        save_huggingface(tmp_path / "hf", SMALL, weights)
    assert list(tmp_path.iterdir()) == []


def test_a_source_with_one_file_and_hub_names_exports_the_same(source, tmp_path, truth):
    tensors = read_directory(source)
    for file in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        file.unlink()
    write_file(source / "model.safetensors", tensors)
    assert run(export, source, tmp_path / "back") == 0
    assert_same_bits(read_directory(tmp_path / "back"), truth)
