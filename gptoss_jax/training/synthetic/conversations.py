"""Conversations of every skill, at every reasoning effort.

The effort named in the system message decides how long the analysis is: at most one line at low, worked steps at medium, worked steps
and a check at high.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from collections.abc import Callable
from typing import Any

from gptoss_jax.text import harmony
from gptoss_jax.text.typescript import compact_json
from gptoss_jax.training.synthetic import arithmetic, chat, functions, problems, structured
from gptoss_jax.training.synthetic.problems import Problem

EFFORTS = ("low", "medium", "high")
HELD_OUT_PART = 16  # one problem in so many is never trained on

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation, with what training and evaluation need to know about it."""

    key: str  # canonical form of the problem, by which train and test are kept apart; empty for small talk
    messages: tuple[Message, ...]  # the last turn is the assistant's, from `prompt_length` on
    prompt_length: int

    @property
    def conversation(self) -> dict[str, Any]:
        """The conversation in the JSON form of openai-harmony."""
        return {"messages": list(self.messages)}


def is_held_out(key: str) -> bool:
    """Tell whether a problem belongs to the test split: by a hash of its canonical form.

    Facts (no number above 9) are never held out: they are the tables that everything else is worked out with.
    """
    numbers = re.findall(r"\d+", key)
    if numbers and all(len(digits) == 1 for digits in numbers):
        return False
    return hashlib.blake2b(key.encode(), digest_size=2).digest()[0] % HELD_OUT_PART == 0


def conversation(seed: int, index: int, split: str = "train", *, skill: str | None = None, effort: str | None = None) -> Sample:
    """Draw one conversation. split: "train" or "test"; their problems are disjoint. skill, effort: None draws them too.

    A sample of the test split is always about a held-out problem; skills whose questions have no key (small talk) draw the same in both.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
    rng = random.Random(f"{seed}/{split}/{index}")
    effort = effort or rng.choices(EFFORTS, (1, 4, 2))[0]
    skill = skill or rng.choices(list(SKILLS), [weight for weight, _ in SKILLS.values()])[0]
    return SKILLS[skill][1](rng, split, effort)


# --- drawing within a split --------------------------------------------------------------------------------------------------------


def _draw(rng: random.Random, split: str, make: Callable[[random.Random], Any], key: Callable[[Any], str]) -> Any:
    while True:
        drawn = make(rng)
        if is_held_out(key(drawn)) == (split == "test"):
            return drawn


def _problem(rng: random.Random, split: str, family: str | None = None) -> tuple[str, Problem]:
    family = family or rng.choices(list(problems.FAMILIES), [weight for weight, _ in problems.FAMILIES.values()])[0]
    return family, _draw(rng, split, problems.FAMILIES[family][1], lambda problem: problem.key)


def problem_prompt(seed: int, index: int, family: str, effort: str) -> tuple[Problem, list[Message]]:
    """Return a held-out problem of a family, and the messages that ask it."""
    rng = random.Random(f"{seed}/ask/{family}/{index}")
    _, problem = _problem(rng, "test", family)
    return problem, [_system(rng, effort), harmony.message("user", problem.question)]


# --- parts of a conversation -------------------------------------------------------------------------------------------------------


def _system(rng: random.Random, effort: str, *, python: bool = False) -> Message:
    """A system message as commands render it: mostly the default identity, with and without a date."""
    fields: dict[str, Any] = {"reasoning_effort": effort}
    if rng.random() < 0.25:
        fields["current_date"] = f"{rng.randint(2024, 2031)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    if rng.random() < 0.1:
        fields["model_identity"] = rng.choice(("You are a helpful assistant.", "You are tiny, a demonstration model.",
                                               "You are a small model.",
                                               "You are a calculator.", "You are an assistant."))
    if python:
        fields["tools"] = ("python",)
    return harmony.system_message(**fields)


def _analysis(text: str) -> list[Message]:
    return [harmony.message("assistant", text, channel="analysis")] if text else []


def _final(text: str) -> Message:
    return harmony.message("assistant", text, channel="final")


def _thought(problem: Problem, effort: str) -> str:
    return {"low": arithmetic.brief(problem.working), "medium": problem.working, "high": f"{problem.working}\n{problem.check}"}[effort]


def _remark(text: str, effort: str) -> str:
    """The analysis where there is nothing to work out."""
    return {"low": "", "medium": text, "high": f"{text} I should answer briefly and honestly."}[effort]


def _sample(prompt: list[Message], turn: list[Message], key: str = "") -> Sample:
    return Sample(key, (*prompt, *turn), len(prompt))


# --- skills --------------------------------------------------------------------------------------------------------------------------

_STYLES: tuple[tuple[tuple[str, ...], str], ...] = (  # developer instructions, and how they shape the reply
    (("Answer with only the number.", "Reply with the number only.", "Only output the final number.", "Just the number, please.",
      "Give only the number."), "{answer}"),
    (("Talk like a pirate.", "Answer like a pirate.", "You are a pirate.", "Speak like a pirate."), "Arr, {reply}, matey!"),
    (("Always be polite.", "Be very polite.", "Be kind and polite.", "Be friendly."), "Thank you for asking. {reply}."),
    (("Be concise.", "Answer the question.", "You are a helpful assistant.", "Be exact.", "Help the user.", "You are a math tutor.",
      "Solve the problem.",
      "Answer in English.", "Use a friendly tone.", "Help.", "Be careful with numbers.", "Do what the user asks."), "{reply}"),
)


def _arithmetic(rng: random.Random, split: str, effort: str) -> Sample:
    _, problem = _problem(rng, split)
    prompt, reply = [_system(rng, effort)], problem.reply
    if rng.random() < 0.12:
        instructions, style = rng.choice(_STYLES)
        prompt.append(harmony.developer_message(instructions=rng.choice(instructions)))
        reply = style.format(answer=problem.answer, reply=problem.reply.rstrip("."))
    prompt.append(harmony.message("user", problem.question))
    return _sample(prompt, [*_analysis(_thought(problem, effort)), _final(reply)], problem.key)


def _function(rng: random.Random, split: str, effort: str) -> Sample:
    """One of one to three declared functions is needed; sometimes none is."""
    call = _draw(rng, split, rng.choice(functions.FUNCTIONS), lambda call: call.key)
    tools = {call.tool["name"]: call.tool}
    while len(tools) < 3 and rng.random() < 0.4:
        other = rng.choice(functions.FUNCTIONS)(rng).tool
        if other["name"].split("_")[-1] != call.tool["name"].split("_")[-1]:
            tools.setdefault(other["name"], other)
    declared = rng.sample(list(tools.values()), len(tools))
    instructions = rng.choice(_STYLES[-1][0]) if rng.random() < 0.3 else None
    prompt = [_system(rng, effort), harmony.developer_message(instructions=instructions, tools=declared)]
    if split == "train" and rng.random() < 0.15:
        return _without_tool(rng, "function", prompt, effort)
    name = f"functions.{call.tool['name']}"
    thought = {"low": "", "medium": f"I need {call.tool['name']}.",
               "high": f"The user asks: {call.question}\nI need {call.tool['name']}."}[effort]
    turn = [*_analysis(thought),
            harmony.message("assistant", compact_json(call.arguments), channel="commentary", recipient=name,
                            content_type="<|constrain|>json"),
            harmony.message("tool", _tool_json(rng, call.result), channel="commentary", recipient="assistant", name=name),
            _final(call.reply)]
    return _sample([*prompt, harmony.message("user", call.question)], turn, call.key)


def _without_tool(rng: random.Random, skill: str, prompt: list[Message], effort: str) -> Sample:
    """Tools are there, and the user asks something that needs none."""
    if skill == "function" and rng.random() < 0.5:
        _, problem = _problem(rng, "train")
        said, thought, reply = problem.question, _thought(problem, effort), problem.reply
    else:
        said, analysis, reply = chat.small_talk(rng)
        thought = _remark(analysis, effort)
    return _sample([*prompt, harmony.message("user", said)], [*_analysis(thought), _final(reply)])


def _tool_json(rng: random.Random, result: dict[str, Any]) -> str:
    text = compact_json(result)
    return text if rng.random() < 0.5 else text.replace('":', '": ').replace(',"', ', "')


def _python(rng: random.Random, split: str, effort: str) -> Sample:
    """The built-in python tool is there: calculate with it, whatever the size of the numbers."""
    if split == "train" and rng.random() < 0.1:
        return _without_tool(rng, "python", [_system(rng, effort, python=True)], effort)
    if rng.random() < 0.5:
        _, problem = _problem(rng, split)
        question, code, key = problem.question, problem.code, problem.key
    else:
        sign = rng.choice(("+", "-", "*", "*", "//", "**"))
        a, b = problems.number(rng, (3, 4, 5, 6, 7)), problems.number(rng, (1, 2, 3, 4, 5))
        if sign == "**":
            a, b = rng.randint(2, 99), rng.randint(2, 12)
        b = max(b, 1)
        code = f"{a}{sign}{b}"
        shown = {"//": "/", "**": rng.choice(("**", "^", " to the power of "))}.get(sign, sign)
        shown = shown if sign == "**" or rng.random() < 0.5 else f" {shown} "
        question = problems.vary(rng, rng.choice(("What is {}?", "{}", "Compute {}.", "Use Python to calculate {}.",
                                                  "Calculate {} with Python", "{}?")).format(f"{a}{shown}{b}"))
        key = code
    if is_held_out(key) != (split == "test"):
        return _python(rng, split, effort)
    value = eval(code, {"__builtins__": {}, "max": max})  # our own expression of integers
    thought = {"low": "", "medium": "I will use Python.", "high": f"I will use Python to compute {code}."}[effort]
    turn = [*_analysis(thought),
            harmony.message("assistant", f"print({code})", channel="analysis", recipient="python", content_type="code"),
            harmony.message("tool", f"{value}\n" if rng.random() < 0.7 else f"{value}", channel="analysis", recipient="assistant",
                            name="python"),
            _final(f"The answer is {value}.")]
    prompt = [_system(rng, effort, python=True), harmony.message("user", question)]
    return _sample(prompt, turn, key)


def _json(rng: random.Random, split: str, effort: str) -> Sample:
    if rng.random() < 0.45:
        family, problem = _problem(rng, split)
        if not problem.answer.lstrip("-").isdigit():
            return _json(rng, split, effort)
        question, thought = problem.question, _thought(problem, effort)
        schema, answer = structured.arithmetic_answer(rng, problem)
        key = problem.key
    else:
        family, make = rng.choice(structured.EXTRACTIONS)
        question, schema, answer = _draw(rng, split, make, lambda drawn: drawn[0])
        thought, key = _remark("I answer in JSON.", effort), question
    name = rng.choice(("answer", "response", "result", "output", "reply", family, "schema", "format"))
    instructions = rng.choice((None, None, *_STYLES[-1][0]))
    prompt = [_system(rng, effort), harmony.developer_message(instructions=instructions, response_format={"name": name, "schema": schema}),
              harmony.message("user", question)]
    return _sample(prompt, [*_analysis(thought), _final(answer)], key)


def _chat(rng: random.Random, split: str, effort: str) -> Sample:
    kind = rng.random()
    if kind < 0.4:
        said, analysis, reply = _draw(rng, split, chat.repeat, lambda drawn: drawn[2])
        key = reply
    elif kind < 0.6:
        key, (said, analysis, reply) = "", chat.small_talk(rng)
    else:
        said, analysis, reply = _draw(rng, split, chat.beyond, lambda drawn: drawn[0])
        key = said
    prompt = [_system(rng, effort)]
    if rng.random() < 0.1:
        prompt.append(harmony.developer_message(instructions=rng.choice(rng.choice(_STYLES[1:])[0])))
    prompt.append(harmony.message("user", said))
    return _sample(prompt, [*_analysis(_remark(analysis, effort)), _final(reply)], key)


_FOLLOW_UPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("+", ("Add {b}.", "And plus {b}?", "now add {b}", "Plus {b}", "What if you add {b} to that?", "add {b} more")),
    ("-", ("Subtract {b}.", "And minus {b}?", "now take away {b}", "Minus {b}", "take {b} from that")),
    ("*", ("Multiply that by {b}.", "Times {b}?", "and times {b}", "now multiply it by {b}")),
)


def _dialogue(rng: random.Random, split: str, effort: str) -> Sample:
    """A conversation with a past: the follow-up builds on the last answer, or asks something else."""
    messages = [_system(rng, effort)]
    past = None
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.75:
            _, past = _problem(rng, "train")
            said, reply = past.question, past.reply
        else:
            said, _, reply = chat.small_talk(rng) if rng.random() < 0.7 else chat.beyond(rng)
            past = None
        messages += [harmony.message("user", said), _final(reply)]
    if past is None or rng.random() < 0.3 or not past.answer.isdigit() or len(past.answer) > 4:
        _, problem = _problem(rng, split)
    else:
        problem = _follow_up(rng, int(past.answer))
        if is_held_out(problem.key) != (split == "test"):
            return _dialogue(rng, split, effort)
    return _sample([*messages, harmony.message("user", problem.question)],
                   [*_analysis(_thought(problem, effort)), _final(problem.reply)], problem.key)


def _follow_up(rng: random.Random, a: int) -> Problem:
    sign, templates = rng.choice(_FOLLOW_UPS)
    b = rng.randint(2, 9) if sign == "*" else rng.randint(1, 99)
    if sign == "*" and a > 999:
        sign, templates = _FOLLOW_UPS[0]
    question, value = problems.vary(rng, rng.choice(templates).format(b=b)), problems.apply(sign, a, b)
    work, check = problems.WORKINGS[sign]
    return Problem(f"{a}{sign}{b}", question, work(a, b), check(a, b), str(value), f"{a} {sign} {b} = {value}",
                   f"{a}{sign}{b}")


SKILLS: dict[str, tuple[float, Callable[[random.Random, str, str], Sample]]] = {  # name: (weight, generator)
    "arithmetic": (10, _arithmetic), "function": (3, _function), "python": (1.2, _python), "json": (1.5, _json), "chat": (3, _chat),
    "dialogue": (1, _dialogue)}
