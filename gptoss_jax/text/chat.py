"""OpenAI-style chat messages as harmony messages: system and developer texts, tools, reasoning, tool calls and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.text.harmony import HarmonyError, developer_message, message, system_message
from gptoss_jax.text.typescript import compact_json

THINKING = ("thinking", "reasoning", "reasoning_content")  # where datasets and APIs put the reasoning of an assistant message


def from_chat(messages: Sequence[Mapping], *, tools: Sequence[Mapping] = (), reasoning_effort: str = "medium") -> list[dict]:
    """Return the messages of a chat in harmony's JSON form, with harmony's system message before them.

    messages: {"role", "content", "tool_calls"?, "tool_call_id"?, "name"?} as in OpenAI's chat completions API, an assistant's reasoning
    under one of THINKING. System and developer texts at the beginning become the instructions of the developer message, which also
    offers the tools. Reasoning goes to the analysis channel; text beside tool calls to the commentary channel, other text to the final
    one. gpt-oss makes one call at a time: of several calls in one message, each is followed by its result. What becomes of an assistant
    message of weight 0 (fine-tuning's: not to be learnt) keeps that weight.
    Raises HarmonyError naming the message and what is wrong with it.
    """
    lead = 0
    while lead < len(messages) and messages[lead].get("role") in ("system", "developer"):
        lead += 1
    instructions = [_text(entry, number) for number, entry in enumerate(messages[:lead])]
    result = [system_message(reasoning_effort=reasoning_effort)]
    if instructions or tools:
        result.append(developer_message("\n\n".join(map(str, instructions)) or None, tools=tools))
    number = lead
    while number < len(messages):
        entry, role = messages[number], messages[number].get("role")
        number += 1
        match role:
            case "user":
                result.append(message("user", _required_text(entry, number - 1)))
            case "system" | "developer":
                result.append(developer_message(_required_text(entry, number - 1)))
            case "assistant":
                end = number
                while end < len(messages) and messages[end].get("role") == "tool":
                    end += 1
                result += _assistant(entry, number - 1, messages[number:end])
                number = end
            case "tool":
                raise HarmonyError(f"message {number - 1}: role is 'tool' after no assistant message; expected it after tool_calls")
            case _:
                raise HarmonyError(f"message {number - 1}: role is {role!r}; expected system, developer, user, assistant or tool")
    return result


def _assistant(entry: Mapping, number: int, results: Sequence[Mapping]) -> list[dict]:
    thinking = next((entry[key] for key in THINKING if entry.get(key)), None)
    if thinking is not None and not isinstance(thinking, str):
        raise HarmonyError(f"message {number}: reasoning is {type(thinking).__name__}; expected a string")
    calls = entry.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise HarmonyError(f"message {number}: tool_calls is {type(calls).__name__}; expected a list")
    text = _text(entry, number)
    said = [message("assistant", thinking, channel="analysis")] if thinking else []
    if text is not None and (text or not (calls or thinking)):
        said.append(message("assistant", text, channel="commentary" if calls else "final"))
    waiting = list(enumerate(results, number + 1))
    for index, call in enumerate(calls):
        name, arguments = _call(call, number)
        said.append(message("assistant", arguments, channel="commentary", recipient=name, content_type="<|constrain|>json"))
        matching = [pair for pair in waiting if pair[1].get("tool_call_id") in (None, call.get("id"))]
        if matching:
            waiting.remove(matching[0])
            said.append(message("tool", _required_text(matching[0][1], matching[0][0]), name=name, channel="commentary",
                                recipient="assistant"))
        elif index + 1 < len(calls):
            raise HarmonyError(f"message {number}: call {index} of {len(calls)} has no result; expected one before the next call")
    if waiting:
        raise HarmonyError(f"message {waiting[0][0]}: role is 'tool', tool_call_id {waiting[0][1].get('tool_call_id')!r}; "
                           "expected the id of a call before it that has no result yet")
    if not said:
        raise HarmonyError(f"message {number}: an assistant message without content, reasoning and tool_calls; expected one of them")
    return [{**each, "weight": 0} for each in said] if entry.get("weight") == 0 else said


def _call(call: Any, number: int) -> tuple[str, str]:
    """Return (recipient, arguments as JSON) of a tool call."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else (None, None)
    if not isinstance(name, str) or not isinstance(arguments, str | Mapping):
        raise HarmonyError(f"message {number}: a tool call is {call!r:.80}; expected a function with name and arguments")
    return f"functions.{name.removeprefix('functions.')}", arguments if isinstance(arguments, str) else compact_json(dict(arguments))


def _required_text(entry: Mapping, number: int) -> str:
    text = _text(entry, number)
    if text is None:
        raise HarmonyError(f"message {number}: content is missing; expected a string or a list of text parts")
    return text


def _text(entry: Mapping, number: int) -> str | None:
    """Return the text of a message, its parts joined."""
    content = entry.get("content")
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise HarmonyError(f"message {number}: a part of the content is {part!r:.80}; expected type text")
    return "".join(part["text"] for part in parts)
