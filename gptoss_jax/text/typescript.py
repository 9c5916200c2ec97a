"""Tools as the model was trained to see them: JSON schemas written as TypeScript types, and the two built-in tools.

The layout follows openai-harmony 0.0.8 to the letter (openai/harmony: src/encoding.rs, json_schema_to_typescript and
template_tools_section; src/chat.rs for the built-in tools), oddities included, since it is what the model knows: a
description's later lines get no `//` inside a type, a nested object closes at its inner indent, an array of an enum is
`"a" | "b"[]`, and anyOf, allOf, $ref and const are `any`.
"""

import json
from collections.abc import Mapping
from typing import Any

PYTHON_TOOL = {
    "name": "python",
    "description": (
        "Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. This tool"
        " should be used for internal reasoning, but not for code that is intended to be visible to the user (e.g. when"
        " creating plots, tables, or files).\n\nWhen you send a message containing Python code to python, it will be"
        " executed in a stateful Jupyter notebook environment. python will respond with the output of the execution or"
        " time out after 120.0 seconds. The drive at '/mnt/data' can be used to save and persist user files. Internet"
        " access for this session is UNKNOWN. Depends on the cluster."
    ),
    "tools": [],
}

_CURSOR = {"type": "number", "default": -1}

BROWSER_TOOL = {
    "name": "browser",
    "description": (
        "Tool for browsing.\n"
        "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
        "Cite information from the tool using the following format:\n"
        "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
        "Do not quote more than 10 words directly from the tool output.\n"
        "sources=web (default: web)"
    ),
    "tools": [
        {
            "name": "search",
            "description": "Searches for information related to `query` and displays `topn` results.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "topn": {"type": "number", "default": 10},
                    "source": {"type": "string"},
                },
                "required": ["query"],
            },
        },
        {
            "name": "open",
            "description": (
                "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing `num_lines`"
                " lines.\n"
                "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
                "If `cursor` is not provided, the most recent page is implied.\n"
                "If `id` is a string, it is treated as a fully qualified URL associated with `source`.\n"
                "If `loc` is not provided, the viewport will be positioned at the beginning of the document or centered on"
                " the most relevant passage, if available.\n"
                "Use this function without `id` to scroll to a new location of an opened page."
            ),
            "parameters": {
                "type": "object",
                "properties": {
                    "id": {"type": ["number", "string"], "default": -1},
                    "cursor": _CURSOR,
                    "loc": {"type": "number", "default": -1},
                    "num_lines": {"type": "number", "default": -1},
                    "view_source": {"type": "boolean", "default": False},
                    "source": {"type": "string"},
                },
            },
        },
        {
            "name": "find",
            "description": "Finds exact matches of `pattern` in the current page, or the page given by `cursor`.",
            "parameters": {
                "type": "object",
                "properties": {"pattern": {"type": "string"}, "cursor": _CURSOR},
                "required": ["pattern"],
            },
        },
    ],
}

BUILTIN_TOOLS = {"browser": BROWSER_TOOL, "python": PYTHON_TOOL}


def tools_section(namespaces: Mapping[str, Mapping]) -> str:
    """Write the `# Tools` section: namespaces in the order of their keys, tools and properties in their own."""
    return "\n\n".join(["# Tools", *(_namespace(namespaces[key]) for key in sorted(namespaces))])


def _namespace(namespace: Mapping) -> str:
    name, tools = namespace["name"], namespace["tools"]
    about = _lines(namespace.get("description") or "")
    if not tools:
        return "\n".join([f"## {name}\n", *about])
    parts = [f"## {name}\n", *_comments(about), f"namespace {name} {{\n"]
    for tool in tools:
        parameters = tool.get("parameters")
        argument = "" if parameters is None else f"_: {type_of(parameters)}"
        parts += _comments(_lines(tool.get("description") or ""))
        parts.append(f"type {tool['name']} = ({argument}) => any;\n")
    return "\n".join([*parts, f"}} // namespace {name}"])


def _lines(text: str) -> list[str]:
    *lines, last = text.split("\n")
    return [line.removesuffix("\r") for line in lines] + ([last] if last else [])


def _comments(lines: list[str], indent: str = "") -> list[str]:
    return [f"{indent}// {line}" for line in lines]


def type_of(schema: Any, indent: str = "") -> str:
    """Write a JSON schema as a TypeScript type; whatever has no such form is `any`."""
    schema = _object(schema)
    kind = schema.get("type")
    if isinstance(variants := schema.get("oneOf"), list):
        return "".join(f"\n{indent} | {_variant(variant, indent)}" for variant in variants)
    if isinstance(kind, list) and (names := [name for name in kind if isinstance(name, str)]):
        return " | ".join("number" if name == "integer" else name for name in names)
    match kind:
        case "object":
            return _object_type(schema, indent)
        case "string":
            choices = [f'"{value}"' for value in _list(schema.get("enum")) if isinstance(value, str)]
            return " | ".join(choices) or "string"
        case "number" | "integer":
            return "number"
        case "boolean":
            return "boolean"
        case "array":
            return f"{type_of(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return "any"


def _object_type(schema: dict, indent: str) -> str:
    lines = _comments(_text(schema, "description"), indent) + ["{"]
    required = [name for name in _list(schema.get("required")) if isinstance(name, str)]
    for name, value in _object(schema.get("properties")).items():
        lines += _property(name if name in required else f"{name}?", _object(value), indent)
    return "\n".join([*lines, f"{indent}}}"])


def _property(name: str, schema: dict, indent: str) -> list[str]:
    above = [line for title in _text(schema, "title") for line in (f"{indent}// {title}", f"{indent}//")]
    if "oneOf" not in schema:
        above += _comments(_text(schema, "description"), indent)
    if examples := _list(schema.get("examples")):
        shown = [f'- "{example}"' for example in examples if isinstance(example, str)]
        above += _comments(["Examples:", *shown], indent)
    if isinstance(schema.get("oneOf"), list):
        return above + _one_of_property(name, schema, indent)
    default = [] if "oneOf" in schema else _default(schema)
    return [*above, f"{indent}{name}: {_nullable_type(schema, indent + '    ')},{_trailing(default)}"]


def _one_of_property(name: str, schema: dict, indent: str) -> list[str]:
    """Write a property with variants: one line each, its own description above unless the first variant repeats it."""
    about, variants = _text(schema, "description"), schema["oneOf"]
    above = [] if variants and about == _text(_object(variants[0]), "description") else about
    lines = _comments(above + _default(schema), indent) + [f"{indent}{name}:"]
    for index, variant in enumerate(map(_object, variants)):
        said = _text(variant, "description")
        if said == about or (index == 0 and above):
            said = []
        lines.append(f"{indent} | {_nullable_type(variant, indent + '   ')}{_trailing(said + _default(variant))}")
    return [*lines, f"{indent},"]


def _variant(schema: Any, indent: str) -> str:
    schema = _object(schema)
    default = _default(schema)
    if default and _list(schema.get("enum")):
        default = [f"default: {compact_json(schema['default'])}"]
    return _nullable_type(schema, indent + "   ") + _trailing(_text(schema, "description") + default)


def _nullable_type(schema: dict, indent: str) -> str:
    text = type_of(schema, indent)
    return f"{text} | null" if schema.get("nullable") is True and "null" not in text else text


def _default(schema: dict) -> list[str]:
    """Return the comment on a default: strings raw, in quotes unless they are one of an enum."""
    if "default" not in schema:
        return []
    value = schema["default"]
    if not isinstance(value, str):
        return [f"default: {compact_json(value)}"]
    return [f"default: {value}" if _list(schema.get("enum")) else f'default: "{value}"']


def _trailing(comments: list[str]) -> str:
    return f" // {' '.join(comments)}" if comments else ""


def _text(schema: dict, key: str) -> list[str]:
    value = schema.get(key)
    return [value] if isinstance(value, str) else []


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _object(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def compact_json(value: Any) -> str:
    """Write JSON as Rust's serde_json does: no spaces, no escapes beyond those needed, its own form of numbers."""
    match value:
        case dict():
            return "{" + ",".join(f"{compact_json(str(key))}:{compact_json(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(compact_json, value)) + "]"
        case None | bool() | str():
            return json.dumps(value, ensure_ascii=False)
        case int() if -(2**63) <= value < 2**64:
            return str(value)
        case int() | float():
            digits, _, exponent = repr(float(value)).partition("e")
            if exponent == "-05":  # Python changes to an exponent below 1e-4, Rust below 1e-5
                sign = "-" if value < 0 else ""
                return f"{sign}0.0000{digits.lstrip('-').replace('.', '')}"
            return f"{digits}e{int(exponent)}" if exponent else digits
    raise TypeError(f"{value!r:.80} is not JSON")
