"""Who may import whom (top to bottom), each outside dependency through its one door, and nothing named after nothing."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "gptoss_jax"
COMMANDS = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "config", "devices", "mxfp4", "sharding"}
LAYERS = [COMMANDS, {"serving", "tools"}, {"training", "inference"}, {"checkpoint"}, {"model"}, {"kernels"}, {"sharding", "mxfp4", "devices"}, {"config"}]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
DOORS = {"orbax": "checkpoint", "safetensors": "checkpoint", "grain": "training", "sentencepiece": "text", "tokenizers": "text",
         "tiktoken": "text", "yaml": "training", "pyarrow": "training", "matplotlib": "training", "tensorboardX": "training", "wandb": "training"}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_the_layers_and_out_by_their_door(path):
    mine = home(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in DOORS:
            vocabulary = mine == "training" and path.stem == "vocabulary"  # trains a SentencePiece model, where text only reads them
            assert mine == DOORS[parts[0]] or vocabulary, f"{path}: {parts[0]} belongs to {DOORS[parts[0]]}"
        if parts[0] != "gptoss_jax" or len(parts) < 2 or mine == "__init__":
            continue
        theirs = parts[1]
        if theirs == mine:
            continue
        if mine == "text":
            pytest.fail(f"{path}: text imports nothing of ours, found {name}")
        if theirs != "text":
            assert LEVEL[mine] < LEVEL[theirs] or mine in COMMANDS and theirs in COMMANDS, f"{path}: {mine} may not import {theirs}"


def test_no_module_is_named_after_nothing():
    assert not {"utils", "common", "helpers", "base", "manager", "misc"} & {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}


def test_config_text_and_what_data_workers_run_import_no_jax():
    workers = [ROOT / "training" / f"{name}.py" for name in ("config", "records", "examples")]  # input pipeline, in processes of its own
    for path in [ROOT / "config.py", *(ROOT / "text").glob("*.py"), *workers]:
        assert not {"jax", "flax"} & {name.split(".")[0] for name in imports(path)}, path
