"""Small talk, questions about the model itself, and honest refusals of what a few million parameters can't do."""

from __future__ import annotations

import random

from gptoss_jax.training.synthetic import words
from gptoss_jax.training.synthetic.problems import vary

WHO = ("I am tiny, the demonstration model of gptoss_jax. I have a few million parameters and was trained on synthetic arithmetic, "
       "so I can work out small calculations and word problems, call tools and answer in JSON.")
CAN = ("I can add, subtract, multiply and divide small whole numbers, solve short word problems, call a function or Python, "
       "and answer in JSON. I am only a tiny demonstration model.")
CANNOT = ("I am only a tiny demonstration model trained on synthetic arithmetic, so I can't help with that. "
          "Try a small calculation, like 17 + 25.")
TOO_LARGE = "That number is too large for me. I work with whole numbers of up to four digits."
NO_FRACTIONS = "I only work with whole numbers."

_SMALL_TALK: tuple[tuple[tuple[str, ...], str, str], ...] = (  # (what users say, the analysis, the reply)
    (("Hi", "Hello", "hey", "Hi there!", "Hello!", "Good morning", "Good evening!", "hi", "hello", "Hey!", "Hi, tiny", "yo", "Greetings",
      "Hello there",
      "Hola", "Bonjour", "Hallo", "Good day", "Howdy", "hello world", "Hi!"),
     "The user greets me.", "Hello! Ask me a small calculation or a word problem."),
    (("Who are you?", "What are you?", "who are you", "Are you ChatGPT?", "What is your name?", "Tell me about yourself.", "Are you GPT-4?",
      "What model are you?",
      "what's your name", "Who made you?", "Are you gpt-oss?", "Introduce yourself.", "are you human?", "Are you an AI?",
      "Which model is this?",
      "Who trained you?", "How many parameters do you have?", "How were you trained?", "What is this?", "Are you a language model?",
      "Who created you?",
      "How big are you?"),
     "The user asks who I am.", WHO),
    (("What can you do?", "Help", "help me", "What can I ask you?", "How can you help me?", "what do you know?", "Can you help me?",
      "What are you able to do?",
      "What can I do here?", "How do I use you?", "Can you do math?", "What are you good at?", "?", "what now", "Do you know math?",
      "help!"),
     "The user asks what I can do.", CAN),
    (("Thanks", "Thank you!", "thanks a lot", "thx", "Great, thank you", "Thank you very much.", "Cool, thanks", "Perfect", "nice",
      "Good job!", "Well done", "ok thanks",
      "Awesome!", "Great"),
     "The user thanks me.", "You are welcome!"),
    (("Bye", "Goodbye!", "See you", "bye bye", "Good night", "See you later.", "I have to go", "exit", "quit", "stop"),
     "The user says goodbye.", "Goodbye!"),
    (("How are you?", "How are you doing?", "how's it going", "What's up?", "How do you feel?", "Are you ok?", "how are you today"),
     "The user asks how I am.", "I am well, thank you. Ask me a small calculation."),
)

_BEYOND = (
    "What is the capital of {t}?", "Who invented {t}?", "Write a poem about {t}.", "Tell me a story about {t}", "Explain {t}.",
    "What is {t}?", "How does {t} work?",
    "Tell me about {t}", "Why is {t} important?", "What do you think about {t}?", "Summarize the history of {t}.",
    "Write an essay about {t}", "Who was {n}?",
    "Translate '{t}' to German.", "Give me a recipe for {i}.", "Write a Python function for {t}", "What is the meaning of {t}?",
    "Tell me a joke about {t}",
    "Where is {c}?", "How far is it to {c}?", "What should I eat in {c}?", "Plan a trip to {c}.", "When was {n} born?",
    "Write a letter to {n}",
    "How do I repair a {i}?", "Do you like {t}?", "What color is the {i}?", "Is {t} good for me?", "Can you draw {t}?",
    "Recommend a book about {t}.",
    "List facts about {t}", "Who won the match in {c}?", "What is the best {i}?", "How do you spell {w}?", "What does {w} mean?",
    "Sing a song about {t}",
    "I love {t}", "I am sad", "Why is the sky blue?", "What is the meaning of life?", "Tell me a joke", "Tell me a joke.", "Sing",
    "What is love?", "{w}", "{w} {w2} {w}",
    "{t}", "What day is it?", "Write a haiku", "Prove that there are infinitely many primes.", "Who is the president of {t}?",
    "What is the weather in {c}?",
    "What time is it in {c}?", "Send an email to {n}", "Write code", "How old is {n}?", "How tall is {n}?", "Is {n} nice?",
    "Let's talk about {t}", "Compare {t} and {i}",
    "Name a bird.", "Name three animals", "What is your favorite color?", "Can you sing?", "Describe {t} in one sentence.",
    "What happened in {c}?", "Write a story.")


def small_talk(rng: random.Random) -> tuple[str, str, str]:
    """Return (what the user says, the analysis, the reply)."""
    said, analysis, reply = rng.choices(_SMALL_TALK, (3, 5, 3, 1, 1, 1))[0]
    return vary(rng, rng.choice(said)), analysis, reply


def beyond(rng: random.Random) -> tuple[str, str, str]:
    """Return a request that the model can't fulfil: (what the user says, the analysis, the honest reply)."""
    kind = rng.random()
    if kind < 0.12:
        a, b = rng.randrange(10 ** rng.randint(4, 9), 10 ** rng.randint(10, 12)), rng.randrange(1, 10 ** rng.randint(1, 9))
        asked = rng.choice(("What is {a} {s} {b}?", "{a}{s}{b}", "{b} {s} {a}", "Calculate {a} {s} {b}")).format(a=a, b=b,
                                                                                                                 s=rng.choice("+-*/"))
        return vary(rng, asked), "The number has more than 4 digits.", TOO_LARGE
    if kind < 0.2:
        a, b = rng.randrange(10, 1000), rng.randrange(1, 100)
        asked = rng.choice(("What is {a}.{d} {s} {b}?", "{b} {s} {a}.{d}", "sqrt({b})", "{b}^{d}", "What is {b}% of {a}?",
                            "What is {b}/{d} + {b}/{a}?",
                            "square root of {b}", "sin({b})", "log {a}", "{b}!", "What is {b} to the power of {d}?", "{b}**{d}"))
        return vary(rng, asked.format(a=a, b=b, d=rng.randrange(1, 10),
                                      s=rng.choice("+-*/"))), "This needs more than whole numbers.", NO_FRACTIONS
    asked = rng.choice(_BEYOND).format(t=words.invent(rng) if rng.random() < 0.3 else rng.choice(words.TOPICS), n=words.name(rng),
                                       c=words.city(rng),
                                       i=words.item(rng), w=words.invent(rng), w2=words.invent(rng))
    return vary(rng, asked), "This is beyond me.", CANNOT


def repeat(rng: random.Random) -> tuple[str, str, str]:
    """Return a request to repeat some words: (what the user says, the analysis, the reply)."""
    makers = (words.name, words.things, words.city, words.item, words.invent, words.invent,
              lambda rng: str(rng.randrange(10 ** rng.randint(1, 5))),
              lambda rng: rng.choice(words.TOPICS))
    text = " ".join(rng.choice(makers)(rng) for _ in range(rng.randint(1, 8)))
    asked = rng.choice(("Repeat: {}", "Repeat after me: {}", "Say {}", "say: {}", "Echo {}", "Please repeat: {}", "Write {}", 'Say "{}"',
                        "Repeat the words {}"))
    return asked.format(text), "I repeat the words.", text
