"""Seeded conversations in harmony form: what the embedded checkpoint is trained on.

`conversation(seed, index, split)` is a pure function: the same arguments give the same conversation on every machine. Nothing is read
from disk. `problems` holds the arithmetic, `functions` the tools, `structured` the response formats, `chat` the small talk.
"""

from gptoss_jax.training.synthetic.conversations import SKILLS, Sample, conversation, is_held_out, problem_prompt

__all__ = ["SKILLS", "Sample", "conversation", "is_held_out", "problem_prompt"]
