"""What agents make a model read: instructions, a long tool result, and questions over turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixquant.conversation import Message, TemplateError, opening, render, reply

# In tokens of the model's own tokenizer, over all turns. The document is cut to reach it.
PROMPT_TOKENS = 3200

_TOPIC = "compound"  # in every version of pydoc_data.topics, and longer than is read here

_SYSTEM = """\
You are a programming assistant that works in a terminal. People ask you in the middle of their \
work, so be brief and exact: one or two sentences, no lists, no repetition of the question.

You have one tool, read(path), which returns a text file; the Python language reference is under \
reference/, one file a chapter. Always read before you answer. Rely on what the file says and on \
nothing else; if it does not say, answer that it does not tell. Quote keywords as they are written \
there."""

_QUESTIONS = (
    "I have a while loop with an else clause. When exactly does Python run the else clause?",
    "And in a for loop: what does a break statement in its first suite do to the else clause?",
    "A try statement has several except clauses. Which of them handles an exception?",
)
_QUESTIONS_ON_ANY_TEXT = (
    "Read the text, then tell me in one or two sentences what it is about.",
    "What is the most important thing that it says?",
    "Is there something in it that I have to act on?",
)


@dataclass(frozen=True)
class Workload:
    """A conversation up to its answers, which are the model's to write."""

    description: str
    messages: tuple[Message, ...]  # up to the first answer
    questions: tuple[str, ...]  # one for each further turn
    tokenizer: Any

    @property
    def turns(self) -> int:
        return 1 + len(self.questions)

    def prompt(self, turn: int, last: int | None = None) -> list[int]:
        """The tokens that are new to the model at this turn (0 is the first).

        Args:
            last: the last token of the answer before.
        """
        if turn == 0:
            return opening(self.tokenizer, self.messages, **_TEMPLATE_OPTIONS)
        return reply(self.tokenizer, self.questions[turn - 1], last, **_TEMPLATE_OPTIONS)

    @property
    def prompt_tokens(self) -> int:
        """Of all turns together."""
        return sum(len(self.prompt(turn)) for turn in range(self.turns))


# Answers are short here; reasoning before them would be all that there is.
_TEMPLATE_OPTIONS = {"enable_thinking": False}


def agent_workload(tokenizer: Any, text: str | None = None) -> Workload:
    """A system prompt, a long document as a tool result, and three questions in three turns.

    Args:
        tokenizer: of the model that is to answer. It must have a chat template.
        text: the document. None: the start of the chapter on compound statements in Python's own
            documentation, cut so that the prompts of all turns come close to `PROMPT_TOKENS`.

    Raises:
        ModelError: the tokenizer has no chat template, or one that leaves out what was said before.
    """
    reply(tokenizer, "?", **_TEMPLATE_OPTIONS)  # fails now if earlier answers are left out
    if text is not None:
        description = "the given text as a tool result, three questions over three turns"
        return _workload(tokenizer, description, "input.txt", text, _QUESTIONS_ON_ANY_TEXT)

    from pydoc_data.topics import topics

    lines = topics[_TOPIC].splitlines(keepends=True)
    description = "Python's documentation as a tool result, three questions over three turns"

    def of_lines(count: int) -> Workload:
        document = "".join(lines[:count])
        return _workload(tokenizer, description, f"reference/{_TOPIC}.txt", document, _QUESTIONS)

    fewest, most = 1, len(lines)
    while fewest < most:
        middle = (fewest + most + 1) // 2
        if of_lines(middle).prompt_tokens <= PROMPT_TOKENS:
            fewest = middle
        else:
            most = middle - 1
    return of_lines(fewest)


def _workload(
    tokenizer: Any, description: str, path: str, document: str, questions: Sequence[str]
) -> Workload:
    messages = _first_turn(tokenizer, questions[0], path, document)
    return Workload(description, tuple(messages), tuple(questions[1:]), tokenizer)


def _first_turn(tokenizer: Any, question: str, path: str, document: str) -> list[Message]:
    """What comes before the first answer, in the first of these ways that the template can say.

    With a tool's role; with the tool's result in a user's message, as agents do for models without
    one; with the instructions in the user's message, too.
    """
    asked = {"role": "user", "content": question}
    call = {"name": "read", "arguments": {"path": path}}
    in_its_role: list[Message] = [
        {"role": "system", "content": _SYSTEM},
        asked,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "read00001", "type": "function", "function": call}],
        },
        {"role": "tool", "name": "read", "tool_call_id": "read00001", "content": document},
    ]
    from_user: list[Message] = [
        {"role": "system", "content": _SYSTEM},
        asked,
        {"role": "assistant", "content": f"read({path!r})"},
        {"role": "user", "content": f"Result of read({path!r}):\n\n{document}"},
    ]
    no_system: list[Message] = [
        {"role": "user", "content": f"{_SYSTEM}\n\n{question}"},
        *from_user[2:],
    ]
    ways = [from_user, no_system]
    # Many templates write any role as it comes, and drop the calls that they do not know.
    if "tool_calls" in str(getattr(tokenizer, "chat_template", "")):
        ways.insert(0, in_its_role)
    for way in ways[:-1]:
        try:
            text = render(tokenizer, way, **_TEMPLATE_OPTIONS)
        except TemplateError:  # of a role that it does not know, or drops
            continue
        if all(part.strip() in text for part in (_SYSTEM, question, document)):
            return way
    return ways[-1]
