"""Measure a checkpoint on problems it has never seen: `python -m gptoss_jax.evaluate [--checkpoint tiny]`.

The problems are the test split of the synthetic conversations (`gptoss_jax.training.synthetic`): no problem of it, in any phrasing, is
ever trained on. Decoding is greedy; an answer counts when it is exactly right.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence

from gptoss_jax import command

EFFORTS = ("low", "medium", "high")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m gptoss_jax.evaluate", description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--checkpoint", default="tiny", metavar="DIR", help="default: tiny, the embedded checkpoint")
    options.add_argument("--problems", type=int, default=50, metavar="N",
                         help="problems of each family and effort, samples of each skill (default: 50)")
    options.add_argument("--seed", type=int, default=1, help="which problems (default: 1)")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of computation (default: bfloat16)")
    options.add_argument("--batch", type=int, default=64, metavar="N", help="prompts at once (default: 64)")
    options.add_argument("--failures", action="store_true", help="show every wrong answer, on stderr")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(run, parser(), argv)


def run(args: argparse.Namespace) -> int:
    if args.problems < 1 or args.batch < 1:
        raise command.UsageError(f"--problems is {args.problems} and --batch {args.batch}, expected at least 1")
    from gptoss_jax import checkpoint
    from gptoss_jax.inference.engine import Engine
    from gptoss_jax.text.tokenizer import load_tokenizer

    command.enable_compilation_cache()
    path = checkpoint.resolve(args.checkpoint)
    tokenizer = load_tokenizer(path)
    student = Student(Engine(checkpoint.load(path, dtype=args.dtype), tokenizer), tokenizer, args.batch)
    started = time.monotonic()
    arithmetic(student, args)
    skills(student, args)
    print(f"[{time.monotonic() - started:.0f} s, {args.dtype}]", file=sys.stderr)
    return 0


class Student:
    """Completes conversations, greedily and in batches."""

    def __init__(self, engine, tokenizer, batch: int):
        self.engine, self.tokenizer, self.batch = engine, tokenizer, batch

    def continue_all(self, conversations: Sequence[Sequence[dict]]) -> Iterator[tuple[list[dict], int]]:
        """Yield (the assistant's messages, number of tokens) for each conversation."""
        from gptoss_jax.inference.sampling import Sampling
        from gptoss_jax.text import harmony

        prompts = [harmony.render(messages, self.tokenizer, next_role="assistant") for messages in conversations]
        for start in range(0, len(prompts), self.batch):
            for completion in self.engine.generate(prompts[start : start + self.batch], Sampling(temperature=0.0), max_new_tokens=512):
                yield list(harmony.parse(completion.ids, self.tokenizer)), len(completion.ids)


def arithmetic(student: Student, args: argparse.Namespace) -> None:
    """Print the share of right answers for every family at every effort, and the length of the answers."""
    from gptoss_jax.training.synthetic import problem_prompt
    from gptoss_jax.training.synthetic.problems import FAMILIES

    print(f"{'arithmetic':16}" + "".join(f"{effort:>9}" for effort in EFFORTS))
    totals = {effort: [0, 0] for effort in EFFORTS}
    for family in FAMILIES:
        row = f"{family.replace('_', ' '):16}"
        for effort in EFFORTS:
            asked = [problem_prompt(args.seed, index, family, effort) for index in range(args.problems)]
            right = 0
            for (problem, messages), (answer, length) in zip(asked, student.continue_all([messages for _, messages in asked])):
                exact = states(final_text(answer), problem.answer)
                right += exact
                totals[effort][1] += length
                if not exact and args.failures:
                    print(f"{family}, {effort}: {problem.question!r}\n  expected {problem.answer}, got {shown(answer)}", file=sys.stderr)
            totals[effort][0] += right
            row += f"{right / args.problems:9.1%}"
        print(row, flush=True)
    count = args.problems * len(FAMILIES)
    print(f"{'all':16}" + "".join(f"{totals[effort][0] / count:9.1%}" for effort in EFFORTS))
    print(f"{'tokens an answer':16}" + "".join(f"{totals[effort][1] / count:9.0f}" for effort in EFFORTS) + "\n")


def skills(student: Student, args: argparse.Namespace) -> None:
    """Print the share of conversations of the other skills that go exactly as they should, tools answered as in the test sample."""
    from gptoss_jax.training.synthetic import conversation

    meanings = {"function": "calls the right function with the right JSON arguments, then uses the result",
                "python": "calls python with the right code, then uses the result", "json": "answers with exactly the right JSON",
                "chat": "small talk, and honest about what it can't do", "dialogue": "follow-up questions in a conversation"}
    for skill, meaning in meanings.items():
        samples = [conversation(args.seed, index, "test", skill=skill) for index in range(args.problems)]
        right = [True] * len(samples)
        pending = [(index, list(sample.messages[: sample.prompt_length]), list(sample.messages[sample.prompt_length :]))
                   for index, sample in enumerate(samples)]
        while pending:
            answers = student.continue_all([messages for _, messages, _ in pending])
            following = []
            for (index, messages, expected), (answer, _) in zip(pending, list(answers)):
                expected = [message for message in expected if message.get("channel") != "analysis" or message.get("recipient")]
                if not agrees(answer[-1] if answer else None, expected[0]):
                    right[index] = False
                    if args.failures:
                        print(f"{skill}: {text(messages[-1])!r}\n  expected {shown(expected[:1])}, got {shown(answer)}", file=sys.stderr)
                elif len(expected) > 1:  # a call: its result, then on
                    following.append((index, [*messages, *answer, expected[1]], expected[2:]))
            pending = following
        print(f"{skill:16}{sum(right) / len(right):9.1%}  {meaning}", flush=True)


def states(reply: str, answer: str) -> bool:
    """Tell whether a reply states the answer last: "17 + 25 = 42." states 42."""
    return re.search(rf"(^|[^\d-]){re.escape(answer)}\.?$", reply.strip()) is not None


def agrees(message: dict | None, expected: dict) -> bool:
    """Tell whether a message goes where it should and says what it should; JSON is compared by value."""
    if message is None or any(message.get(key) != expected.get(key) for key in ("channel", "recipient", "content_type")):
        return False
    if text(message) == text(expected):
        return True
    try:
        return json.loads(text(message)) == json.loads(text(expected))
    except ValueError:
        return False


def final_text(messages: Sequence[dict]) -> str:
    return text(messages[-1]) if messages and messages[-1].get("channel") == "final" else ""


def text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(item.get("text", "") for item in content)


def shown(messages: Sequence[dict]) -> str:
    return " | ".join(f"{message.get('channel')} to {message.get('recipient') or 'the user'}: {text(message)!r}" for message in messages)


if __name__ == "__main__":
    sys.exit(main())
