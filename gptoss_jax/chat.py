"""Talk with the model in the terminal: `python -m gptoss_jax.chat`. It remembers the conversation; /help lists the commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from gptoss_jax import command, generate

HELP = """/reasoning low|medium|high   how long the model thinks
/reset                       forget the conversation
/save FILE                   write the conversation as JSON
/help                        this text
/quit                        leave (or Ctrl-D)
Ctrl-C stops an answer. When the model calls a tool, type the tool's result: any line, also an empty one, that is none of these commands."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m gptoss_jax.chat", description=__doc__)
    generate.add_options(options)
    options.add_argument("--hide-analysis", action="store_true", help="do not show the reasoning")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(run, parser(), argv)


def run(args: argparse.Namespace) -> int:
    opening, sampling = generate.opening_messages(args), generate.sampling_of(args)
    engine, tokenizer = generate.load(args, opening, sampling)
    chat = Chat(args, engine, tokenizer, opening, sampling)
    print(f"{args.checkpoint}, reasoning {args.reasoning}; /help lists the commands", file=sys.stderr)
    while True:
        try:
            line = read_line(chat.prompt)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except command.UsageError as error:
            print(f"{error}; that line is dropped", file=sys.stderr)
            continue
        if line is None or line.strip() == "/quit":
            return 0
        if line.startswith("/") and (not chat.waiting_for or line.split()[0] in COMMANDS):
            chat.command(line)
        elif line.strip() or chat.waiting_for:
            chat.say(line)


def read_line(prompt: str) -> str | None:
    """Return a line from standard input, None at its end. The prompt goes to stderr, editing and history work where readline is there.

    Raises UsageError for a line that is not text.
    """
    try:
        import readline  # noqa: F401  input() edits lines with it
    except ImportError:
        pass
    if sys.stdin.errors != "surrogateescape":  # or a wrong byte takes the lines read with it along
        sys.stdin.reconfigure(errors="surrogateescape")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        line = input(prompt if interactive else "")
        line.encode()
        return line
    except EOFError:
        if interactive:
            print(file=sys.stderr)
        return None
    except UnicodeEncodeError as error:
        raise command.UsageError(f"standard input is not UTF-8 text (at character {error.start + 1})") from None


class Chat:
    """The conversation so far and what the next line means: a user's message, or the result of a tool that was called."""

    def __init__(self, args, engine, tokenizer, opening: list[dict], sampling):
        from gptoss_jax.text import harmony

        self.args, self.engine, self.tokenizer, self.sampling = args, engine, tokenizer, sampling
        self.opening, self.messages = opening, []
        # Of the longest cache that fits: `generate.load` has looked at this one.
        self.slots = self._slots(len(harmony.render({"messages": opening}, tokenizer, next_role="assistant")))
        self.waiting_for: dict | None = None  # the call whose result comes next

    @property
    def prompt(self) -> str:
        return f"{self.waiting_for['recipient']} result> " if self.waiting_for else "you> "

    def say(self, text: str) -> None:
        """Add a line to the conversation and stream the answer. What didn't fit or was interrupted is taken back."""
        from gptoss_jax.devices import PlanError
        from gptoss_jax.inference.engine import PromptError
        from gptoss_jax.text import harmony

        call, added = self.waiting_for, len(self.messages)
        if call:
            self.messages.append(harmony.message("tool", text, name=call["recipient"], recipient="assistant", channel="commentary"))
        else:
            self.messages.append(harmony.message("user", text))
        try:
            turn = self.answer()
        except (PromptError, PlanError) as error:
            del self.messages[added:]
            print(f"{error}; /reset starts anew", file=sys.stderr)
            return
        if turn.finish == "interrupted":
            del self.messages[added:]
            print("(stopped; that message and its answer are forgotten)", file=sys.stderr)
            return
        self.messages += turn.messages
        calls = [message for message in turn.messages if message.get("recipient")]
        self.waiting_for = calls[-1] if turn.finish == "call" and calls else None

    def answer(self):
        from gptoss_jax.inference import memory_plan
        from gptoss_jax.inference.turn import Turn

        # Another seed each turn, the same ones in a rerun.
        sampling = dataclasses.replace(self.sampling, seed=(self.sampling.seed + len(self.messages)) % 2**32)
        turn = Turn(self.engine, self.tokenizer, self.opening + self.messages, sampling, self.args.max_new_tokens)
        if (slots := self._slots(len(turn.prompt_ids))) > self.slots:  # nothing is allocated yet
            memory_plan.announce(self.engine.config, 1, slots, dtype=self.args.dtype, mesh=self.engine.mesh, loaded=True, write=command.tell)
            self.slots = slots
        printer, status = generate.Printer(self.tokenizer, show_analysis=not self.args.hide_analysis), command.Status()
        status("thinking")
        try:
            for id, events in turn:
                status.clear()
                printer.show(id, events)
        except KeyboardInterrupt:
            turn.finish = "interrupted"
        finally:
            status.clear()
            printer.end_line()
        generate.report(turn, has_raw=False)
        return turn

    def _slots(self, tokens: int) -> int:
        from gptoss_jax.inference.engine import cache_length

        return cache_length(tokens + self.args.max_new_tokens, self.engine.max_context)

    def command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name == "/reasoning" and argument in generate.EFFORTS:
            self.args.reasoning = argument
            self.opening[0] = generate.opening_messages(self.args)[0]
        elif name == "/reasoning":
            print(f"reasoning is {self.args.reasoning}; expected /reasoning {'|'.join(generate.EFFORTS)}", file=sys.stderr)
        elif name == "/reset":
            self.messages, self.waiting_for = [], None
            print("(forgotten)", file=sys.stderr)
        elif name == "/save" and argument:
            self.save(argument)
        elif name == "/help":
            print(HELP, file=sys.stderr)
        else:
            print(f"{line.strip()}: no such command, or it lacks its argument\n{HELP}", file=sys.stderr)

    def save(self, path: str) -> None:
        if os.path.exists(path):
            print(f"{path} exists; choose another name", file=sys.stderr)
            return
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"messages": self.opening + self.messages}, file, ensure_ascii=False, indent=2)
                file.write("\n")
        except OSError as error:
            print(f"{path}: {error.strerror}", file=sys.stderr)
        else:
            print(f"saved {len(self.messages)} messages to {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
