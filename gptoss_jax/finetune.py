"""`python -m gptoss_jax.finetune CONFIG.yaml [--dry-run] [--section.field value ...]`: train, resume, export."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gptoss_jax.command import enable_compilation_cache, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_jax.finetune", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a model as a configuration file says, from its newest checkpoint if it was interrupted, and export it as a\n"
                    "Hugging Face directory. Every field of the file can be overridden: --optimizer.learning_rate 0.001")
    parser.add_argument("config", metavar="CONFIG.yaml", help="for example configs/pretrain_tiny.yaml")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained on, and stop before training")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--section.field value", help="override fields of the file")
    return run(_finetune, parser, argv)


def _finetune(arguments: argparse.Namespace) -> None:
    from gptoss_jax.training.config import load_config

    flags = {"--debug", "--dry-run"}.intersection(arguments.overrides)  # after the configuration they land among the overrides
    arguments.debug |= "--debug" in flags
    config = load_config(arguments.config, [word for word in arguments.overrides if word not in flags])
    if arguments.dry_run or "--dry-run" in flags:
        return _dry_run(config)
    from gptoss_jax.training.loop import train  # JAX is imported once the configuration is known to be good

    enable_compilation_cache()
    print(f"exported {train(config)}")


def _dry_run(config) -> None:
    """Print what the run would do, section by section: nothing is trained, written or put on an accelerator."""
    from gptoss_jax.training import data, dry_run
    from gptoss_jax.training.loop import load_vocabulary

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_vocabulary(config, Path(scratch))
    source = data.open_data(dataclasses.replace(config.data, on_bad_record="skip"), tokenizer)  # to see all that is wrong at once
    if not isinstance(source, data.Files):
        print("data        synthetic conversations without end")
        return
    for line in dry_run.report(source, config.data, tokenizer, colour=sys.stdout.isatty()):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
