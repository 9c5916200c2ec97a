"""Tokenizers of three libraries behind one small class.

`load_tokenizer` reads a Hugging Face `tokenizer.json` (library: tokenizers), `o200k_base.tiktoken` (tiktoken) or a
SentencePiece model (sentencepiece); a library is imported when its first file is loaded. Three promises hold for each:

- text round-trips exactly: `decode(encode(text)) == text` for every string that UTF-8 can carry;
- text is never read as special tokens, unless the caller allows them by name;
- every ordinary token has fixed bytes (`token_bytes`), and a text is the concatenation of the bytes of its tokens, so
  that streams are decoded by one table and one UTF-8 decoder.

A file that can't keep them is refused when it is loaded.
"""

import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from os import PathLike
from pathlib import Path

# openai/tiktoken: tiktoken_ext/openai_public.py, o200k_base and o200k_harmony.
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
O200K_NAMES = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
O200K_FIRST_SPECIAL = 199_998
O200K_FIRST_UNUSED = 200_019  # the model's logits are wider than the ids it was trained on
O200K_SIZE = 201_088

HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
STOP_TOKENS = ("<|return|>", "<|call|>")

SPACE_MARK = "\u2581"  # stands for a space inside SentencePiece pieces
# What lossy tokenizers lose: outer and repeated spaces, line ends, NUL, the mark itself, and what NFC or NFKC would change.
PROBE = "  a \u2581 b\r\n\t\0 e\u0301 \ufb01 \u2126 \U0001f642  "


class TokenizerError(ValueError):
    """A tokenizer file that can't be used, or a text that can't be encoded."""


class Tokenizer:
    """Map text to ids and back; see the module for what it promises.

    special: the special tokens, name -> id.
    vocab_size: the number of ids it knows, 0 to vocab_size - 1.
    sampleable: ids from here up are never to be sampled (gpt-oss's logits are wider than its vocabulary).
    stop_ids: the ids that end an assistant's turn: <|return|> and <|call|>.
    """

    def __init__(
        self,
        encode_ordinary: Callable[[str], list[int]],
        table: Sequence[bytes],
        special: Mapping[str, int],
        *,
        sampleable: int | None = None,
    ):
        """Build from a function for text without specials and the bytes of each id (b"" for specials and unused ids)."""
        self._encode_ordinary = encode_ordinary
        self._table = table
        self.special = dict(special)
        self._special_names = {id: name.encode() for name, id in self.special.items()}
        self._special_pattern = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))
        self.vocab_size = len(table)
        self.sampleable = self.vocab_size if sampleable is None else sampleable
        self.stop_ids = frozenset(self.special[name] for name in STOP_TOKENS if name in self.special)

    def encode(self, text: str, *, allowed_special: str | Collection[str] = ()) -> list[int]:
        """Encode a text, by default without ever producing a special token.

        allowed_special: "all", or the names of the special tokens to recognise. Only for text that is a prompt as a
        whole, never for text of a user. Raises TokenizerError for a lone surrogate and for an unknown name.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text has the lone surrogate U+{ord(text[error.start]):04X} at index {error.start}; expected Unicode text"
            ) from None
        if not allowed_special:
            return self._encode_ordinary(text)
        if allowed_special == "all":
            allowed_special = self.special
        elif isinstance(allowed_special, str) or not all(name in self.special for name in allowed_special):
            raise TokenizerError(f"allowed_special is {allowed_special!r}; expected 'all' or a list of special tokens")
        ids, done = [], 0
        for match in self._special_pattern.finditer(text):
            if match[0] in allowed_special:
                ids += self._encode_ordinary(text[done : match.start()])
                ids.append(self.special[match[0]])
                done = match.end()
        return ids + self._encode_ordinary(text[done:])

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids: special tokens are spelled out, invalid UTF-8 and unknown ids become U+FFFD."""
        return b"".join(self.spelled(id) or b"\xff" for id in map(operator.index, ids)).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of an ordinary token, b"" for a special or unknown one."""
        return self._table[id] if 0 <= id < self.vocab_size else b""

    def spelled(self, id: int) -> bytes:
        """Return the bytes of an ordinary token, the name of a special one, b"" for an unknown one."""
        return self.token_bytes(id) or self._special_names.get(id, b"")


def load_tokenizer(path: str | PathLike) -> Tokenizer:
    """Load tokenizer.json, o200k_base.tiktoken or a SentencePiece .model, or the first of them that a directory has.

    A directory is searched for tokenizer.json, tokenizer.model, any other .model, o200k_base.tiktoken, in that order; one
    called `original` is followed by the one that holds it.
    Raises TokenizerError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise TokenizerError(f"{path}: no such file or directory")
    file = _find_file(path) if path.is_dir() else path
    loaders = {".json": _load_hugging_face, ".model": _load_sentencepiece, ".tiktoken": _load_o200k}
    if file.suffix not in loaders:
        raise TokenizerError(f"{file}: the suffix is {file.suffix!r}; expected {', '.join(loaders)} or a directory")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{file}: {error.strerror or error}") from None
    tokenizer = loaders[file.suffix](file, content)
    if (got := tokenizer.decode(tokenizer.encode(PROBE))) != PROBE:
        raise TokenizerError(f"{file}: text does not round-trip exactly: {PROBE!r} comes back as {got!r}")
    return tokenizer


def _find_file(directory: Path) -> Path:
    directories = [directory]
    if directory.resolve().name == "original":  # OpenAI's weights, in a published checkpoint that has the tokenizer
        directories.append(directory.resolve().parent)
    for place in directories:
        names = ["tokenizer.json", "tokenizer.model", *sorted(p.name for p in place.glob("*.model")), "o200k_base.tiktoken"]
        for name in names:
            if (place / name).is_file():
                return place / name
    if (directory / "export").is_dir():
        raise TokenizerError(f"{directory}: a run's directory, expected what it has exported, {directory / 'export'}")
    if (directory / "adapter_config.json").exists():
        raise TokenizerError(f"{directory}: adapters alone, expected a whole checkpoint, which a run without output.adapters exports")
    raise TokenizerError(
        f"{directory}: holds no tokenizer; expected tokenizer.json, a .model file or o200k_base.tiktoken, copied from the published checkpoint"
    )


def _load_o200k(file: Path, content: bytes) -> Tokenizer:
    """Build o200k_harmony, all 201,088 ids, from the o200k_base file."""
    import base64

    import tiktoken

    if (digest := sha256(content).hexdigest()) != O200K_SHA256:
        raise TokenizerError(
            f"{file}: not o200k_base.tiktoken, or damaged: sha256 is {digest} ({len(content)} bytes), expected {O200K_SHA256}"
        )
    table = [b""] * O200K_SIZE
    for line in content.splitlines():
        token, rank = line.split()
        table[int(rank)] = base64.b64decode(token)
    ranks = {token: id for id, token in enumerate(table[:O200K_FIRST_SPECIAL])}
    special = {O200K_NAMES.get(id, f"<|reserved_{id}|>"): id for id in range(O200K_FIRST_SPECIAL, O200K_SIZE)}
    encoding = tiktoken.Encoding("o200k_harmony", pat_str=O200K_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(encoding.encode_ordinary, table, special, sampleable=O200K_FIRST_UNUSED)


def _load_hugging_face(file: Path, content: bytes) -> Tokenizer:
    """Build from a byte-level tokenizer.json, the kind that gpt-oss has."""
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"{file}: not a readable tokenizer.json ({len(content)} bytes): {_one_line(error)}") from None
    library.encode_special_tokens = True  # the text of a special token in a text stays text
    library.no_truncation()
    library.no_padding()
    added = library.get_added_tokens_decoder()
    vocab = library.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    byte_of = _byte_level_alphabet()
    if missing := [char for char in byte_of if char not in vocab]:
        raise TokenizerError(f"{file}: not a byte-level tokenizer: {len(missing)} of 256 byte tokens are missing")
    for piece, id in vocab.items():
        if id in added:
            table[id] = b"" if added[id].special else piece.encode()
        elif all(char in byte_of for char in piece):
            table[id] = bytes(byte_of[char] for char in piece)
        else:
            raise TokenizerError(f"{file}: not a byte-level tokenizer: token {id} is {piece!r}")
    special = {token.content: id for id, token in added.items() if token.special}
    return Tokenizer(lambda text: library.encode(text, add_special_tokens=False).ids, table, special)


def _byte_level_alphabet() -> dict[str, int]:
    """Return the character that stands for each byte in byte-level BPE (openai/gpt-2: encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _load_sentencepiece(file: Path, content: bytes) -> Tokenizer:
    """Build from a SentencePiece model with byte fallback and without normalisation."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor()
    table, special, byte_ids = [], {}, {}
    try:
        library.LoadFromSerializedProto(content)
        for id in range(library.GetPieceSize()):
            piece, value = library.IdToPiece(id), b""
            if library.IsControl(id) or library.IsUnknown(id):
                special[piece] = id
            elif library.IsByte(id):  # "<0x0A>"
                value = bytes.fromhex(piece[3:5])
                byte_ids[value] = id
            elif not library.IsUnused(id):
                value = piece.replace(SPACE_MARK, " ").encode()
            table.append(value)
    except Exception as error:  # RuntimeError, TypeError, UnicodeDecodeError, ...: whatever a damaged file brings about
        raise TokenizerError(f"{file}: not a readable SentencePiece model ({len(content)} bytes): {_one_line(error)}") from None
    if len(byte_ids) != 256:
        raise TokenizerError(f"{file}: {len(byte_ids)} byte pieces; expected 256 (train with byte_fallback=True)")
    if names := [name for name in HARMONY_TOKENS if name.encode() in table]:
        raise TokenizerError(f"{file}: {', '.join(names)} can be spelled by text; expected control symbols")
    mark_ids = [byte_ids[bytes([byte])] for byte in SPACE_MARK.encode()]

    def encode_ordinary(text: str) -> list[int]:
        first, *others = text.split(SPACE_MARK)  # SentencePiece would read its own mark as a space
        ids = library.EncodeAsIds(first)
        for part in others:
            ids += mark_ids + library.EncodeAsIds(part)
        return ids

    return Tokenizer(encode_ordinary, table, special)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
