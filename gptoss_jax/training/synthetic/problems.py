"""Arithmetic problems in everyday phrasing, with their working at each reasoning effort.

FAMILIES lists the generators. Each draws one Problem from a random.Random; equal states of the generator give equal problems.
A problem's `key` is its canonical form (operation and operands, whatever the phrasing): train and test problems are kept apart by it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from gptoss_jax.training.synthetic import arithmetic, words


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, how to work it out and what to answer."""

    key: str  # canonical form, "47+85"
    question: str
    working: str  # the analysis at medium effort
    check: str  # follows the working at high effort
    answer: str  # what counts as right: the reply must state it last
    reply: str
    code: str  # a Python expression of the same value


def number(rng: random.Random, digits: tuple[int, ...] = (1, 2, 2, 2, 3, 3)) -> int:
    """Return a number whose count of digits is drawn from `digits`; the first digit isn't 0 beyond one digit."""
    count = rng.choice(digits)
    return rng.randrange(10 ** (count - 1) if count > 1 else 0, 10**count)


_SIZES = (*(1, 2, 2, 2, 3, 3) * 4, 4)

# --- plain questions -------------------------------------------------------------------------------------------------------------

_ASK = ("What is {}?", "what's {}", "{}", "{}=", "{} = ?", "Calculate {}.", "Compute {}", "How much is {}?", "Can you tell me {}?",
        "Solve {}",
        "What does {} equal?", "Please work out {}.", "Hey, what is {}?", "I need to know {}.", "Tell me {}", "{}?", "Evaluate {}",
        "whats {}",
        "What is the result of {}?", "Find {}.")
_SPOKEN = {
    "+": ("What is the sum of {a} and {b}?", "Add {a} and {b}.", "What is {a} plus {b}?", "{a} plus {b}", "add {b} to {a}",
          "How much is {a} and {b} together?", "What do you get if you add {a} and {b}?", "What is {a} added to {b}?",
          "total of {a} and {b}?"),
    "-": ("What is {a} minus {b}?", "{a} minus {b}", "Subtract {b} from {a}.", "What is the difference between {a} and {b}?",
          "take {b} away from {a}",
          "How much is left if you take {b} from {a}?", "What is {b} less than {a}?", "{a} take away {b}"),
    "*": ("What is {a} times {b}?", "{a} times {b}", "Multiply {a} by {b}.", "What is the product of {a} and {b}?", "multiply {a} and {b}",
          "How much is {a} multiplied by {b}?", "{a} multiplied by {b}"),
    "/": ("What is {a} divided by {b}?", "{a} divided by {b}", "Divide {a} by {b}.", "How many times does {b} go into {a}?",
          "How much is {a} over {b}?", "divide {a} into {b} equal parts"),
}
_SIGNS = {"+": ("+",), "-": ("-", "-", "-", "−"), "*": ("*", "*", "x", "×"), "/": ("/", "/", "÷", ":")}


def _ask(rng: random.Random, sign: str, a: int, b: int) -> str:
    if rng.random() < 0.4:
        return vary(rng, rng.choice(_SPOKEN[sign]).format(a=a, b=b))
    shown, space = rng.choice(_SIGNS[sign]), rng.choice((" ", " ", ""))
    return vary(rng, rng.choice(_ASK).format(f"{a}{space}{shown}{space}{b}"))


def vary(rng: random.Random, question: str) -> str:
    """Return the question as someone might type it: in small letters, without its last mark, or with a blank at an end."""
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?.!")
    if rng.random() < 0.03:
        question = rng.choice((" {}", "{} ", "{}\n")).format(question)
    return question


def _plain(rng: random.Random, sign: str, a: int, b: int, working: str, check: str, answer: str) -> Problem:
    return Problem(f"{a}{sign}{b}", _ask(rng, sign, a, b), working, check, answer, f"{a} {sign} {b} = {answer}",
                   f"{a}{'//' if sign == '/' else sign}{b}")


def addition(rng: random.Random) -> Problem:
    a, b = number(rng, _SIZES), number(rng, _SIZES)
    return _plain(rng, "+", a, b, arithmetic.add(a, b), arithmetic.check_sum(a, b), str(a + b))


def subtraction(rng: random.Random) -> Problem:
    a, b = number(rng, _SIZES), number(rng, _SIZES)
    if a < b and rng.random() < 0.8:
        a, b = b, a
    return _plain(rng, "-", a, b, arithmetic.subtract(a, b), arithmetic.check_difference(a, b), str(a - b))


def multiplication(rng: random.Random) -> Problem:
    digits = rng.choice(((1, 1), (2, 1), (2, 1), (1, 2), (2, 2), (2, 2), (3, 1)))
    a, b = (number(rng, (count,)) for count in digits)
    return _plain(rng, "*", a, b, arithmetic.multiply(a, b), arithmetic.check_product(a, b), str(a * b))


def division(rng: random.Random) -> Problem:
    b = rng.choice((rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9), rng.choice((10, 11, 12, 15, 20, 25))))
    a = b * number(rng, (1, 2, 2)) if rng.random() < 0.7 else number(rng, (1, 2, 2, 3))
    quotient, remainder = divmod(a, b)
    answer = f"{quotient} remainder {remainder}" if remainder else str(quotient)
    return _plain(rng, "/", a, b, arithmetic.divide(a, b), arithmetic.check_quotient(a, b), answer)


def sum_of_three(rng: random.Random) -> Problem:
    a, b, c = (number(rng, (1, 2, 2)) for _ in range(3))
    asked = rng.choice(("What is {a} + {b} + {c}?", "{a}+{b}+{c}", "Add {a}, {b} and {c}.", "What is the sum of {a}, {b} and {c}?",
                        "{a} + {b} + {c} = ?",
                        "Calculate {a}+{b}+{c}", "{a} plus {b} plus {c}"))
    total = a + b + c
    return Problem(f"{a}+{b}+{c}", vary(rng, asked.format(a=a, b=b, c=c)), f"{arithmetic.add(a, b)}\n{arithmetic.add(a + b, c)}",
                   f"{arithmetic.check_sum(a + b, c)}", str(total), f"{a} + {b} + {c} = {total}", f"{a}+{b}+{c}")


def mixed(rng: random.Random) -> Problem:
    """Two operations, with precedence or brackets."""
    a, b, c = number(rng, (1, 1, 2)), rng.randint(2, 9), number(rng, (1, 2))
    form = rng.choice(("{a}*{b}+{c}", "{c}+{a}*{b}", "({a}+{c})*{b}", "{b}*({a}+{c})", "{a}+{c}-{b}"))
    expression = form.format(a=a, b=b, c=c)
    if form == "{a}+{c}-{b}":
        value = a + c - b
        working = f"{arithmetic.add(a, c)}\n{arithmetic.subtract(a + c, b)}"
        check = arithmetic.check_difference(a + c, b)
    elif "(" in form:
        value = (a + c) * b
        working = f"{arithmetic.add(a, c)}\n{arithmetic.multiply(a + c, b)}"
        check = arithmetic.check_product(a + c, b)
    else:
        value = a * b + c
        last = (a * b, c) if form.startswith("{a}") else (c, a * b)
        working, check = f"{arithmetic.multiply(a, b)}\n{arithmetic.add(*last)}", arithmetic.check_sum(*last)
    spaced = expression.replace("+", " + ").replace("*", " * ").replace("-", " - ")
    asked = spaced if rng.random() < 0.5 else expression
    return Problem(expression, vary(rng, rng.choice(_ASK).format(asked)), working, check, str(value), f"{spaced} = {value}", expression)


def multiple(rng: random.Random) -> Problem:
    """Double, triple, half: an operation that isn't named by its sign."""
    a = number(rng, (1, 2, 2, 3))
    word, factor = rng.choice((("double", 2), ("twice", 2), ("triple", 3), ("half", 0)))
    if factor:
        asked = rng.choice(("What is {w} {a}?", "{w} {a}", "How much is {w} {a}?", "Calculate {w} {a}")).format(w=word, a=a)
        return Problem(f"{a}*{factor}", vary(rng, asked), arithmetic.multiply(a, factor), arithmetic.check_product(a, factor),
                       str(a * factor), f"{a} * {factor} = {a * factor}", f"{a}*{factor}")
    a *= 2
    asked = rng.choice(("What is half of {a}?", "half of {a}", "How much is half of {a}?", "Halve {a}.")).format(a=a)
    return Problem(f"{a}/2", vary(rng, asked), arithmetic.divide(a, 2), arithmetic.check_quotient(a, 2), str(a // 2),
                   f"{a} / 2 = {a // 2}", f"{a}//2")


def unknown(rng: random.Random) -> Problem:
    """Find x in a one-step equation."""
    x, b = number(rng, (1, 2, 2)), number(rng, (1, 2, 2))
    letter = rng.choice("xxxyna")
    if rng.random() < 0.5:
        equation, working = f"{letter} + {b} = {x + b}", f"{letter}={x + b}-{b}\n{arithmetic.subtract(x + b, b)}"
        code, check, key = f"{x + b}-{b}", arithmetic.check_difference(x + b, b), f"x+{b}={x + b}"
    else:
        x += b
        equation, working = f"{letter} - {b} = {x - b}", f"{letter}={x - b}+{b}\n{arithmetic.add(x - b, b)}"
        code, check, key = f"{x - b}+{b}", arithmetic.check_sum(x - b, b), f"x-{b}={x - b}"
    asked = rng.choice(("Solve {}", "Find {l}: {}", "{}, what is {l}?", "If {}, what is {l}?", "Solve for {l}: {}")).format(equation,
                                                                                                                            l=letter)
    return Problem(key, vary(rng, asked), working, check, str(x), f"{letter} = {x}", code)


def comparison(rng: random.Random) -> Problem:
    a = number(rng, (1, 2, 2, 3, 3))
    b = a + rng.choice((-1, 1)) * rng.randint(1, 20) if rng.random() < 0.4 else number(rng, (1, 2, 2, 3, 3))
    if b < 0 or a == b:
        return comparison(rng)
    asked = rng.choice(("Which is larger, {a} or {b}?", "which number is bigger: {a} or {b}?", "Is {a} or {b} greater?",
                        "What is the larger of {a} and {b}?",
                        "max of {a} and {b}", "Which is more, {a} or {b}?"))
    larger, smaller = max(a, b), min(a, b)
    return Problem(f"max({a},{b})", vary(rng, asked.format(a=a, b=b)), arithmetic.compare(a, b),
                   f"Check: {arithmetic.subtract(larger, smaller)}, positive", str(larger), f"The larger number is {larger}.",
                   f"max({a},{b})")


def sequence(rng: random.Random) -> Problem:
    """The next term of an arithmetic sequence."""
    start, step, length = number(rng, (1, 2)), rng.randint(1, 12), rng.randint(3, 5)
    if rng.random() < 0.25:
        start, step = start + step * length, -step
    terms = [start + step * i for i in range(length + 1)]
    shown = ", ".join(map(str, terms[:-1]))
    asked = rng.choice(("What comes next: {}?", "What is the next number: {}, ...", "Continue the sequence {}", "{}, ?",
                        "Which number comes after {}?",
                        "Find the next term of {}"))
    last = terms[-2]
    if step > 0:
        working = f"up: {arithmetic.subtract(terms[1], start)}\n{arithmetic.add(last, step)}"
    else:
        working = f"down: {arithmetic.subtract(start, terms[1])}\n{arithmetic.subtract(last, -step)}"
    check = arithmetic.check_sum(last, step) if step > 0 else arithmetic.check_difference(last, -step)
    return Problem(f"next({shown})", vary(rng, asked.format(shown)), working, check, str(terms[-1]), f"The next number is {terms[-1]}.",
                   f"{last}{step:+d}")


# --- word problems ---------------------------------------------------------------------------------------------------------------

_GAINS = ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have?",
          "{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?",
          "{n} found {a} {t} in the morning and {b} in the evening. How many {t} did {n} find?",
          "There are {a} {t} in a box. {n} puts {b} more {t} in. How many {t} are in the box?",
          "{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have together?",
          "If {n} has {a} {t} and gets {b} more, how many {t} does {n} have?",
          "{n} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {n} read in total?",
          "I have {a} {t} and buy {b} more. How many {t} do I have?",
          "A bus has {a} people. {b} more get on. How many people are on the bus?",
          "{n} collected {a} {t}, then {b} more {t}. How many in all?", "{n} is {a} years old. How old will {n} be in {b} years?")
_LOSSES = ("{n} has {a} {t} and gives {b} to {m}. How many {t} does {n} have left?", "{n} had {a} {t} but lost {b}. How many {t} are left?",
           "There are {a} {t} on the table. {n} takes {b}. How many {t} remain?",
           "{n} has {a} {t} and sells {b} of them. How many {t} does {n} have now?",
           "{n} bought {a} {t} and ate {b}. How many {t} are left?", "I have {a} {t} and give away {b}. How many do I have left?",
           "{n} has {a} {t}, {m} has {b}. How many more {t} does {n} have than {m}?",
           "A book has {a} pages. {n} has read {b}. How many pages are left?",
           "If {n} has {a} {t} and uses {b}, how many {t} are left?", "{n} has {a} dollars and spends {b}. How much money is left?")
_GROUPS = ("There are {a} {c} with {b} {t} each. How many {t} are there?",
           "{n} has {a} {c}. Each holds {b} {t}. How many {t} does {n} have?",
           "{n} buys {b} {t} every day for {a} days. How many {t} does {n} buy?", "One of the {t} costs {b} dollars. How much do {a} cost?",
           "{n} fills {a} {c} with {b} {t} each. How many {t} is that?",
           "{n} earns {b} dollars an hour. How much does {n} earn in {a} hours?",
           "A car drives {b} km an hour. How far does it go in {a} hours?",
           "If each of {a} children gets {b} {t}, how many {t} are needed?")
_SHARES = ("{n} shares {a} {t} equally among {b} friends. How many {t} does each friend get?",
           "{a} {t} are packed in {b} equal {c}. How many {t} are in each?",
           "{n} puts {a} {t} into {b} {c}, the same number in each. How many {t} per one?",
           "{b} children share {a} {t} equally. How many does each get?",
           "If {b} people split {a} dollars equally, how much does each get?",
           "{n} reads {a} pages in {b} days, the same every day. How many pages a day?")


def story(rng: random.Random) -> Problem:
    """A word problem of one step."""
    kind = rng.choice("+-*/+-")
    n, m, t = words.name(rng), words.name(rng), words.things(rng)
    if kind == "+":
        a, b, templates, verb = number(rng, (1, 1, 2, 2, 3)), number(rng, (1, 1, 2, 2, 3)), _GAINS, "Add"
    elif kind == "-":
        a, b = sorted((number(rng, (1, 2, 2, 3)), number(rng, (1, 2, 2))), reverse=True)
        templates, verb = _LOSSES, "Subtract"
    elif kind == "*":
        a, b, templates, verb = rng.randint(2, 12), number(rng, (1, 1, 2)), _GROUPS, "Multiply"
    else:
        b = rng.randint(2, 9)
        a, templates, verb = b * number(rng, (1, 2)), _SHARES, "Divide"
    question = _pronoun(rng, rng.choice(templates).format(n=n, m=m, t=t, a=a, b=b, c=rng.choice(words.CONTAINERS)), n)
    operation, check = WORKINGS[kind]
    value = apply(kind, a, b)
    return Problem(f"{a}{kind}{b}", vary(rng, question), f"{verb}: {operation(a, b)}", check(a, b), str(value),
                   f"The answer is {value}.", f"{a}{'//' if kind == '/' else kind}{b}")


def two_step_story(rng: random.Random) -> Problem:
    """A word problem of two steps."""
    n, t, c = words.name(rng), words.things(rng), rng.choice(words.CONTAINERS)
    first, second = rng.choice(("++", "+-", "-+", "*+", "*-"))
    a, b = (rng.randint(2, 9), number(rng, (1, 1, 2))) if first == "*" else (number(rng, (1, 2, 2)), number(rng, (1, 2)))
    if first == "-":
        a, b = max(a, b), min(a, b)
    middle = apply(first, a, b)
    d = rng.randint(0, min(middle, 99)) if second == "-" else number(rng, (1, 2))
    begin = {"+": ("{n} has {a} {t} and buys {b} more", "{n} finds {a} {t} and then {b} more", "{n} has {a} {t} and gets {b} more"),
             "-": ("{n} has {a} {t} and gives away {b}", "{n} has {a} {t} and loses {b}", "{n} has {a} {t} and sells {b}"),
             "*": ("{n} has {a} {c} with {b} {t} each", "{n} buys {a} {c} of {b} {t} each", "There are {a} {c} with {b} {t} each")}[first]
    end = {"+": ("Then {n} gets {d} more.", "{n} adds {d} more.", "Then {n} buys another {d}."),
           "-": ("Then {n} gives away {d}.", "{n} uses {d} of them.", "Then {n} loses {d}.")}[second]
    ask = rng.choice(("How many {t} does {n} have now?", "How many {t} are there now?",
                      "How many {t} are left?" if second == "-" else "How many {t} in total?"))
    question = _pronoun(rng, f"{rng.choice(begin)}. {rng.choice(end)} {ask}".format(n=n, t=t, c=c, a=a, b=b, d=d), n)
    value = apply(second, middle, d)
    working = f"First: {WORKINGS[first][0](a, b)}\nThen: {WORKINGS[second][0](middle, d)}"
    bracketed = f"{a}{first}{b}{second}{d}"
    return Problem(bracketed, vary(rng, question), working,
                   WORKINGS[second][1](middle, d),
                   str(value), f"The answer is {value}.", bracketed)


def _pronoun(rng: random.Random, question: str, name: str) -> str:
    """Sometimes ask about "he" or "she" where the question names the person again."""
    if rng.random() < 0.6:
        return question
    pronoun = rng.choice(("he", "she"))
    for verb in ("does", "did", "will"):
        question = question.replace(f"{verb} {name}", f"{verb} {pronoun}")
    return question.replace(f". {name} ", f". {pronoun.capitalize()} ").replace(f" Then {name} ", f" Then {pronoun} ")


WORKINGS: dict[str, tuple[Callable[[int, int], str], Callable[[int, int], str]]] = {
    "+": (arithmetic.add, arithmetic.check_sum), "-": (arithmetic.subtract, arithmetic.check_difference),
    "*": (arithmetic.multiply, arithmetic.check_product), "/": (arithmetic.divide, arithmetic.check_quotient)}


def apply(sign: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[sign]


FAMILIES: dict[str, tuple[float, Callable[[random.Random], Problem]]] = {  # name: (weight, generator)
    "addition": (4, addition), "subtraction": (4, subtraction), "multiplication": (4, multiplication), "division": (5, division),
    "sum_of_three": (1.5, sum_of_three), "mixed": (1.5, mixed), "multiple": (1, multiple), "unknown": (1, unknown),
    "comparison": (2, comparison), "sequence": (2, sequence), "story": (5, story), "two_step_story": (2.5, two_step_story)}
