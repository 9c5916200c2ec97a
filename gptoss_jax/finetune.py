"""`python -m gptoss_jax.finetune CONFIG.yaml [--dry-run] [--distributed] [--section.field value ...]`: train, resume, export."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gptoss_jax import evaluate
from gptoss_jax.command import UsageError, enable_compilation_cache, run

_TERMINATED = 128 + signal.SIGTERM  # not 0: what started the run shall not take it for finished


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 143 after SIGTERM, when all is saved."""
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_jax.finetune", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a model as a configuration file says, from its newest checkpoint if it was interrupted, and export it as a\n"
                    "Hugging Face directory. Every field of the file can be overridden: --optimizer.learning_rate 0.001\n"
                    "SIGTERM saves and ends with exit code 143; the same command goes on from there.")
    parser.add_argument("config", metavar="CONFIG.yaml", help="for example configs/pretrain_tiny.yaml")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained on, and stop before training")
    parser.add_argument("--distributed", action="store_true",
                        help="one process of several, as SLURM, Open MPI, Kubernetes or a TPU pod started them (see launch/)")
    code = run(_finetune, parser, argv, overrides=True)
    if code == 2 and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)  # leaving in good order would wait for the other processes, which wait for this one
    return code


def _finetune(arguments: argparse.Namespace) -> int:
    from gptoss_jax.training.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        _dry_run(config)
        return 0
    if arguments.distributed:
        _join_the_others()
    import jax  # once the configuration is known to be good

    from gptoss_jax.training.loop import Terminated, train

    enable_compilation_cache()
    try:
        exported = train(config, answer_with=Examiner)
    except Terminated as stopped:
        if jax.process_index() == 0:
            print(stopped, file=sys.stderr)
        return _TERMINATED
    if jax.process_index() == 0:
        print(f"exported {exported}")
    return 0


def _join_the_others() -> None:
    """Connect the processes of a job, which JAX finds by what its launcher left in the environment. Raises UsageError.

    Launchers that it doesn't know set JAX_COORDINATOR_ADDRESS, which JAX reads, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    import jax

    told = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        jax.distributed.initialize(**{name: int(value) for name, value in told.items() if value})
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--distributed: {' '.join(str(error).split())} Expected a start by SLURM, Open MPI, Kubernetes, a TPU pod, or "
                         "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; see launch/") from error


class Examiner:
    """Answers questions greedily, with one compiled program whatever the weights are."""

    def __init__(self, tokenizer, max_new_tokens: int):
        self._tokenizer, self._max_new_tokens, self._engine = tokenizer, max_new_tokens, None

    def __call__(self, model, questions) -> list[tuple[str, bool]]:
        """Return for each question what was asked and answered, and whether the answer is the expected one."""
        from gptoss_jax.inference.engine import Engine
        from gptoss_jax.inference.sampling import Sampling
        from gptoss_jax.text import harmony

        if self._engine is None:
            self._engine = Engine(model, self._tokenizer, arrange=False)  # its weights are training's own
        self._engine.weights = model.arrays()
        prompts = [harmony.render(question.messages, self._tokenizer, next_role="assistant") for question in questions]
        answers = []
        completions = self._engine.generate(prompts, Sampling(temperature=0), max_new_tokens=self._max_new_tokens)
        for completion, question in zip(completions, questions):
            said = list(harmony.parse(completion.ids, self._tokenizer))
            asked = next((evaluate.text(message) for message in reversed(question.messages) if message["role"] != "assistant"), "")
            right = evaluate.agrees(said[-1] if said else None, question.answer)
            answers.append((f"{asked!r:.200} -> {evaluate.shown(said[-1:]):.200}", right))
        return answers


def _dry_run(config) -> None:
    """Print what the run would do, section by section: nothing is trained, written or put on an accelerator."""
    from gptoss_jax.training import data, dry_run, memory_plan
    from gptoss_jax.training.run_directory import load_vocabulary
    from gptoss_jax.training.state import resolve

    config = resolve(config)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_vocabulary(config, Path(scratch))
    source = data.open_data(dataclasses.replace(config.data, on_bad_record="skip"), tokenizer)  # to see all that is wrong at once
    if isinstance(source, data.Files):
        for line in dry_run.report(source, config.data, tokenizer, steps=config.run.steps, colour=sys.stdout.isatty()):
            print(line)
    else:
        print("data        synthetic conversations without end")
    for line in memory_plan.summary(config):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
