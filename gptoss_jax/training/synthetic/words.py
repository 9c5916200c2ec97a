"""The words that synthetic questions are made of. Long lists, so that the model learns to copy a name and not to know it."""

from __future__ import annotations

import random

NAMES = (
    "Tom", "Anna", "Ben", "Maria", "Sam", "Lucy", "Max", "Emma", "Leo", "Nina", "Paul", "Sara", "Jack", "Mia", "Omar", "Lena", "Ali",
    "Zoe", "Ivan", "Eva", "Carlos", "Ines", "Ravi", "Priya", "Kenji", "Yuki", "Wei", "Mei", "Peter", "Julia", "David", "Laura", "Noah",
    "Olivia", "Liam", "Sophia", "John", "Mary", "Alice", "Bob", "Carol", "Dan", "Erik", "Fatima", "George", "Hannah", "Ida", "James",
    "Kate", "Mark", "Nora", "Oscar", "Rosa", "Simon", "Tina", "Victor", "Wendy", "Amir", "Chloe", "Diego")

THINGS = (
    "apples", "books", "coins", "marbles", "stickers", "cookies", "pencils", "oranges", "cards", "toys", "balls", "flowers", "eggs",
    "shells", "stamps", "candies", "pens", "bananas", "stones", "cups", "chairs", "tickets", "photos", "beads", "buttons", "fish",
    "pears", "lemons", "nuts", "keys", "boxes of tea", "bottles", "hats", "shirts", "dollars", "euros", "points", "plants", "chickens",
    "cupcakes", "muffins", "balloons", "crayons", "notebooks", "peaches", "cherries", "tomatoes", "carrots", "sandwiches", "puzzles")

CONTAINERS = ("boxes", "bags", "baskets", "shelves", "packs", "jars", "rows", "trays", "crates", "drawers", "piles", "tables")

CITIES = (
    "Paris", "London", "Tokyo", "Rome", "Berlin", "Madrid", "Oslo", "Cairo", "Lima", "Delhi", "Boston", "Chicago", "Sydney", "Vienna",
    "Zurich", "Lagos", "Nairobi", "Seoul", "Beijing", "Mumbai", "San Francisco", "New York", "Los Angeles", "Buenos Aires", "Helsinki",
    "Dublin", "Prague", "Warsaw", "Athens", "Lisbon", "Toronto", "Mexico City", "Hamburg", "Munich", "Milan", "Kyoto", "Bangkok")

ITEMS = (
    "lamp", "phone", "chair", "table", "bike", "camera", "jacket", "watch", "guitar", "laptop", "backpack", "umbrella", "blue shirt",
    "red car", "coffee", "milk", "bread", "cheese", "rice", "tea", "sugar", "butter", "apple", "orange", "pizza", "soap", "paper",
    "green hat", "desk", "sofa", "mirror", "kettle", "mouse", "keyboard", "ticket", "novel", "ball", "drum", "pen", "clock")

TOPICS = (
    "the sea", "France", "the moon", "dogs", "cats", "history", "the French Revolution", "quantum physics", "love", "football", "music",
    "Shakespeare", "climate change", "black holes", "cooking", "chess", "the stock market", "Japan", "Einstein", "World War II", "birds",
    "DNA", "photosynthesis", "gravity", "the Roman Empire", "bitcoin", "machine learning", "JAX", "Python", "the weather", "pasta", "art",
    "volcanoes", "dinosaurs", "space travel", "economics", "democracy", "robots", "the human brain", "trains", "electric cars", "Mars",
    "Napoleon", "Mozart", "Germany", "Africa", "coffee", "wine", "tennis", "poetry", "philosophy", "language", "evolution", "the sun")

_ONSETS = ("b", "br", "ch", "d", "f", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "pr", "qu", "r", "s", "sh", "st", "t", "tr", "v",
           "w", "y", "z")
_RIMES = ("a", "ab", "al", "an", "ar", "e", "el", "en", "er", "i", "id", "il", "in", "o", "ol", "on", "or", "u", "ul", "um", "un", "ai",
          "ea", "oo")


def invent(rng: random.Random) -> str:
    """Return a made-up lower-case word of one to three syllables."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_RIMES) for _ in range(rng.choice((1, 2, 2, 3))))


def name(rng: random.Random) -> str:
    """Return a first name, sometimes an invented one."""
    return invent(rng).capitalize() if rng.random() < 0.15 else rng.choice(NAMES)


def things(rng: random.Random) -> str:
    """Return a countable noun in the plural, sometimes an invented one."""
    return invent(rng) + "s" if rng.random() < 0.1 else rng.choice(THINGS)


def city(rng: random.Random) -> str:
    """Return the name of a city, sometimes an invented one."""
    return invent(rng).capitalize() if rng.random() < 0.2 else rng.choice(CITIES)


def item(rng: random.Random) -> str:
    """Return something one can buy or look up, sometimes an invented word."""
    return invent(rng) if rng.random() < 0.25 else rng.choice(ITEMS)
