"""Train the SentencePiece vocabulary of the embedded checkpoint: `python -m gptoss_jax.training.vocabulary OUT.model`.

Harmony's special tokens are control symbols (no text can spell them), bytes are the fallback, nothing is normalised, and every digit is a
token of its own. What harmony writes into every prompt (the fixed sentences of the system and developer messages, the names of roles,
channels and efforts) is one token each, so that a prompt costs some twenty tokens and not some hundred.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from gptoss_jax.text.tokenizer import SPACE_MARK
from gptoss_jax.text.typescript import BUILTIN_TOOLS
from gptoss_jax.training import synthetic

# The order fixes the ids: 0 is SentencePiece's unknown, then these.
CONTROL = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>",
           "<|call|>")

BOILERPLATE = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06",
    "\nKnowledge cutoff: 2024-06",
    "\nCurrent date: 20",
    "\n\nReasoning: low", "\n\nReasoning: medium", "\n\nReasoning: high",
    "\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "\nCalls to these tools must go to the commentary channel: 'functions'.",
    f"\n\n# Tools\n\n## python\n\n{BUILTIN_TOOLS['python']['description']}",
    "# Instructions\n\n", "\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n",
    "# Tools\n\n## functions\n\nnamespace functions {\n\n",
    "} // namespace functions", " = (_: {\n", ",\n}) => any;\n\n", "?: string", ": string", ": number", "?: number", "\n// ", "// ",
    "type ",
    "# Response Formats\n\n## ", "\n\n# Response Formats\n\n## ", '{"type":"object","properties":{"', '":{"type":"string"}',
    '":{"type":"integer"}', '":{"type":"number"}',
    '":{"type":"boolean"}', '":{"type":"array","items":{"type":"string"}}', '},"required":["', '"]}', ',"additionalProperties":false}',
    '","',
    "system", "developer", "user", "assistant", "analysis", "commentary", "final", "json", " code", " to=functions.", " to=python",
    " to=assistant", "functions.",
    "print(", "\nones: ", "\ntens: ", "\nhundreds: ", "\nthousands: ", "\nten thousands: ", ", left ", "; ", " remainder ", "\nCheck: ",
    ", correct",
    '{"', '":', '":"', '"}', ',"', '": "', '", "')


def corpus(samples: int, seed: int) -> Iterator[str]:
    """Yield the texts of the messages of so many training conversations."""
    for index in range(samples):
        for message in synthetic.conversation(seed, index).messages:
            content = message["content"]
            if isinstance(content, str):
                yield content
                continue
            for item in content:
                yield from (value for value in (item.get("text"), item.get("instructions")) if value)
                for tool in ((item.get("tools") or {}).get("functions") or {}).get("tools", ()):
                    yield tool["name"] + " " + (tool.get("description") or "")


def train(vocab_size: int, *, samples: int = 40_000, seed: int = 0) -> bytes:
    """Return a SentencePiece model (its serialised protocol buffer) trained on synthetic conversations."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(samples, seed), model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True,
        control_symbols=list(CONTROL), user_defined_symbols=[text.replace(" ", SPACE_MARK) for text in BOILERPLATE], unk_id=0, bos_id=-1,
        eos_id=-1, pad_id=-1,
        max_sentencepiece_length=12, num_threads=1, minloglevel=2)
    return model.getvalue()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.training.vocabulary", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="file to write, for example tokenizer.model")
    parser.add_argument("--vocab-size", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(train(arguments.vocab_size, seed=arguments.seed))
    print(f"{arguments.out}: {arguments.vocab_size} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
