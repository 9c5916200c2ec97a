"""The harmony format of gpt-oss: build messages, render conversations to ids, parse ids to messages, at once or as a stream.

A conversation is {"messages": [message, ...]} (or the list alone) in openai-harmony's JSON form: a message has `role`,
`content` (a string or a list of items of type text, system_content, developer_content) and, where they apply, `name`,
`channel`, `recipient`, `content_type`. The format is generic over the tokenizer, which must know the seven special tokens.

    <|start|>{role} to={recipient}<|channel|>{channel} {content type}<|message|>{content}<|end|>

Each piece of text is tokenized by itself, never together with its neighbour, and never read as special tokens. Rendering
equals openai-harmony 0.0.8; tools are written by `typescript`, parsing is in `parser`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gptoss_jax.text.parser import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    RETURN,
    ROLES,
    START,
    Event,
    HarmonyError,
    Messages,
    Skipped,
    SpecialToken,
    StreamParser,
    message,
    parse,
    special_ids,
)
from gptoss_jax.text.tokenizer import Tokenizer, TokenizerError
from gptoss_jax.text.typescript import BUILTIN_TOOLS, compact_json, tools_section

__all__ = [
    "Event",
    "HarmonyError",
    "Messages",
    "Skipped",
    "StreamParser",
    "developer_message",
    "drop_past_analysis",
    "message",
    "parse",
    "render",
    "render_with_mask",
    "system_message",
]

MODEL_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."


def system_message(
    *,
    reasoning_effort: str = "medium",
    current_date: str | None = None,
    knowledge_cutoff: str | None = "2024-06",
    model_identity: str | None = MODEL_IDENTITY,
    tools: Iterable[str] = (),
) -> dict:
    """Build the system message. tools: the built-in ones to offer, "browser" and "python"."""
    tools = list(tools)
    if unknown := [name for name in tools if name not in BUILTIN_TOOLS]:
        raise HarmonyError(f"built-in tool is {unknown[0]!r}; expected {' or '.join(BUILTIN_TOOLS)}")
    content = {
        "type": "system_content",
        "model_identity": model_identity,
        "reasoning_effort": reasoning_effort,
        "conversation_start_date": current_date,
        "knowledge_cutoff": knowledge_cutoff,
        "channel_config": {"valid_channels": ["analysis", "commentary", "final"], "channel_required": True},
        "tools": {name: BUILTIN_TOOLS[name] for name in tools},
    }
    return message("system", [content])


def developer_message(
    instructions: str | None = None,
    *,
    tools: Sequence[Mapping] = (),
    response_format: Mapping | None = None,
) -> dict:
    """Build the developer message.

    tools: functions as {"name", "description"?, "parameters"?: JSON schema}, or these under "function" as in OpenAI's API.
    response_format: {"name"?, "description"?, "schema"}, or these under "json_schema"; it ends the message.
    """
    functions = [tool.get("function", tool) if isinstance(tool, Mapping) else tool for tool in tools]
    for index, (tool, function) in enumerate(zip(tools, functions)):
        if not isinstance(function, Mapping):
            raise HarmonyError(f"tool {index}: is {tool!r:.80}; expected an object with name, description, parameters")
    functions = [{key: tool[key] for key in ("name", "description", "parameters") if key in tool} for tool in functions]
    namespaces = {"functions": {"name": "functions", "tools": functions}} if functions else {}
    ending = [] if response_format is None else [_response_format(response_format.get("json_schema", response_format))]
    items = []
    if instructions is not None and not functions:  # one piece of text, as the model knows it
        instructions, ending = "\n\n".join([instructions, *ending]), []
    if instructions is not None or functions:
        items.append({"type": "developer_content", "instructions": instructions, "tools": namespaces})
    items += [{"type": "text", "text": "\n\n" * len(items) + text} for text in ending]
    return message("developer", items)


def _response_format(form: Mapping) -> str:
    if not isinstance(form, Mapping) or "schema" not in form:
        raise HarmonyError(f"response_format is {form!r:.80}; expected an object with a schema")
    about = "".join(f"// {line}\n" for line in (_string(form, "description") or "").splitlines())
    try:
        return f"# Response Formats\n\n## {form.get('name') or 'response'}\n\n{about}{compact_json(form['schema'])}"
    except RecursionError:
        raise HarmonyError("response_format has a schema that is nested too deeply") from None


def render(
    conversation: Mapping | Sequence[Mapping],
    tokenizer: Tokenizer,
    *,
    next_role: str | None = None,
    training: bool = False,
) -> list[int]:
    """Render a conversation to ids.

    next_role: also open a message of that role, for the model to complete. training: end a last assistant message on the
    final channel with <|return|>, as the model has to. Raises HarmonyError naming the message and what is wrong with it.
    """
    return render_with_mask(conversation, tokenizer, next_role=next_role, training=training)[0]


def render_with_mask(
    conversation: Mapping | Sequence[Mapping],
    tokenizer: Tokenizer,
    *,
    next_role: str | None = None,
    training: bool = False,
) -> tuple[list[int], list[int]]:
    """Render as `render` does, and tell which ids the model has to produce by itself.

    The mask is 1 for the ids of assistant messages from the one after the role to the stop token, 0 for all others.
    """
    messages = _messages_of(conversation)
    special = special_ids(tokenizer)
    has_functions = any(map(_offers_functions, messages))
    ids: list[int] = []
    mask: list[int] = []
    for index, entry in enumerate(messages):
        try:
            author, rest = _pieces(entry, has_functions)
            if training and index == len(messages) - 1 and _is_final(entry):
                rest[-1] = RETURN
            for learnt, pieces in ((0, author), (int(entry["role"] == "assistant"), rest)):
                for piece in pieces:
                    new = [special[piece]] if isinstance(piece, SpecialToken) else tokenizer.encode(piece)
                    ids += new
                    mask += [learnt] * len(new)
        except (HarmonyError, TokenizerError) as error:
            raise HarmonyError(f"message {index}: {error}") from None
        except RecursionError:
            raise HarmonyError(f"message {index}: a tool's schema is nested too deeply") from None
    if next_role is not None:
        opening = [special[START], *tokenizer.encode(_role(next_role, "next_role"))]
        ids += opening
        mask += [0] * len(opening)
    return ids, mask


def drop_past_analysis(conversation: Mapping | Sequence[Mapping], *, while_at_work: bool = False) -> Mapping | Sequence[Mapping]:
    """Return the conversation without the analysis of finished turns: all that comes before the last final message.

    while_at_work: also where the assistant's last message is not on the final channel. The published chat template drops
    it then, too, and so do our prompts, or past reasoning would come back with each call of a tool; openai-harmony drops
    nothing then. It drops what comes before the first final message only; its own guide (openai/harmony: docs/format.md,
    "Handling reasoning output in subsequent sampling") drops that of every turn, and so does this. For an example whose
    last turn is to be learnt with its reasoning, apply it to the messages before that turn.
    """
    messages = _messages_of(conversation)
    spoken = [entry for entry in messages if entry.get("role") == "assistant"]
    if not spoken or not (while_at_work or _is_final(spoken[-1])):
        return conversation
    last = max((index for index, entry in enumerate(messages) if entry.get("channel") == "final"), default=-1)
    kept = [entry for index, entry in enumerate(messages) if index > last or entry.get("channel") != "analysis"]
    return {**conversation, "messages": kept} if isinstance(conversation, Mapping) else kept


def _messages_of(conversation: Any) -> Sequence[Mapping]:
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else conversation
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise HarmonyError(f"the conversation has {type(messages).__name__} for messages; expected a list")
    for index, entry in enumerate(messages):
        if not isinstance(entry, Mapping):
            raise HarmonyError(f"message {index}: is {type(entry).__name__}; expected an object with role and content")
    return messages


def _is_final(message: Mapping) -> bool:
    return message.get("role") == "assistant" and message.get("channel") == "final"


def _pieces(message: Mapping, has_functions: bool) -> tuple[list[str], list[str]]:
    """Return the pieces of a message up to its author, and those after it."""
    role = _role(message.get("role"), "role")
    name, recipient = _string(message, "name"), _string(message, "recipient")
    channel, content_type = _string(message, "channel"), _string(message, "content_type")
    if role == "tool" and name is None:
        raise HarmonyError("role is 'tool' without a name; expected the tool's name")
    author = [START, name] if role == "tool" else [START, role] + ([f":{name}"] if name is not None else [])
    rest: list[str] = []
    if recipient not in (None, "all"):
        rest.append(f" to={recipient}")
    if channel is not None:
        rest += [CHANNEL, channel]
    if content_type is not None and content_type.startswith(CONSTRAIN):
        rest += [" ", CONSTRAIN, content_type.removeprefix(CONSTRAIN)]
    elif content_type is not None:
        rest.append(f" {content_type}")
    stop = CALL if role == "assistant" and recipient is not None else END
    return author, [*rest, MESSAGE, *_contents(message, role, has_functions), stop]


def _contents(message: Mapping, role: str, has_functions: bool) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise HarmonyError(f"content is {type(content).__name__}; expected a string or a list of items")
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        match kind:
            case "text" if isinstance(item.get("text"), str):
                yield item["text"]
            case "system_content" if role == "system":
                yield _system_text(item, has_functions)
            case "developer_content" if role == "developer":
                yield _developer_text(item)
            case "text":
                raise HarmonyError(f"text of a content item is {item.get('text')!r:.80}; expected a string")
            case "system_content" | "developer_content":
                raise HarmonyError(f"{kind} in a message of role {role!r}; expected role {kind.split('_')[0]!r}")
            case _:
                raise HarmonyError(f"content item is {item!r:.80}; expected type text, system_content or developer_content")


def _system_text(content: Mapping, has_functions: bool) -> str:
    identity = [_string(content, "model_identity")]
    for key, label in (("knowledge_cutoff", "Knowledge cutoff"), ("conversation_start_date", "Current date")):
        if (value := _string(content, key)) is not None:
            identity.append(f"{label}: {value}")
    sections = ["\n".join(line for line in identity if line is not None)] if identity != [None] else []
    if (effort := _string(content, "reasoning_effort")) is not None:
        if effort.lower() not in ("low", "medium", "high"):
            raise HarmonyError(f"reasoning_effort is {effort!r}; expected low, medium or high")
        sections.append(f"Reasoning: {effort.lower()}")
    if tools := _namespaces(content):
        sections.append(tools_section(tools))
    if channels := _at(content, "channel_config", "valid_channels"):
        if not isinstance(channels, list) or not all(isinstance(channel, str) for channel in channels):
            raise HarmonyError(f"valid_channels is {channels!r:.80}; expected a list of strings")
        text = f"# Valid channels: {', '.join(channels)}."
        if content["channel_config"].get("channel_required"):
            text += " Channel must be included for every message."
        if has_functions:
            text += "\nCalls to these tools must go to the commentary channel: 'functions'."
        sections.append(text)
    return "\n\n".join(sections)


def _developer_text(content: Mapping) -> str:
    sections = []
    if (instructions := _string(content, "instructions")) is not None:
        sections += ["# Instructions", instructions]
    if tools := _namespaces(content):
        sections.append(tools_section(tools))
    return "\n\n".join(sections)


def _namespaces(content: Mapping) -> Mapping[str, Mapping]:
    """Return the tools of a content item by namespace, checked as far as their rendering needs."""
    namespaces = content.get("tools") or {}
    if not isinstance(namespaces, Mapping):
        raise HarmonyError(f"tools is {type(namespaces).__name__}; expected an object of namespaces")
    for key, namespace in namespaces.items():
        if not isinstance(namespace, Mapping) or not isinstance(namespace.get("tools"), list):
            raise HarmonyError(f"tools.{key} is {namespace!r:.80}; expected an object with name and a list of tools")
        for entry in (namespace, *namespace["tools"]):
            if not isinstance(entry, Mapping) or _string(entry, "name") is None:
                raise HarmonyError(f"tools.{key} has {entry!r:.80}; expected an object with a name")
            _string(entry, "description")
    return namespaces


def _offers_functions(message: Mapping) -> bool:
    content = message.get("content")
    items = content if isinstance(content, list) else []
    return any(_at(item, "type") == "developer_content" and _at(item, "tools", "functions", "tools") for item in items)


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _role(value: Any, what: str) -> str:
    if value not in ROLES:
        raise HarmonyError(f"{what} is {value!r}; expected one of {', '.join(ROLES)}")
    return value


def _string(entry: Mapping, key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise HarmonyError(f"{key} is {value!r:.80}; expected a string")
    return value
