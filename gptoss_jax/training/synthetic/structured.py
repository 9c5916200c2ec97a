"""Questions asked with a response format: the answer must be JSON that fits the schema."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from gptoss_jax.text.typescript import compact_json
from gptoss_jax.training.synthetic import words
from gptoss_jax.training.synthetic.problems import Problem, number, vary


def _object(rng: random.Random, properties: dict[str, str | dict[str, Any]]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": {key: {"type": kind} if isinstance(kind, str) else kind for key,
                                                               kind in properties.items()}}
    if rng.random() < 0.7:
        schema["required"] = list(properties)
    if rng.random() < 0.2:
        schema["additionalProperties"] = False
    return schema


def arithmetic_answer(rng: random.Random, problem: Problem) -> tuple[dict[str, Any], str]:
    """Return (schema, JSON answer) for a problem whose answer is an integer, under a property name of any kind."""
    key = rng.choice(("answer", "answer", "answer", "result", "value", "total", "number", "solution", "output", "sum", "x",
                      words.invent(rng)))
    kind = rng.choice(("integer", "integer", "number"))
    value = int(problem.answer)
    if rng.random() < 0.3:
        other = rng.choice(("expression", "calculation", "formula"))
        return _object(rng, {other: "string", key: kind}), compact_json({other: problem.code.replace("//", "/"), key: value})
    return _object(rng, {key: kind}), compact_json({key: value})


def person(rng: random.Random) -> tuple[str, dict[str, Any], str]:
    """Extraction: (what the user says, schema, JSON answer)."""
    facts = {"name": words.name(rng), "age": number(rng, (1, 2, 2)), "city": words.city(rng)}
    names = {"name": rng.choice(("name", "name", "person", "first_name")), "age": rng.choice(("age", "age", "years")),
             "city": rng.choice(("city", "city", "town", "location", "home"))}
    said = rng.choice(("{name} is {age} years old and lives in {city}.", "My name is {name}, I am {age} and I live in {city}.",
                       "{name} from {city} is {age}.", "I am {name}, {age} years old, from {city}", "{name}, {age}, {city}",
                       "In {city} lives {name}, who is {age}.", "Meet {name}. {name} is {age} and comes from {city}.")).format(**facts)
    wanted = rng.sample(list(facts), rng.choice((1, 2, 2, 3, 3)))
    if rng.random() < 0.6:
        wanted = [key for key in facts if key in wanted]
    kinds = {"name": "string", "age": "integer", "city": "string"}
    return said, _object(rng, {names[key]: kinds[key] for key in wanted}), compact_json({names[key]: facts[key] for key in wanted})


def shopping(rng: random.Random) -> tuple[str, dict[str, Any], str]:
    """A list: (what the user says, schema, JSON answer)."""
    items = [words.item(rng) for _ in range(rng.randint(1, 4))]
    listed = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    said = rng.choice(("I need {}", "Buy {}.", "We have to get {}.", "My list: {}", "Please order {}.", "Get {} from the shop",
                       "Add {} to my list.")).format(listed)
    key = rng.choice(("items", "items", "list", "products", "things", "entries", words.invent(rng)))
    return vary(rng, said) if said.islower() else said, _object(rng, {key: {"type": "array",
                                                                            "items": {"type": "string"}}}), compact_json({key: items})


def judgement(rng: random.Random) -> tuple[str, dict[str, Any], str]:
    """Yes or no: (what the user says, schema, JSON answer)."""
    a, b = number(rng, (1, 2, 2, 3)), number(rng, (1, 2, 2, 3))
    key = rng.choice(("answer", "correct", "result", "true", "is_true", words.invent(rng)))
    asked, holds = rng.choice((("Is {a} larger than {b}?", a > b), ("Is {a} less than {b}?", a < b), ("Is {a} bigger than {b}?", a > b),
                               ("{a} > {b}?", a > b),
                               ("Is {a} smaller than {b}?", a < b), ("Is {a} an even number?", a % 2 == 0), ("Is {a} odd?", a % 2 == 1)))
    return vary(rng, asked.format(a=a, b=b)), _object(rng, {key: "boolean"}), compact_json({key: holds})


EXTRACTIONS: tuple[tuple[str, Callable[[random.Random], tuple[str, dict[str, Any], str]]], ...] = (
    ("person", person), ("shopping", shopping), ("judgement", judgement))
