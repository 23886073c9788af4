"""Needles in a haystack, as RULER (arXiv 2404.06654) defines them: facts to find again in a long text.

Its eight tasks `niah_*`, made here for the model's tokenizer, with fixed seeds and without a download.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mixquant.evaluate.tasks import Answer, Chat, Cut, Item, Task, TaskError, Verdict
from mixquant.evaluate.tasks.extraction import strip_thinking

NEEDLE_LENGTHS = (1024, 2048, 4096, 8192)
SHORTEST, LONGEST = 512, 131_072
ANSWER = 128  # tokens of a length that RULER leaves for the answer
SAMPLES = 20  # items of each kind and length

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {what} for {key} is: {value}."
_ONE = (
    "A special magic {what} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {what} afterwards.\n{context}\nWhat is the special magic {what} for {keys} "
    "mentioned in the provided text?"
)
_SEVERAL = (
    "Some special magic {what} are hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {what} afterwards.\n{context}\nWhat are all the special magic {what} for "
    "{keys} mentioned in the provided text?"
)
_DEPTHS = 40  # evenly spaced places for needles in a text
_SHAPES = {
    "numbers": re.compile(r"\d{7}"),
    "uuids": re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-", re.IGNORECASE),
}

# Keys are an adjective and a noun: 10,000 of them, more than a haystack of needles holds.
_ADJECTIVES = (  # noqa: SIM905
    "able amber ample arid azure bald bitter bland blunt bold brave brief bright brisk broad calm "
    "careful cheap chief civil clean clear clever cold cool coral crisp cruel curly damp dark "
    "dear deep dense dim dry dull eager early easy empty even exact faint fair false fancy fast "
    "fierce fine firm flat fond free fresh full funny gentle giant glad golden grand gray great "
    "green grim happy hard harsh heavy high hollow honest huge humble icy ideal jolly keen kind "
    "large late lazy lean light little lively local lone loud loyal lucky mad major mellow mild "
    "minor modern narrow neat"
).split()
_NOUNS = (  # noqa: SIM905
    "acorn actor anchor ankle apple apron arrow aunt badge baker barn basin basket beach bean "
    "bell bench bird blanket boat bottle bowl branch bread bridge brush bucket button cabin cable "
    "camel candle canoe carpet castle cattle cellar chain chair cherry chess circle clock cloud "
    "coast collar comet corner cotton cousin crane crown curtain dance desert diamond dinner "
    "doctor donkey dragon drum eagle engine farmer feather fence finger forest garden ghost goose "
    "grape guitar hammer harbor hat helmet hill honey hotel island jacket jungle kettle kitten "
    "ladder lantern lemon letter lion lizard market meadow mirror monkey napkin needle onion "
    "orange orchid"
).split()

_MANY = 15_000  # keys and values

What = Literal["numbers", "uuids"]


@dataclass(frozen=True)
class Kind:
    """One of RULER's tasks."""

    name: str
    haystack: Literal["noise", "text", "needles"]
    value: What = "numbers"
    key: Literal["words", "uuids"] = "words"
    keys: int = 1  # hidden
    values: int = 1  # of each key
    asked: int = 1  # keys that are asked for


NEEDLE_KINDS = (
    Kind("single-1", "noise"),
    Kind("single-2", "text"),
    Kind("single-3", "text", "uuids"),
    Kind("multikey-1", "text", keys=4),
    Kind("multikey-2", "needles"),
    Kind("multikey-3", "needles", "uuids", "uuids"),
    Kind("multivalue", "text", values=4),
    Kind("multiquery", "text", keys=4, asked=4),
)


class Needle(Task):
    """RULER's eight needle tasks at several lengths.

    ``--data`` names a text to hide needles in, in UTF-8; otherwise it is Python's documentation.
    (RULER takes essays that it downloads.)

    Args:
        lengths: of prompt and answer, in tokens.
    """

    name = "needle"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_tokens": ANSWER,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "thinking": False,
    }
    in_turns = True
    options = frozenset({"lengths"})

    def __init__(self, lengths: Sequence[int] = ()) -> None:
        self._lengths = tuple(dict.fromkeys(lengths))
        for length in self._lengths:
            if not SHORTEST <= length <= LONGEST:
                raise TaskError(f"--length {length}: expected {SHORTEST} to {LONGEST} tokens")

    def load(self, data: Path | None, cut: Cut) -> list[Item]:
        if self.limits is None:
            raise TaskError("needle: no tokenizer to count a prompt's tokens with")
        words = _words(data)
        items = []
        for length in self._fitting():
            for kind in NEEDLE_KINDS:
                pieces = 0  # the previous sample's number: a good first guess
                for number in range(SAMPLES):
                    sample = _Sample(kind, words, f"{kind.name} {length} {number}")
                    pieces = fill(sample.prompt, self.limits.tokens, length - ANSWER, pieces)
                    items.append(
                        Item(
                            id=f"{length}-{kind.name}-{number}",
                            messages=({"role": "user", "content": sample.prompt(pieces)},),
                            reference={"what": kind.value, "values": sample.answers},
                            group=f"{length} {kind.name}",
                            also=(str(length),),
                        )
                    )
        return items

    def _fitting(self) -> tuple[int, ...]:
        """The lengths that the model has room for; those that the user gave have to fit."""
        assert self.limits is not None
        context, answer = self.limits.context, self.limits.answer
        if context is None:
            return self._lengths or NEEDLE_LENGTHS
        most = context - answer + ANSWER
        wanted = self._lengths or NEEDLE_LENGTHS
        fitting = tuple(length for length in wanted if length <= most)
        if fitting != wanted and (self._lengths or not fitting):
            raise TaskError(
                f"needle: a length of {max(wanted)} with an answer of {answer} tokens needs more than "
                f"the model's {context}: give a smaller --length or --max-tokens"
            )
        return fitting

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        text = strip_thinking(str(answer.get("text") or "")).casefold()
        wanted = item.reference["values"]
        missing = [value for value in wanted if value.casefold() not in text]
        detail = f"missing: {', '.join(missing)}" if missing else "all found"
        shape = _SHAPES[item.reference["what"]]
        return Verdict(
            1 - len(missing) / len(wanted), detail, extracted=shape.search(text) is not None
        )


class _Sample:
    """One prompt whose haystack may have any number of pieces."""

    def __init__(self, kind: Kind, words: Sequence[str], seed: str) -> None:
        self._kind = kind
        self._words = words
        draw = random.Random(seed)
        self._draw = draw
        self._used: set[str] = set()
        keys = [self._new(self._key) for _ in range(kind.keys)]
        values = {key: [self._new(self._value) for _ in range(kind.values)] for key in keys}
        asked = draw.sample(keys, kind.asked)
        self.answers = [value for key in asked for value in values[key]]
        self._asked = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        self._needles = [self._needle(key, value) for key in keys for value in values[key]]
        draw.shuffle(self._needles)
        if kind.haystack == "text":
            steps = draw.sample(range(_DEPTHS), len(self._needles))
            self._depths = [step / (_DEPTHS - 1) for step in sorted(steps)]
        else:
            self._depths = sorted(draw.random() for _ in self._needles)
        self._others: list[str] = []  # needles that nobody asks for

    def prompt(self, pieces: int) -> str:
        """The prompt whose haystack has a number of pieces.

        Args:
            pieces: words of a text, repetitions of the noise, or other needles.
        """
        if self._kind.haystack == "text":
            repeats = -(-pieces // len(self._words))
            text = " ".join((list(self._words) * repeats)[:pieces])
            context = self._with_needles(re.split(r"(?<=[.!?]) ", text), " ")
        elif self._kind.haystack == "noise":
            context = self._with_needles([_NOISE] * pieces, "\n")
        else:
            while len(self._others) < pieces:
                key, value = self._new(self._key), self._new(self._value)
                self._others.append(self._needle(key, value))
            context = self._with_needles(self._others[:pieces], "\n")
        one = len(self.answers) == 1
        what = self._kind.value.removesuffix("s") if one else self._kind.value
        return (_ONE if one else _SEVERAL).format(what=what, context=context, keys=self._asked)

    def _with_needles(self, sentences: list[str], space: str) -> str:
        parts: list[str] = []
        done = 0
        for depth, needle in zip(self._depths, self._needles, strict=True):
            place = int(depth * len(sentences))
            parts += [*sentences[done:place], needle]
            done = place
        return space.join([*parts, *sentences[done:]])

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(what=self._kind.value, key=key, value=value)

    def _new(self, make: Callable[[], str]) -> str:
        """One that this prompt does not have yet, so that every question has one answer."""
        while (made := make()) in self._used:
            pass
        self._used.add(made)
        return made

    def _key(self) -> str:
        if self._kind.key == "uuids":
            return self._uuid()
        key = f"{self._draw.choice(_ADJECTIVES)}-{self._draw.choice(_NOUNS)}"
        # Nearly all keys are used: a second noun makes more.
        return key if len(self._used) < _MANY else f"{key}-{self._draw.choice(_NOUNS)}"

    def _value(self) -> str:
        if self._kind.value == "uuids":
            return self._uuid()
        return str(self._draw.randint(10**6, 10**7 - 1))

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._draw.getrandbits(128), version=4))


def fill(
    prompt: Callable[[int], str], tokens: Callable[[str], int], limit: int, guess: int = 0
) -> int:
    """The largest number of pieces (about) whose prompt has at most ``limit`` tokens.

    Args:
        prompt: gives the prompt with a number of pieces.
        tokens: counts the tokens of a text.
        limit: in tokens.
        guess: a number that is near; 0: none is known.

    Raises:
        TaskError: the prompt has more tokens without any piece.
    """
    empty = tokens(prompt(0))
    if empty > limit:
        raise TaskError(
            f"a prompt of {limit} tokens has no room for the needles: give a longer --length"
        )
    best, too_many = 0, None
    pieces = guess or 16
    for _ in range(24):
        counted = tokens(prompt(pieces))
        if counted <= limit:
            best = max(best, pieces)
        else:
            too_many = pieces if too_many is None else min(pieces, too_many)
        if too_many is not None and too_many - best <= 1:
            break
        each = max((counted - empty) / max(pieces, 1), 1e-9)
        following = pieces + int((limit - counted) // each)
        if following == pieces:  # no room for a whole piece more, on average
            break
        pieces = max(following, best + 1)
        if too_many is not None:
            pieces = min(pieces, too_many - 1)
    return best


def _words(data: Path | None) -> list[str]:
    if data is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = data.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise TaskError(f"cannot read {data}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise TaskError(f"cannot read {data}: it is not UTF-8 text") from None
    words = text.split()
    if not words:
        raise TaskError(f"{data} holds no text")
    return words
