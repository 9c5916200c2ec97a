"""A lesson that the embedded checkpoint hasn't had: what time it will be. `python -m gptoss_jax.training.synthetic.clock DIRECTORY`.

Writes train.jsonl, problems with their working; test.jsonl, others of the kind; and known.jsonl, conversations of the skills that the
checkpoint has, to be trained on beside them so that these stay.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptoss_jax.training.synthetic import arithmetic, words
from gptoss_jax.training.synthetic.conversations import conversation

_ASKED = ("It is {start}. What time is it in {minutes} minutes?", "What time is it {minutes} minutes after {start}?",
          "{name} leaves at {start} and walks {minutes} minutes. When does {name} arrive?",
          "A train leaves at {start} and takes {minutes} minutes. When does it arrive?", "{start} plus {minutes} minutes",
          "A film starts at {start} and lasts {minutes} minutes. When does it end?")
_MINUTES_A_DAY = 24 * 60


def lesson(start: int, minutes: int) -> tuple[str, str]:
    """Return (working, answer) of so many minutes after `start`, minutes since midnight: the clock shows 0:00 to 23:59."""
    hour, past = divmod(start, 60)
    lines, total = [arithmetic.add(past, minutes)], past + minutes
    while total >= 60:
        lines.append(f"{arithmetic.subtract(total, 60)}\nhour: {hour}+1={hour + 1}")
        total, hour = total - 60, hour + 1
    if hour >= 24:
        lines.append(f"{hour} is {hour - 24}")
        hour -= 24
    answer = f"{hour}:{total:02d}"
    return "\n".join([*lines, answer]), answer


def problems(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield so many records, no two with the same time and minutes."""
    rng, seen = random.Random(f"clock/{seed}"), set()
    while len(seen) < count:
        start, minutes = rng.randrange(_MINUTES_A_DAY), rng.randint(2, 99)
        if (start, minutes) in seen:
            continue
        seen.add((start, minutes))
        working, answer = lesson(start, minutes)
        question = rng.choice(_ASKED).format(start=f"{start // 60}:{start % 60:02d}", minutes=minutes, name=words.name(rng))
        yield {"messages": [{"role": "user", "content": question},
                            {"role": "assistant", "thinking": working, "content": f"It is {answer}."}]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.training.synthetic.clock", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--problems", type=int, default=4000, help="to train on (default: 4000), and a tenth of it for the test")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        _write(arguments.directory, arguments.problems, arguments.seed)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: {arguments.directory}: {error.strerror}\n")
    return 0


def _write(directory: Path, count: int, seed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tested = count // 10
    records = list(problems(count + tested, seed))
    known = ({"messages": conversation(seed, index).messages} for index in range(count))
    for name, content in (("train", records[tested:]), ("test", records[:tested]), ("known", known)):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in content]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{directory / name}.jsonl: {len(lines)} records", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
