"""Answer one prompt: `python -m gptoss_jax.generate "What is 17 + 25?"`. The answer streams to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import sys
import time
from collections.abc import Sequence

from gptoss_jax import command
from gptoss_jax.plan import AXES, mesh_axes

EFFORTS = ("low", "medium", "high")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m gptoss_jax.generate", description=__doc__)
    options.add_argument("prompt", nargs="?", metavar="PROMPT", help="the question; - reads it from standard input")
    add_options(options)
    options.add_argument("--show-analysis", action="store_true", help="show the reasoning, on stderr")
    shape = options.add_mutually_exclusive_group()
    shape.add_argument("--raw", action="store_true", help="print the model's text as it is, special tokens spelled out")
    shape.add_argument("--json", action="store_true", help="print the parsed messages, usage and log-probabilities as JSON")
    return options


def add_options(options: argparse.ArgumentParser) -> None:
    """Add what generate and chat share: which model, how it is asked, how tokens are chosen."""
    options.add_argument("--checkpoint", default="tiny", metavar="DIR", help="Hugging Face, original/ or Orbax directory; "
                         "default: tiny, the embedded demonstration model")
    options.add_argument("--reasoning", choices=EFFORTS, default="medium", help="reasoning effort (default: medium)")
    options.add_argument("--instructions", metavar="TEXT", help="the developer message: what the model should do and how")
    options.add_argument("--tools", action="append", default=[], metavar="FILE",
                         help="JSON file with a list of function definitions; or python, browser: the built-in tools. Repeatable. "
                         "Calls are printed, not executed")
    options.add_argument("--response-format", metavar="FILE", help="JSON file with a schema that the answer is asked to follow")
    options.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="default: 1024")
    options.add_argument("--temperature", type=float, metavar="T",
                         help="0 is greedy (default: the checkpoint's generation_config.json, 1 for gpt-oss, 0 for tiny)")
    options.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1")
    options.add_argument("--top-k", type=int, default=0, metavar="K", help="default: 0, no limit")
    options.add_argument("--min-p", type=float, default=0.0, metavar="P", help="default: 0")
    options.add_argument("--seed", type=int, metavar="S", help="makes the answer reproducible (default: another one each time)")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of computation (default: bfloat16)")
    options.add_argument("--mesh", default="", metavar="AXIS=N,...", help=f"several devices: {', '.join(AXES[:-1])}, for example expert=8 (default: one)")


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(run, parser(), argv)


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args.prompt)
    opening = opening_messages(args)
    sampling = sampling_of(args)
    from gptoss_jax.text import harmony

    messages = [*opening, harmony.message("user", prompt)]
    engine, tokenizer = load(args, messages, sampling)
    from gptoss_jax.inference.turn import Turn

    status = command.Status()
    turn = Turn(engine, tokenizer, messages, sampling, args.max_new_tokens)
    status(f"reading {len(turn.prompt_ids)} tokens (the first run compiles)")
    printer = Printer(tokenizer, raw=args.raw, quiet=args.json, show_analysis=args.show_analysis)
    try:
        for id, events in turn:
            status.clear()
            printer.show(id, events)
    finally:
        status.clear()
        printer.end_line()
        if args.json:
            print(json.dumps(as_json(turn, tokenizer), ensure_ascii=False, indent=2), flush=True)
        report(turn, has_raw=not args.raw)
    return 0


def read_prompt(prompt: str | None) -> str:
    """Return the prompt, read from standard input for "-" or when it is piped in. Raises UsageError when there is none."""
    if prompt is None and sys.stdin.isatty():
        raise command.UsageError('no prompt found, expected one: python -m gptoss_jax.generate "What is 17 + 25?"')
    if prompt in (None, "-"):
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise command.UsageError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from None
        prompt = prompt.removesuffix("\n")
    if not prompt.strip():
        raise command.UsageError("the prompt is empty, expected some text")
    return prompt


def opening_messages(args: argparse.Namespace) -> list[dict]:
    """Return the system message and, where there is something to say, the developer message. Raises UsageError for unusable files."""
    from gptoss_jax.text import harmony

    builtin = [name for name in ("browser", "python") if name in args.tools]
    functions = []
    for path in args.tools:
        if path not in ("browser", "python"):
            tools = read_json(path, "--tools")
            functions += tools if isinstance(tools, list) else [tools]
    response_format = None
    if args.response_format:
        response_format = read_json(args.response_format, "--response-format")
        if not isinstance(response_format, dict):
            raise command.UsageError(f"--response-format {args.response_format}: {type(response_format).__name__} found, expected a JSON object")
        kind = response_format.get("type")  # the API's "text", "json_schema", "json_object" are no types of a schema
        if kind == "text":
            response_format = None
        elif kind not in ("json_schema", "json_object") and not {"schema", "json_schema"} & set(response_format):
            response_format = {"schema": response_format}  # the bare schema
    messages = [harmony.system_message(reasoning_effort=args.reasoning, tools=builtin)]
    if args.instructions is not None or functions or response_format:
        messages.append(harmony.developer_message(args.instructions, tools=functions, response_format=response_format))
    return messages


def read_json(path: str | os.PathLike, flag: str):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise command.UsageError(f"{flag} {path}: not a readable JSON file ({error})") from None


def sampling_of(args: argparse.Namespace):
    """Return the Sampling that the flags ask for; without --seed another one each time. Raises UsageError or SamplingError."""
    from gptoss_jax import checkpoint
    from gptoss_jax.inference.sampling import Sampling

    if args.max_new_tokens < 1:
        raise command.UsageError(f"--max-new-tokens is {args.max_new_tokens}, expected at least 1")
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    temperature = args.temperature
    if temperature is None:
        file = checkpoint.resolve(args.checkpoint) / "generation_config.json"
        defaults = read_json(file, "checkpoint") if file.exists() else {}
        if not isinstance(defaults, dict):
            raise command.UsageError(f"{file}: {type(defaults).__name__} found, expected a JSON object")
        temperature = defaults.get("temperature", 1.0) if defaults.get("do_sample", True) else 0.0
    return Sampling(temperature=temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=seed)


def load(args: argparse.Namespace, messages: Sequence[dict], sampling):
    """Return (engine, tokenizer) for the checkpoint; progress, and the memory that it and an answer to `messages` take, on stderr.

    sampling: of that answer, whose programs are compiled while the weights are read. Raises PlanError, after the table, where that is more than there is.
    """
    axes, status = mesh_axes(args.mesh, AXES[:-1]), command.Status()
    status(f"loading {args.checkpoint}")
    from gptoss_jax import checkpoint

    command.enable_compilation_cache()
    path = checkpoint.resolve(args.checkpoint)
    if path.is_file():
        raise command.UsageError(f"{path}: a file, expected a checkpoint directory")
    tokenizer = checkpoint.load_tokenizer(path)
    missing = [name for name in ("<|start|>", "<|message|>", "<|return|>", "<|call|>") if name not in tokenizer.special]
    if missing:
        raise command.UsageError(f"{path}: the tokenizer lacks {', '.join(missing)}, expected harmony's special tokens")
    started = time.perf_counter()
    import jax

    from gptoss_jax import sharding
    from gptoss_jax.inference import memory_plan
    from gptoss_jax.inference.engine import Engine, PromptError, cache_length
    from gptoss_jax.model import GptOss, cost
    from gptoss_jax.text import harmony

    count = math.prod(axes.values())
    mesh = sharding.make_mesh(**axes, devices=jax.devices()[:count]) if count > 1 else None
    tokens = len(harmony.render({"messages": list(messages)}, tokenizer, next_role="assistant"))

    def admit(config):
        status.clear()
        limit = config.max_position_embeddings
        if tokens >= limit:
            raise PromptError(f"the prompt has {tokens} tokens, expected fewer than the context of {limit}")
        memory_plan.announce(config, 1, cache_length(tokens + args.max_new_tokens, limit), dtype=args.dtype, mesh=mesh, write=command.tell)
        ahead.append(pool.submit(compiled, config))

    def compiled(config):
        weights = cost.abstract_weights(config, args.dtype, mesh, jax.local_devices()[0])
        engine = Engine(GptOss(config, weights, mesh=mesh), tokenizer)
        engine.compile(tokens, args.max_new_tokens, sampling)
        return engine

    ahead = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        model = checkpoint.load(path, dtype=args.dtype, mesh=mesh, admit=admit, progress=lambda done, total: status(
            f"loading {args.checkpoint}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {done / 1e6 / (time.perf_counter() - started):,.0f} MB/s"))
        status("compiling")
        engine = ahead[0].result()
    if not engine.hold(model):
        engine = Engine(model, tokenizer)
    status.clear()
    return engine, tokenizer


class Printer:
    """Show a turn as it streams: answers and calls on stdout; with show_analysis the reasoning on stderr, dimmed on a terminal."""

    def __init__(self, tokenizer, *, raw: bool = False, quiet: bool = False, show_analysis: bool = False):
        self.tokenizer, self.raw, self.quiet, self.show_analysis = tokenizer, raw, quiet, show_analysis
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        self._mid_line = None  # the stream whose line isn't ended yet

    def show(self, id: int | None, events) -> None:
        if self.quiet:
            return
        if self.raw:
            if id is not None:
                self._write(sys.stdout, self.tokenizer.spelled(id))
            return
        for event in events:
            thinking = event.channel == "analysis" and event.recipient is None
            if event.kind == "skipped" or (thinking and not self.show_analysis):
                continue
            stream = sys.stderr if thinking else sys.stdout
            if event.kind == "start":
                self.end_line()
                if event.recipient is not None:
                    self._write(stream, f"{event.recipient} ".encode())
            elif event.kind == "text":
                self._write(stream, f"{self.dim}{event.delta}{self.plain}".encode() if thinking else event.delta.encode())
            elif event.kind == "end":
                self.end_line()

    def end_line(self) -> None:
        if self._mid_line is not None:
            stream, self._mid_line = self._mid_line, None
            self._write(stream, b"\n")

    def _write(self, stream, data: bytes) -> None:
        stream.flush()
        stream.buffer.write(data)
        stream.buffer.flush()
        self._mid_line = None if data.endswith(b"\n") else stream


def as_json(turn, tokenizer) -> dict:
    """Return what --json prints."""
    tokens = [{"id": id, "text": tokenizer.spelled(id).decode(errors="replace"), "logprob": round(logprob, 5)}
              for id, logprob in zip(turn.ids, turn.logprobs)]
    skipped = [{"text": part.text, "reason": part.reason} for part in turn.skipped]
    return {"messages": turn.messages, "finish": turn.finish, "usage": turn.usage(), "skipped": skipped, "tokens": tokens}


def report(turn, *, has_raw: bool = True) -> None:
    """Print what happened on stderr: speed, and anything the reader of stdout would miss. has_raw: whether there is a --raw that shows more."""
    usage = turn.usage()
    rate = f", {usage['tokens_per_second']} tokens/s" if usage["tokens_per_second"] else ""
    print(f"[{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out, first after {usage['first_token_seconds']:.2f} s{rate}]",
          file=sys.stderr)
    if malformed := len(turn.skipped) - turn.ends_in_header:
        hint = "; --raw shows it whole" if has_raw else ""
        print(f"note: the model's output was malformed in {malformed} place{'s' * (malformed > 1)}{hint}", file=sys.stderr)
    if turn.finish == "length":
        full = usage["prompt_tokens"] + usage["completion_tokens"] >= turn.max_context
        why = f"the context of {turn.max_context} is full" if full else "--max-new-tokens allows more"
        print(f"note: cut off after {usage['completion_tokens']} tokens; {why}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
