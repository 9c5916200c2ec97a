"""Worked arithmetic as text: the column methods of a primary school, written so that a small model can follow every step.

Each function returns the working of one operation on non-negative integers; the last line of a working is the equation itself
("47+85=132"), so that workings can be chained. An operation between single digits is a fact and its working is only the equation.
"""

from __future__ import annotations

_PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands")


def add(a: int, b: int) -> str:
    """Return the working of a + b, column by column from the ones: "tens: 4+8+1=13" adds two digits and the carry."""
    equation = f"{a}+{b}={a + b}"
    if a < 10 and b < 10:
        return equation
    lines, carry = [f"{a}+{b}"], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = _digit(a, place), _digit(b, place)
        total = x + y + carry
        lines.append(f"{_PLACES[place]}: {x}+{y}+{carry}={total}" if carry else f"{_PLACES[place]}: {x}+{y}={total}")
        carry = total // 10
    return "\n".join([*lines, equation])


def subtract(a: int, b: int) -> str:
    """Return the working of a - b, column by column from the ones: "tens: 13-1-8=4" takes what was borrowed, then the digit.

    A negative result is turned round first.
    """
    equation = f"{a}-{b}={a - b}"
    if a < b:
        return f"{a} is less than {b}\n{subtract(b, a)}\n{equation}"
    if a < 10:
        return equation
    lines, borrow = [f"{a}-{b}"], 0
    for place in range(len(str(a))):
        x, y = _digit(a, place), _digit(b, place)
        x += 10 * (x < y + borrow)
        lines.append(f"{_PLACES[place]}: {x}-{borrow}-{y}={x - borrow - y}" if borrow else f"{_PLACES[place]}: {x}-{y}={x - y}")
        borrow = int(x >= 10)
    return "\n".join([*lines, equation])


def multiply(a: int, b: int) -> str:
    """Return the working of a * b: columns for a one-digit factor, partial products and their sum otherwise."""
    equation = f"{a}*{b}={a * b}"
    if a < 10 and b < 10:
        return equation
    if a < 10 or len(str(b)) > len(str(a)):
        return f"{a}*{b}={b}*{a}\n{multiply(b, a)}\n{equation}"
    if b < 10:
        return _times_digit(a, b)
    lines, total = [], 0
    for place in range(len(str(b))):
        digit, power = _digit(b, place), 10**place
        if not digit:
            continue
        lines.append(_times_digit(a, digit) if digit > 1 else f"{a}*1={a}")
        if place:
            lines.append(f"{a}*{digit * power}={a * digit * power}")
        if total:
            lines.append(add(total, a * digit * power))
        total += a * digit * power
    return "\n".join([*lines, equation])


def divide(a: int, b: int) -> str:
    """Return the working of a / b for a one- or two-digit b: long division, with the remainder if there is one."""
    quotient, remainder = divmod(a, b)
    equation = f"{a}/{b}={quotient}" + (f" remainder {remainder}" if remainder else "")
    lines, rest = [], 0
    for place in reversed(range(len(str(a)))):
        rest = rest * 10 + _digit(a, place)
        if rest < b and not lines and place:
            continue  # no leading zeros
        lines.append(f"{rest // b}*{b}={rest // b * b}, {rest}/{b}={rest // b}, left {rest % b}")
        rest %= b
    return "\n".join([f"{a}/{b}", *lines, equation])


def compare(a: int, b: int) -> str:
    """Return the working that finds the larger of two different numbers: by length, then at the first digit that differs."""
    larger = max(a, b)
    if len(str(a)) != len(str(b)):
        return f"{a} has {_digits(a)}, {b} has {_digits(b)}\n{larger} is larger"
    lines = [f"{a} and {b} have {_digits(a)}"]
    for x, y in zip(str(a), str(b), strict=True):
        lines.append(f"{x}={y}" if x == y else f"{x}>{y}" if x > y else f"{x}<{y}")
        if x != y:
            break
    return "\n".join([*lines, f"{larger} is larger"])


def brief(working: str) -> str:
    """Return a working on one line: its steps without their places, and without the last equation, which the reply states."""
    steps = [line.split(": ")[-1] for line in working.splitlines() if any(sign in line for sign in "=<>")]
    return "; ".join(steps if "larger" in working else steps[:-1])


def check_sum(a: int, b: int) -> str:
    """Return a check of a + b by the inverse operation."""
    return f"Check: {subtract(a + b, b)}, correct"


def check_difference(a: int, b: int) -> str:
    """Return a check of a - b by the inverse operation."""
    return f"Check: {add(a - b, b) if a >= b else add(b - a, a)}, correct"


def check_product(a: int, b: int) -> str:
    """Return a check of a * b: by division if a factor has one digit, by the last digit otherwise."""
    if a < 10 or b < 10:
        many, one = max(a, b), min(a, b)
        return f"Check: {divide(many * one, one) if one else f'{many}*0=0'}, correct"
    x, y = a % 10, b % 10
    return f"Check: {x}*{y}={x * y} ends in {x * y % 10}, {a * b} ends in {a * b % 10}, correct"


def check_quotient(a: int, b: int) -> str:
    """Return a check of a / b by multiplication, and addition of the remainder."""
    quotient, remainder = divmod(a, b)
    rest = f"\n{add(quotient * b, remainder)}" if remainder else ""
    return f"Check: {multiply(quotient, b)}{rest}, correct"


def _times_digit(a: int, digit: int) -> str:
    lines, carry = [f"{a}*{digit}"], 0
    for place in range(len(str(a))):
        product = _digit(a, place) * digit
        sum_with_carry = f"+{carry}={product}+{carry}={product + carry}" if carry else f"={product}"
        lines.append(f"{_PLACES[place]}: {_digit(a, place)}*{digit}{sum_with_carry}")
        carry = (product + carry) // 10
    return "\n".join([*lines, f"{a}*{digit}={a * digit}"])


def _digit(number: int, place: int) -> int:
    return number // 10**place % 10


def _digits(number: int) -> str:
    return "1 digit" if number < 10 else f"{len(str(number))} digits"
