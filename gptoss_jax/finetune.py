"""`python -m gptoss_jax.finetune CONFIG.yaml [--section.field value ...]`: train, resume, export."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gptoss_jax.command import enable_compilation_cache, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_jax.finetune", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a model as a configuration file says, from its newest checkpoint if it was interrupted, and export it as a\n"
                    "Hugging Face directory. Every field of the file can be overridden: --optimizer.learning_rate 0.001")
    parser.add_argument("config", metavar="CONFIG.yaml", help="for example configs/pretrain_tiny.yaml")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--section.field value", help="override fields of the file")
    return run(_finetune, parser, argv)


def _finetune(arguments: argparse.Namespace) -> None:
    from gptoss_jax.training.config import load_config

    overrides = [word for word in arguments.overrides if word != "--debug"]
    arguments.debug |= len(overrides) < len(arguments.overrides)
    config = load_config(arguments.config, overrides)
    from gptoss_jax.training.loop import train  # JAX is imported once the configuration is known to be good

    enable_compilation_cache()
    print(f"exported {train(config)}")


if __name__ == "__main__":
    sys.exit(main())
