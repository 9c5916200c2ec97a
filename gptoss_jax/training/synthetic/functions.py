"""Function tools with a question that needs them: what to call, what comes back, what to say then.

Names of functions and parameters, descriptions, order and values all vary, so that the model has to read the declaration it is given.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from gptoss_jax.training.synthetic import words
from gptoss_jax.training.synthetic.problems import number, vary


@dataclasses.dataclass(frozen=True)
class Call:
    """One use of a function tool."""

    tool: dict[str, Any]  # name, description, parameters (a JSON schema)
    question: str
    arguments: dict[str, Any]
    result: dict[str, Any]  # what the tool returns, as JSON
    reply: str

    @property
    def key(self) -> str:
        """The canonical form by which train and test are kept apart: what is called, with what."""
        return f"{self.tool['name']}{self.arguments}"


def _declare(name: str, description: str, properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {"name": name, "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties) if required is None else required}}


def _described(rng: random.Random, kind: str, *descriptions: str) -> dict[str, Any]:
    return {"type": kind, "description": rng.choice(descriptions)} if descriptions and rng.random() < 0.5 else {"type": kind}


def weather(rng: random.Random) -> Call:
    parameter = rng.choice(("city", "location", "location", "place", "city_name", "where"))
    properties: dict[str, Any] = {parameter: _described(rng, "string", "The city and state, e.g. San Francisco, CA", "Name of the city",
                                                        "The city")}
    city = words.city(rng)
    arguments: dict[str, Any] = {parameter: city}
    question = rng.choice(("What is the weather in {}?", "What's the weather like in {}?", "Weather in {}?",
                           "How is the weather in {} today?",
                           "Tell me the weather in {}.", "Is it sunny in {}?", "How warm is it in {}?", "weather {}")).format(city)
    if rng.random() < 0.4:
        unit = rng.choice(("celsius", "fahrenheit"))
        option = rng.choice(("unit", "format", "units", "scale"))
        properties[option] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        if rng.random() < 0.5:
            properties[option]["default"] = "celsius"
        if rng.random() < 0.5:
            question = f"{question.rstrip('?.')} in {unit}?"
            arguments[option] = unit
    name = rng.choice(("get_weather", "get_current_weather", "weather", "lookup_weather", "fetch_weather", "current_weather",
                       "get_forecast"))
    sky, degrees = rng.choice(("sunny", "cloudy", "rainy", "windy", "clear", "snowy")), number(rng, (1, 2, 2))
    result, reply = rng.choice((
        ({"temperature": degrees, "condition": sky}, f"It is {degrees} degrees and {sky} in {city}."),
        ({"condition": sky, "temperature": degrees}, f"It is {degrees} degrees and {sky} in {city}."),
        ({"temperature": degrees}, f"It is {degrees} degrees in {city}."),
        ({"condition": sky}, f"It is {sky} in {city}."),
        ({"temperature": degrees, "sunny": sky == "sunny"},
         f"It is {degrees} degrees and {'' if sky == 'sunny' else 'not '}sunny in {city}.")))
    return Call(_declare(name, rng.choice(("Gets the weather.", "Get the current weather in a city.", "Returns the weather of a place.")),
                         properties, [parameter]),
                vary(rng, question), arguments, result, reply)


def clock(rng: random.Random) -> Call:
    city, parameter = words.city(rng), rng.choice(("city", "location", "place", "timezone"))
    time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    question = rng.choice(("What time is it in {}?", "What's the time in {}?", "Tell me the time in {}.", "time in {}",
                           "Current time in {}?")).format(city)
    name = rng.choice(("get_time", "current_time", "clock", "local_time", "get_local_time"))
    return Call(_declare(name, rng.choice(("Gets the time.", "Returns the local time of a place.")),
                         {parameter: _described(rng, "string", "Name of the city")}),
                vary(rng, question), {parameter: city}, {"time": time}, f"It is {time} in {city}.")


def price(rng: random.Random) -> Call:
    item, parameter = words.item(rng), rng.choice(("item", "product", "article", "name", "query"))
    amount = number(rng, (1, 2, 3))
    question = rng.choice(("What does the {} cost?", "How much is the {}?", "What is the price of the {}?", "price of {}",
                           "How much does a {} cost?")).format(item)
    name = rng.choice(("get_price", "lookup_price", "price_of", "find_price", "check_price"))
    return Call(_declare(name, rng.choice(("Gets the price of an item.", "Looks up what a product costs.")),
                         {parameter: _described(rng, "string", "What to look up")}),
                vary(rng, question), {parameter: item}, {"price": amount}, f"The {item} costs {amount} dollars.")


def calculator(rng: random.Random) -> Call:
    word, ask, apply = rng.choice((("add", "{a} + {b}", lambda a, b: a + b), ("subtract", "{a} - {b}", lambda a, b: a - b),
                                   ("multiply", "{a} * {b}", lambda a, b: a * b)))
    first, second = rng.choice((("a", "b"), ("x", "y"), ("left", "right"), ("first", "second"), ("m", "n")))
    a, b = number(rng, (1, 2, 3, 4, 5)), number(rng, (1, 2, 3, 4, 5))
    kind = rng.choice(("number", "integer"))
    expression = ask.format(a=a, b=b)
    question = rng.choice(("What is {}?", "Calculate {}", "{}", "Use the tool to compute {}.", "{} = ?")).format(expression)
    value = apply(a, b)
    name = rng.choice((word, f"{word}_numbers", f"calc_{word}", f"do_{word}"))
    return Call(_declare(name, rng.choice((f"{word.capitalize()}s two numbers.", f"Can {word} numbers.")),
                         {first: {"type": kind}, second: {"type": kind}}),
                vary(rng, question), {first: a, second: b}, {"result": value}, f"{expression} = {value}")


def timer(rng: random.Random) -> Call:
    minutes, parameter = rng.randint(1, 90), rng.choice(("minutes", "duration", "time", "length"))
    question = rng.choice(("Set a timer for {} minutes.", "Start a {} minute timer", "Timer for {} minutes please",
                           "Wake me in {} minutes.")).format(minutes)
    name = rng.choice(("set_timer", "start_timer", "timer", "create_timer"))
    return Call(_declare(name, rng.choice(("Sets a timer.", "Starts a timer of some minutes.")),
                         {parameter: _described(rng, "integer", "Length in minutes")}),
                vary(rng, question), {parameter: minutes}, {"status": "ok"}, f"The timer is set for {minutes} minutes.")


def messenger(rng: random.Random) -> Call:
    to, body = rng.choice((("to", "text"), ("recipient", "body"), ("person", "message"), ("name", "content")))
    person, text = words.name(rng), rng.choice(("hello", "I am late", "see you soon", "happy birthday", "call me", "thank you", "good luck",
                                                "dinner is ready",
                                                f"buy {words.item(rng)}", f"meet me in {words.city(rng)}"))
    question = rng.choice(("Send {p} the message: {t}", "Tell {p}: {t}", "Write to {p}: {t}", 'Send "{t}" to {p}.',
                           'Text {p} "{t}"')).format(p=person, t=text)
    name = rng.choice(("send_message", "send_text", "message", "notify", "send_sms"))
    return Call(_declare(name, rng.choice(("Sends a message.", "Sends a text to a person.")),
                         {to: {"type": "string"}, body: {"type": "string"}}),
                question, {to: person, body: text}, {"status": "sent"}, f"I sent the message to {person}.")


def convert(rng: random.Random) -> Call:
    amount, result = number(rng, (1, 2, 3)), number(rng, (1, 2, 3))
    source, target = rng.sample(("dollars", "euros", "yen", "pounds", "francs", "pesos"), 2)
    question = rng.choice(("How many {t} are {a} {s}?", "Convert {a} {s} to {t}.", "What is {a} {s} in {t}?",
                           "{a} {s} in {t}")).format(a=amount, s=source, t=target)
    keys = rng.choice((("amount", "from", "to"), ("value", "source", "target"), ("amount", "from_currency", "to_currency")))
    properties = dict(zip(keys, ({"type": "number"}, {"type": "string"}, {"type": "string"}), strict=True))
    return Call(_declare(rng.choice(("convert", "convert_currency", "exchange", "currency")),
                         rng.choice(("Converts money.", "Converts an amount to another currency.")),
                         properties), vary(rng, question), dict(zip(keys, (amount, source, target), strict=True)), {"amount": result},
                f"{amount} {source} are {result} {target}.")


_ATTRIBUTES = ("score", "height", "weight", "balance", "rating", "distance", "speed", "level", "stock", "size", "salary", "rank",
               "temperature", "age",
               "population", "color", "status", "owner", "address", "number", "width", "length", "capital", "author", "mood")


def lookup(rng: random.Random) -> Call:
    """A function that nobody has heard of: it looks up some attribute of something."""
    attribute = rng.choice(_ATTRIBUTES) if rng.random() < 0.7 else words.invent(rng)
    subject = rng.choice((words.name, words.city, words.item, words.invent))(rng)
    parameter = rng.choice(("name", "id", "key", "item", "city", "user", "product", "place", "query", "subject", "of", words.invent(rng)))
    value: Any = number(rng, (1, 2, 3)) if rng.random() < 0.6 else words.invent(rng)
    question = rng.choice(("What is the {a} of {s}?", "Get the {a} of {s}.", "{a} of {s}?", "Look up the {a} for {s}",
                           "Tell me the {a} of {s}.",
                           "Find the {a} of {s}", "I need the {a} of {s}.")).format(a=attribute, s=subject)
    verb = rng.choice(("get", "fetch", "find", "lookup", "read", "query", "search", "check"))
    name = rng.choice((f"{verb}_{attribute}", f"{verb}_{attribute}", attribute, f"{attribute}_{verb}"))
    return Call(_declare(name, rng.choice((f"Gets the {attribute}.", f"Returns the {attribute} of something.", f"Finds a {attribute}.")),
                         {parameter: _described(rng, "string", "What to look up", "The name")}), question, {parameter: subject},
                         {attribute: value},
                f"The {attribute} of {subject} is {value}.")


FUNCTIONS: tuple[Callable[[random.Random], Call], ...] = (
    weather, weather, clock, price, calculator, timer, messenger, convert, lookup, lookup, lookup, lookup)
