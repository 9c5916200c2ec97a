"""`python -m gptoss_jax.convert SRC DST`: any checkpoint layout to an Orbax checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from gptoss_jax.command import Progress, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_jax.convert",
        description="Convert a gpt-oss checkpoint to an Orbax checkpoint, which gptoss_jax loads on any mesh. MXFP4 experts stay packed, "
                    "tensors stay bit-identical, and the configuration and tokenizer files come along.")
    parser.add_argument("source", metavar="SRC", help="Hugging Face directory, OpenAI's original/ directory, Orbax directory, or tiny")
    parser.add_argument("destination", metavar="DST", help="directory to create; it appears when it is complete")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists, once the new one is complete")
    return run(_convert, parser, argv)


def _convert(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only bytes move: leave accelerators alone
    from gptoss_jax.checkpoint import convert, resolve

    convert(resolve(arguments.source), arguments.destination, overwrite=arguments.overwrite, progress=Progress("converted"))
    print(f"wrote {arguments.destination}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
