"""Parse harmony ids into messages: whole sequences (`parse`) or id by id (`StreamParser`).

With strict=True the parser equals openai-harmony 0.0.8, ids of no token aside: the same messages, and a HarmonyError where
the library refuses. Without it the parser is total: it equals the library's `strict=False` where that gives a sensible
result, mends what the model got wrong, starts anew at every <|start|>, and lists in `skipped` the text that fits no
message. None is lost.

| ids                                      | openai-harmony 0.0.8                | here                                          |
| ---------------------------------------- | ----------------------------------- | --------------------------------------------- |
| an id of no token, in content            | swallows the rest of the message    | U+FFFD for that id, strict or not             |
| an id of no token, in a header           | refuses                             | strict refuses; else skipped                  |
| <|start|> inside a header or content     | text of the recipient or content    | strict: the same; else it starts a message    |
| a second channel in a header             | becomes the recipient               | strict: the same; else skipped, the first one |
|                                          |                                     | counts: reasoning must not turn into answers  |
| <|constrain|>json alone in a header      | becomes the recipient               | strict: the same; else the content type       |
| <|constrain|> json, with a space         | refuses, or makes one the recipient | strict: the same; else the content type       |
| another special token in a header        | becomes the recipient               | strict: the same; else skipped                |
| a named user; a tool without recipient   | refuses                             | strict refuses; else the user, the tool       |
| no role, no channel name, too many words | refuses                             | strict refuses; else the caller's role, no    |
|                                          |                                     | channel, the words skipped                    |
| text between messages; a cut header      | refuses                             | strict refuses; else skipped                  |
| text without <|message|> up to a stop    | strict=False: content, white space  | content as written, after a role known        |
|                                          | run together                        | beforehand; else skipped                      |
"""

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass

from gptoss_jax.text.tokenizer import HARMONY_TOKENS, Tokenizer

ROLES = ("user", "assistant", "system", "developer", "tool")
UNKNOWN = b"\xff"  # never part of UTF-8: decodes to one U+FFFD
LONGEST_BACKLOG = 256  # bytes, twice the longest token: a step stays short whatever comes


class HarmonyError(ValueError):
    """A conversation that can't be rendered, or ids that the strict parser refuses."""


class SpecialToken(str):
    """The name of a special token, as opposed to text that looks like it."""


START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL = map(SpecialToken, HARMONY_TOKENS)

# White space as Rust has it: Python's str methods and \s also take U+001C to U+001F.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
_WORD = re.compile(r"[^ \t\n\f\r]+")
_CHANNEL = re.compile(re.escape(CHANNEL) + f"([^{_SPACE}<]*)")
_CONSTRAIN_ALONE = re.compile(re.escape(CONSTRAIN) + r"[ \t\n\f\r]+")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the seven harmony tokens; HarmonyError names those that the tokenizer lacks."""
    if missing := [name for name in HARMONY_TOKENS if name not in tokenizer.special]:
        raise HarmonyError(f"the tokenizer lacks {', '.join(missing)}; expected the harmony special tokens")
    return {name: tokenizer.special[name] for name in HARMONY_TOKENS}


def message(
    role: str,
    content: str | list[dict],
    *,
    name: str | None = None,
    channel: str | None = None,
    recipient: str | None = None,
    content_type: str | None = None,
) -> dict:
    """Build a message in the JSON form of openai-harmony, as `parse` returns it."""
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    optional = {"channel": channel, "recipient": recipient, "content_type": content_type}
    return {"role": role, "name": name, "content": items} | {k: v for k, v in optional.items() if v is not None}


@dataclass(frozen=True)
class Header:
    """What stands between <|start|> and <|message|>."""

    role: str | None = None
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class Skipped:
    """Material that became part of no message: its text, special tokens spelled out, and why it was skipped.

    position: index of the id in the input at which this was decided, for a run of ids that of its first.
    """

    position: int
    text: str
    reason: str


@dataclass(slots=True)
class Event:
    """One thing that an id brought about.

    kind "start": the header is complete. "text": `delta` was added to the content. "end": the message is complete, in
    `message`. "skipped": see `skipped`. For the first three, header tells role, name, channel, recipient, content_type.
    """

    kind: str
    header: Header = Header()
    delta: str = ""
    message: dict | None = None
    skipped: Skipped | None = None

    @property
    def role(self) -> str | None:
        return self.header.role

    @property
    def channel(self) -> str | None:
        return self.header.channel

    @property
    def recipient(self) -> str | None:
        return self.header.recipient

    @property
    def content_type(self) -> str | None:
        return self.header.content_type


class Messages(list):
    """Messages in the JSON form, and in `skipped` what became part of none of them."""

    def __init__(self, messages: Iterable[dict] = (), skipped: Iterable[Skipped] = ()):
        super().__init__(messages)
        self.skipped = list(skipped)


def parse(ids: Iterable[int], tokenizer: Tokenizer, *, role: str | None = "assistant", strict: bool = False) -> Messages:
    """Parse ids into messages in the JSON form.

    role: that of the message which the ids continue (they follow <|start|>assistant); None where they begin with <|start|>.
    strict: raise HarmonyError where openai-harmony does. Otherwise never fail: see `Messages.skipped` and the module.
    """
    parser = StreamParser(tokenizer, role, strict=strict)
    for id in ids:
        parser.feed(id)
    parser.finish()
    return Messages(parser.messages, parser.skipped)


class StreamParser:
    """Parse id by id: `feed` returns the events of one id, `finish` those of the end of input.

    messages, skipped: what is complete so far. state: "start" (between messages), "header" or "content". header: that of
    the message whose content is being read. Where content is invalid UTF-8, each id brings at most one U+FFFD and what follows
    waits for the next id (as in openai-harmony); a character cut between ids always waits for its last byte.
    """

    def __init__(self, tokenizer: Tokenizer, role: str | None = "assistant", *, strict: bool = False):
        """role, strict: as for `parse`."""
        if role is not None and role not in ROLES:
            raise HarmonyError(f"role is {role!r}; expected one of {', '.join(ROLES)}, or None")
        special = special_ids(tokenizer)
        self._spelled = tokenizer.spelled
        self._start, self._message = special[START], special[MESSAGE]
        self._stops = frozenset(special[name] for name in (END, RETURN, CALL))
        self._strict = strict
        self._default_role = role or "assistant"
        self._position = 0
        self._events: list[Event] = []
        self.messages: list[dict] = []
        self.skipped: list[Skipped] = []
        self._open(None if role is None else "header", role)

    def feed(self, id: int) -> list[Event]:
        """Take one id; return the events it brought about. Raises HarmonyError only if strict."""
        self._events = []
        id = operator.index(id)
        if self.state == "content":
            self._content(id)
        elif self.state == "header":
            self._header(id)
        elif id == self._start:
            self._skip_collected("text outside a message")
            self._open("header")
        elif self._strict:
            raise HarmonyError(f"id {id} at index {self._position} is not {START}; expected the start of a message")
        else:
            self._collected.append(id)
        self._position += 1
        return self._events

    def finish(self) -> list[Event]:
        """Take the end of input: complete a message that lacks its stop token. Raises HarmonyError only if strict."""
        self._events = []
        if self.state == "content":
            self._end_message()
        elif self.state == "header" and self._strict:
            raise HarmonyError(f"the input ends at index {self._position} inside a header; expected {MESSAGE}")
        self._skip_collected("a header without an end" if self.state == "header" else "text outside a message")
        self._open("start")
        return self._events

    def _open(self, state: str | None, role: str | None = None) -> None:
        self.state = state or "start"
        self.header = Header()
        self._role = role  # of the message whose header is being read, if it is known beforehand
        self._collected: list[int] = []  # ids of a header, or between messages
        self._deltas: list[str] = []
        self._bytes = b""  # of content, not decodable yet

    def _content(self, id: int) -> None:
        if id in self._stops:
            self._end_message()
        elif id == self._start and not self._strict:
            self._end_message()
            self._open("header")
        else:
            self._add_text(self._decode(self._spelled(id) or UNKNOWN))

    def _decode(self, data: bytes) -> str:
        """Decode what is complete. After an invalid byte the rest waits for the next id, unless it is long."""
        self._bytes += data
        text = ""
        while True:
            try:
                text, self._bytes = text + self._bytes.decode(), b""
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode()
                if error.reason == "unexpected end of data":
                    self._bytes = self._bytes[error.start :]
                else:
                    text += "\ufffd"
                    self._bytes = self._bytes[error.end :]
                    if len(self._bytes) > LONGEST_BACKLOG:
                        continue
            return text

    def _add_text(self, text: str) -> None:
        if text:
            self._deltas.append(text)
            self._events.append(Event("text", self.header, text))

    def _end_message(self) -> None:
        self._add_text(self._bytes.decode(errors="replace"))
        header = self.header
        fields = {"channel": header.channel, "recipient": header.recipient, "content_type": header.content_type}
        self.messages.append(message(header.role, "".join(self._deltas), name=header.name, **fields))
        self._events.append(Event("end", header, message=self.messages[-1]))
        self._open("start")

    def _start_message(self, header: Header) -> None:
        self._open("content")
        self.header = header
        self._events.append(Event("start", header))

    def _header(self, id: int) -> None:
        if id == self._message:
            self._start_message(self._read_header())
        elif self._strict or (id != self._start and id not in self._stops):
            self._collected.append(id)
        elif id == self._start:
            self._skip_collected("a header without an end")
            self._open("header")
        else:
            self._end_without_message_token()

    def _end_without_message_token(self) -> None:
        """A stop token inside a header: text after a known role is the content, as in openai-harmony."""
        if self._role is None:
            self._skip_collected("a header without an end")
        elif self._collected:
            channel, text = self._take_channel(self._header_text())
            words = _WORD.match(text)
            if words and words[0] == self._role:
                text = text[words.end() :].lstrip(_SPACE)
            self._start_message(Header(self._role, channel=channel))
            self._add_text(text)
            self._end_message()
        self._open("start")

    def _skip_collected(self, reason: str) -> None:
        if self._collected:
            text = b"".join(self._spelled(id) or UNKNOWN for id in self._collected).decode(errors="replace")
            self._skip(text, reason, self._position - len(self._collected))
            self._collected = []

    def _complain(self, text: str, reason: str) -> None:
        if self._strict:
            raise HarmonyError(f"header before index {self._position} has {reason}: {text!r}")
        self._skip(text, reason, self._position)

    def _skip(self, text: str, reason: str, position: int) -> None:
        self.skipped.append(Skipped(position, text, reason))
        self._events.append(Event("skipped", skipped=self.skipped[-1]))

    # Headers: as parse_header_from_string in openai/harmony: src/encoding.rs, and amends where not strict.

    def _header_text(self) -> str:
        data = b"".join(self._spelled(id) or UNKNOWN for id in self._collected)
        try:
            return data.decode()
        except UnicodeDecodeError:
            text = data.decode(errors="replace")
            if self._strict:
                raise HarmonyError(f"header before index {self._position} is not UTF-8: {text!r}") from None
            return text

    def _take_channel(self, text: str) -> tuple[str | None, str]:
        """Cut the channel out of a header; return it and the rest."""
        channel, only = None, 1 if self._strict else 0
        for name in _CHANNEL.findall(text)[: only or None]:
            if not name:
                self._complain(CHANNEL, "no channel name")
            elif channel is None:
                channel = name
            else:
                self._complain(CHANNEL + name, "a second channel")
        return channel, _CHANNEL.sub("", text, count=only).strip(_SPACE).replace(CONSTRAIN, f" {CONSTRAIN}").strip(_SPACE)

    def _read_header(self) -> Header:
        channel, text = self._take_channel(self._header_text())
        if not self._strict:
            text = _CONSTRAIN_ALONE.sub(CONSTRAIN, text)
        words = _WORD.findall(text)
        role, name = (self._role, None) if self._role else self._take_author(words)
        if words and words[0] == role:
            del words[0]
        recipient, content_type = self._take_recipient(words) if self._strict else self._find_recipient(words)
        if words:
            self._complain(" ".join(words), "unexpected words")
        return Header(role, name, channel, recipient, content_type)

    def _take_author(self, words: list[str]) -> tuple[str, str | None]:
        """Take role and name from the words, but for a role's own word."""
        if not words:
            self._complain("", "no role")
            return self._default_role, None
        word = words[0]
        if word in ROLES:
            return word, word if word == "tool" else None
        if self._strict and len(words) == 1 and not word.startswith("to="):
            raise HarmonyError(f"header before index {self._position} has the role {word!r}; expected {', '.join(ROLES)}")
        del words[0]
        role, colon, name = word.partition(":")
        if colon and role in ROLES and not self._strict:
            return role, name
        return "tool", word

    @staticmethod
    def _take_recipient(words: list[str]) -> tuple[str | None, str | None]:
        """Take recipient and content type from the end of the words, by the library's rule."""
        if not words:
            return None, None
        last = words.pop()
        if last.startswith("to="):
            return last[3:], None
        if not words:
            return last, None
        return words.pop().removeprefix("to="), last

    @staticmethod
    def _find_recipient(words: list[str]) -> tuple[str | None, str | None]:
        """Take recipient and content type from the words by what they look like, leaving what can't be either."""
        odd = [word for word in words if "\ufffd" in word or ("<|" in word and not word.startswith(CONSTRAIN))]
        plain = [word for word in words if word not in odd]
        recipients = [word for word in plain if word.startswith("to=")]
        types = [word for word in plain if word.startswith(CONSTRAIN)]
        others = [word for word in plain if word not in recipients and word not in types]
        recipient = content_type = None
        if recipients:
            recipient = recipients.pop(0)[3:]
            content_type = types.pop(0) if types else others.pop() if others else None
        elif types:
            content_type = types.pop(0)
            recipient = others.pop() if others else None
        elif len(others) <= 2:
            recipient, content_type = StreamParser._take_recipient(others)
        words[:] = odd + recipients + types + others
        return recipient, content_type
