"""Little English: simple instructions whose test set needs composition.

There are three tasks over a few hundred words: describe a scene, tell a short story of
giving, reverse a list. Each instruction has several valid responses. Words are drawn
with Zipf-like frequencies. A small share of the training responses contains a wrong
word.

Some word pairs are held out: a pair such as "red fox" (adjective and noun) or "fox,
kite" (neighbours in a list) is in no training text, although both its words are. Every
test instruction contains at least one such pair, so copying from memory fails on it.

    python examples/little_english.py FOLDER      # write the data and the tokenizer
"""

import argparse
import dataclasses
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import word_tokenizer

NOISE = 0.1
HELD_OUT_SHARE = 0.15
END_OF_TEXT = "<|endoftext|>"
LONGEST = 44  # tokens of the longest row: prompt, response, end of text
LONGEST_PROMPT = 24

# The first words of a list are the most frequent ones.
ADJECTIVES = """red small big blue green white black tiny brown soft heavy round tall
 yellow golden shiny wet dusty spotted pink striped silver wooden purple""".split()
ANIMALS = """dog cat horse bird fox rabbit bear mouse cow duck sheep frog lion wolf pig
 goat monkey hen tiger deer turtle pony zebra camel""".split()
THINGS = """box table tree chair bench wall gate cart boat rock bridge lamp barrel
 ladder bed bucket fence tent wagon statue""".split()
GIFTS = """book ball hat kite cup coat drum bell ring basket bottle doll pen clock
 flute scarf puzzle mirror pillow vase""".split()
NOUNS = [noun for kind in zip(ANIMALS, THINGS, GIFTS, strict=False) for noun in kind]
NOUNS += ANIMALS[len(THINGS) :]
WOMEN = "Anna Mary Lucy Emma Clara Ruth Nora Jane Rosa Helen Vera Ida".split()
MEN = "Tom Ben John Max Paul Leo Sam Peter Hugo Karl Felix Otto".split()
NAMES = [name for pair in zip(WOMEN, MEN, strict=True) for name in pair]
PLACES = {
    "garden": "in", "park": "in", "beach": "on", "forest": "in", "market": "at",
    "kitchen": "in", "farm": "on", "village": "in", "hill": "on", "station": "at",
    "barn": "in", "island": "on", "school": "at", "valley": "in", "harbour": "at",
    "yard": "in",
}  # fmt: skip
# Verb: its forms in a sentence, and its moods, the most frequent first.
VERBS = {
    "sleep": ("sleeps", "sleeping", "tired calm cosy cold"),
    "run": ("runs", "running", "lively busy scared merry"),
    "sit": ("sits", "sitting", "calm sleepy bored tired"),
    "wait": ("waits", "waiting", "bored hungry calm cold"),
    "play": ("plays", "playing", "merry lively silly busy"),
    "jump": ("jumps", "jumping", "lively silly merry proud"),
    "hide": ("hides", "hiding", "shy scared silly cosy"),
    "eat": ("eats", "eating", "hungry busy cosy calm"),
    "sing": ("sings", "singing", "merry proud lively silly"),
    "dig": ("digs", "digging", "busy hungry lively proud"),
    "shake": ("shakes", "shaking", "cold scared shy hungry"),
    "rest": ("rests", "resting", "sleepy tired cosy bored"),
}
RELATIONS = ["under", "behind", "near", "beside", "above"]
TIMES = ["on Sunday", "on Monday", "last week", "last night", "at noon", "before lunch"]
FEELINGS = ["happy", "glad", "thankful"]

KINDS = [ADJECTIVES, ANIMALS, THINGS, GIFTS, NAMES, list(PLACES)]
KIND_OF = {word: kind for kind in KINDS for word in kind}

# Each constant part of the Alpaca template is one token. Rows stay short, and what the
# model has to learn is the instruction.
TEMPLATE_PARTS = [
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.",
    "\n\n### Instruction:\n",
    "\n\n### Input:\n",
    "\n\n### Response:\n",
]


def _held_out_pairs() -> frozenset[tuple[str, str]]:
    """Pairs of neighbouring words that no training text contains."""
    draw = random.Random("held out")
    described = itertools.product(ADJECTIVES, NOUNS)
    pairs = {pair for pair in described if draw.random() < HELD_OUT_SHARE}
    for first, second in itertools.combinations(NOUNS, 2):
        # Both orders, because a reversed list contains the pair in reverse.
        if draw.random() < HELD_OUT_SHARE / 2:
            pairs |= {(first, second), (second, first)}
    return frozenset(pairs)


HELD_OUT = _held_out_pairs()


@dataclasses.dataclass(frozen=True)
class Example:
    """One instruction with every valid response.

    Attributes:
      instruction: the task.
      input: the text that the task is about; may be empty.
      responses: all valid responses.
      weights: relative frequency of each response.
    """

    instruction: str
    input: str
    responses: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def prompt(self) -> str:
        """Instruction and input in one text."""
        return f"{self.instruction} {self.input}"


def words(text: str) -> list[str]:
    """Words of a text in order, without punctuation."""
    return re.findall(r"[A-Za-z]+", text)


def held_out_pairs(text: str) -> list[tuple[str, str]]:
    """Held-out pairs that are neighbours in a text."""
    return [pair for pair in itertools.pairwise(words(text)) if pair in HELD_OUT]


def _pick(draw: random.Random, choices: Sequence[str]) -> str:
    """Draw one word, the n-th with a frequency proportional to 1 / (n + 2)."""
    return draw.choices(choices, [1 / (n + 3) for n in range(len(choices))])[0]


def _pick_distinct(draw: random.Random, choices: Sequence[str], count: int) -> list:
    picked: dict[str, None] = {}
    while len(picked) < count:
        picked[_pick(draw, choices)] = None
    return list(picked)


def _example(instruction: str, given: str, *parts: dict[str, float]) -> Example:
    """An example whose responses combine one alternative of every part."""
    combinations = list(itertools.product(*(part.items() for part in parts)))
    responses = [" ".join(text for text, _ in chosen) for chosen in combinations]
    weights = []
    for chosen in combinations:
        weight = 1.0
        for _, share in chosen:
            weight *= share
        weights.append(weight)
    return Example(instruction, given, tuple(responses), tuple(weights))


def scene(draw: random.Random) -> Example:
    """An animal does something somewhere and looks a certain way."""
    colour, size = _pick(draw, ADJECTIVES), _pick(draw, ADJECTIVES)
    animal, thing = _pick(draw, ANIMALS), _pick(draw, THINGS)
    place, verb = _pick(draw, list(PLACES)), _pick(draw, list(VERBS))
    relation = _pick(draw, RELATIONS)
    does, doing, moods = VERBS[verb]
    who, where = f"{colour} {animal}", f"{relation} the {size} {thing}"
    at = f"{PLACES[place]} the {place}"
    what = _pick(draw, ["scene", "picture"])
    return _example(
        f"Describe this {what}: {who}, {verb}, {relation} {size} {thing}, {place}.",
        "",
        {
            f"The {who} {does} {where} {at}.": 0.5,
            f"{at.capitalize()}, the {who} is {doing} {where}.": 0.3,
            f"There is a {who} {doing} {where} {at}.": 0.2,
        },
        {f"The {animal} looks": 0.6, "It seems to be very": 0.4},
        {f"{mood}.": 0.5**i for i, mood in enumerate(moods.split())},
    )


def story(draw: random.Random) -> Example:
    """Someone gives a gift to somebody, who thanks them."""
    giver, taker = _pick_distinct(draw, NAMES, 2)
    gift = f"{_pick(draw, ADJECTIVES)} {_pick(draw, GIFTS)}"
    when = _pick(draw, TIMES)
    whom = "her" if giver in WOMEN else "him"
    who = "She" if taker in WOMEN else "He"
    what = _pick(draw, ["story", "tale"])
    feelings = dict(zip(FEELINGS, [0.5, 0.3, 0.2], strict=True))
    return _example(
        f"Tell a {what}: {giver}, {taker}, {gift}, {when}.",
        "",
        {
            f"{giver} gave the {gift} to {taker} {when}.": 0.4,
            f"{when.capitalize()}, {giver} gave {taker} the {gift}.": 0.4,
            f"{taker} got the {gift} from {giver} {when}.": 0.2,
        },
        {
            f"{who} was very {feeling} and thanked {whom}{close}": share * likely
            for feeling, share in feelings.items()
            for close, likely in [(".", 0.6), (" with a smile.", 0.4)]
        },
    )


def reversal(draw: random.Random) -> Example:
    """A list of four to six nouns is reversed."""
    items = _pick_distinct(draw, NOUNS, draw.randint(4, 6))
    backwards = items[::-1]
    spoken = f"{', '.join(backwards[:-1])} and {backwards[-1]}"
    return _example(
        _pick(draw, ["Reverse the list.", "Reverse the words."]),
        f"List: {', '.join(items)}.",
        {
            f"In reverse order, the words are {spoken}.": 0.5,
            f"The list in reverse order is {', '.join(backwards)}.": 0.3,
            f"From the end, the list reads {spoken}.": 0.2,
        },
    )


TASKS: tuple[Callable[[random.Random], Example], ...] = (scene, story, reversal)


def examples(count: int, *, seed: int, held_out: bool) -> Iterator[tuple[Example, str]]:
    """Yield `count` examples, each with one response drawn by its weights.

    With `held_out` every prompt contains at least one held-out pair. Without it no text
    of an example contains any.
    """
    draw = random.Random(seed)
    made = 0
    while made < count:
        example = TASKS[made % len(TASKS)](draw)
        if bool(held_out_pairs(example.prompt)) == held_out:
            made += 1
            yield example, draw.choices(example.responses, example.weights)[0]


def with_wrong_word(response: str, draw: random.Random) -> str:
    """Replace one word of the response by another of its kind."""
    places = [m for m in re.finditer(r"[A-Za-z]+", response) if m[0] in KIND_OF]
    while True:
        place = draw.choice(places)
        other = _pick(draw, KIND_OF[place[0]])
        text = response[: place.start()] + other + response[place.end() :]
        if text != response and not held_out_pairs(text):
            return text


def write(
    folder: str | Path,
    *,
    teacher: int = 8000,
    train: int = 1000,
    valid: int = 150,
    test: int = 300,
    seed: int = 0,
) -> Path:
    """Write teacher.jsonl, train.jsonl, valid.jsonl and test.jsonl.

    The student gets less data than the teacher: train.jsonl is the first part of
    teacher.jsonl. In both, `output` is one response, and a share NOISE of them has a
    wrong word. In valid.jsonl and test.jsonl every prompt contains a held-out pair, and
    `output` is the list of all valid responses, one drawn at random first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(f"noise {seed}")
    lines = []
    for example, response in examples(teacher, seed=3 * seed, held_out=False):
        if noise.random() < NOISE:
            response = with_wrong_word(response, noise)
        lines.append(_line(example, response))
    (folder / "teacher.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(lines[:train]), encoding="utf-8")
    for name, count, offset in [("valid", valid, 1), ("test", test, 2)]:
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for example, response in examples(
                count, seed=3 * seed + offset, held_out=True
            ):
                others = [text for text in example.responses if text != response]
                file.write(_line(example, [response, *others]))
    return folder


def _line(example: Example, output: str | list[str]) -> str:
    record = {"instruction": example.instruction, "input": example.input}
    return json.dumps(record | {"output": output}) + "\n"


def vocabulary() -> list[str]:
    """Every word that a text of Little English can contain, sorted."""
    draw = random.Random("vocabulary")
    vocabulary = set(KIND_OF) | set(VERBS) | set(RELATIONS)
    # A few hundred examples contain all other words of the templates.
    for task in TASKS:
        for _ in range(400):
            example = task(draw)
            texts = (example.instruction, example.input, *example.responses)
            vocabulary.update(word for text in texts for word in words(text))
    return sorted(vocabulary)


def tokenizer(folder: str | Path) -> Path:
    """Write the tokenizer; each constant part of the template is one token."""
    known = vocabulary()
    # A capitalised word can begin a text, so it needs a form without the space too.
    pieces = [*(f"Ġ{word}" for word in known), *(w for w in known if w[0].isupper())]
    return word_tokenizer.write(folder, pieces, end=END_OF_TEXT, parts=TEMPLATE_PARTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.folder, seed=arguments.seed)
    tokenizer(arguments.folder)
