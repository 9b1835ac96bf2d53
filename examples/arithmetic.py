"""Little sums in words: two to four steps of integer arithmetic, as chats.

    user       Anna has 7 apples, finds 5, eats 3 and doubles them. How many?
    assistant  7 plus 5 is 12, 12 minus 3 is 9, 9 times 2 is 18.

Every number is between 0 and LARGEST. The response is a chain: a step begins with the
result of the step before, so one wrong result makes all later ones wrong.

A fixed tenth of all calculations is held out. The test set contains only these, and the
other files contain none of them, with any name, thing or verb.

    python examples/arithmetic.py FOLDER      # write the data and the tokenizer
"""

import argparse
import dataclasses
import json
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import word_tokenizer

LARGEST = 20
STEPS = (2, 3, 4)
HELD_OUT_PERCENT = 10
LONGEST_PROMPT, LONGEST = 24, 50  # tokens; the second with the response and its end

NAMES = "Anna Ben Clara Emma Felix Hugo Jane Leo Mary Otto Rosa Tom".split()
THINGS = "apples balls books cards coins eggs nuts pears shells stamps".split()
NUMBERS = [str(number) for number in range(LARGEST + 1)]

END = "<|end|>"
ROLES = ("<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One kind of step.

    Attributes:
      word: its name in a response.
      apply: computes the result from two numbers.
      operands: allowed second numbers.
      phrases: its forms in a prompt; {} stands for the second number.
    """

    word: str
    apply: Callable[[int, int], int]
    operands: tuple[int, ...]
    phrases: tuple[str, ...]


OPERATIONS = (
    Operation("plus", lambda a, b: a + b, tuple(range(1, 10)), ("finds {}", "buys {}")),
    Operation(
        "minus", lambda a, b: a - b, tuple(range(1, 10)), ("loses {}", "sells {}")
    ),
    Operation("times", lambda a, b: a * b, (2,), ("doubles them",)),
    Operation("times", lambda a, b: a * b, (3,), ("triples them",)),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem in one wording.

    Attributes:
      prompt: the user's message.
      response: the right solution.
      calculation: the start and the steps, which every wording shares.
    """

    prompt: str
    response: str
    calculation: str

    @property
    def held_out(self) -> bool:
        """Whether no training file may contain the calculation."""
        return zlib.crc32(self.calculation.encode()) % 100 < HELD_OUT_PERCENT


def problem(draw: random.Random) -> Problem:
    """Draw a problem."""
    value = start = draw.randint(1, LARGEST)
    phrases, solution, calculation = [], [], [str(start)]
    for _ in range(draw.choice(STEPS)):
        operation, operand, result = _step(draw, value)
        phrases.append(draw.choice(operation.phrases).format(operand))
        calculation.append(f"{operation.word} {operand}")
        solution.append(f"{value} {operation.word} {operand} is {result}")
        value = result
    told = f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return Problem(
        f"{draw.choice(NAMES)} has {start} {draw.choice(THINGS)}, {told}. How many?",
        f"{', '.join(solution)}.",
        " ".join(calculation),
    )


def _step(draw: random.Random, value: int) -> tuple[Operation, int, int]:
    """Draw a step whose result stays between 0 and LARGEST."""
    while True:
        operation = draw.choice(OPERATIONS)
        operand = draw.choice(operation.operands)
        result = operation.apply(value, operand)
        if 0 <= result <= LARGEST:
            return operation, operand, result


def problems(count: int, *, seed: int, held_out: bool) -> Iterator[Problem]:
    """Yield `count` different problems of which all or none are held out."""
    draw, seen = random.Random(seed), set()
    while len(seen) < count:
        made = problem(draw)
        if made.held_out == held_out and made.prompt not in seen:
            seen.add(made.prompt)
            yield made


def write(
    folder: str | Path,
    *,
    teacher: int = 12000,
    train: int = 1500,
    test: int = 250,
    seed: int = 0,
) -> Path:
    """Write teacher.jsonl, train.jsonl, prompts.jsonl and test.jsonl.

    The student gets less data than the teacher: train.jsonl is the first part of
    teacher.jsonl. prompts.jsonl is train.jsonl without the responses.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = list(problems(teacher, seed=2 * seed, held_out=False))
    held_out = list(problems(test, seed=2 * seed + 1, held_out=True))
    for name, chosen in (
        ("teacher", made),
        ("train", made[:train]),
        ("test", held_out),
    ):
        lines = (json.dumps({"messages": messages(p)}) + "\n" for p in chosen)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = (json.dumps({"messages": messages(p)[:1]}) + "\n" for p in made[:train])
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def messages(problem: Problem) -> list[dict[str, str]]:
    """The conversation of a problem."""
    return [
        {"role": "user", "content": problem.prompt},
        {"role": "assistant", "content": problem.response},
    ]


def vocabulary() -> list[str]:
    """Every word that a problem can contain, sorted."""
    phrases = " ".join(phrase for o in OPERATIONS for phrase in o.phrases)
    words = {o.word for o in OPERATIONS} | set(phrases.replace("{}", "").split())
    words |= {*NAMES, *THINGS, *NUMBERS, "has", "and", "is", "How", "many"}
    return sorted(words)


def tokenizer(folder: str | Path) -> Path:
    """Write the tokenizer, with its chat template."""
    pieces = [f"Ġ{word}" for word in vocabulary()]
    # Names begin a prompt and numbers begin a response, without a space before them.
    pieces += [*NAMES, *NUMBERS]
    return word_tokenizer.write(
        folder, pieces, end=END, special=ROLES, chat_template=CHAT_TEMPLATE
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.folder, seed=arguments.seed)
    tokenizer(arguments.folder)
