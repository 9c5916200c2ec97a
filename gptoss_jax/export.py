"""`python -m gptoss_jax.export SRC DST`: any checkpoint layout back to a Hugging Face directory."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from gptoss_jax.command import Progress, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_jax.export",
        description="Write a gpt-oss checkpoint as a Hugging Face directory that transformers and other engines load.")
    parser.add_argument("source", metavar="SRC", help="Orbax directory made by convert, Hugging Face directory, OpenAI's original/, or tiny")
    parser.add_argument("destination", metavar="DST", help="directory to create; it appears when it is complete")
    parser.add_argument("--format", choices=("mxfp4", "bfloat16"), default="mxfp4",
                        help="experts as MXFP4 (packed ones bit for bit, bfloat16 ones encoded) or as plain bfloat16 (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists, once the new one is complete")
    return run(_export, parser, argv)


def _export(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # hardly more than bytes moving: leave accelerators alone
    from gptoss_jax.checkpoint import resolve
    from gptoss_jax.checkpoint.huggingface import export

    export(resolve(arguments.source), arguments.destination, format=arguments.format, overwrite=arguments.overwrite, progress=Progress("exported"))
    print(f"wrote {arguments.destination}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
