"""A second model that decides whether an answer is right."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mixquant.evaluate.tasks import Chat, JudgeError, Verdict
from mixquant.evaluate.tasks.extraction import strip_thinking

_TRIES = 3


async def judged(
    judge: Chat | None, prompt: str, words: Mapping[str, float], *, max_tokens: int
) -> Verdict:
    """The verdict of a judge, who is asked until the reply is one of the words.

    Args:
        words: what it may say, lower case, and what an answer is worth then.
        max_tokens: of its reply, thoughts included.

    Raises:
        JudgeError: no judge, or it said something else every time.
        mixquant.evaluate.benchmarks.chat.ChatError: it could not be reached.
    """
    if judge is None:
        raise JudgeError("no judge to ask")
    message = {"role": "user", "content": prompt}
    text = ""
    for attempt in range(_TRIES):
        # Greedy, as published; a second try has to come out differently.
        reply = await judge.ask(
            [message], seed=attempt, temperature=0.0 if attempt == 0 else 0.7, max_tokens=max_tokens
        )
        text = strip_thinking(reply.text)
        word = _word(text, words)
        if word is not None:
            return Verdict(words[word], f"judge: {text[:200]}")
    expected = " or ".join(words)
    raise JudgeError(f"the judge said {text[:80]!r}, expected {expected} ({_TRIES} tries)")


async def says_yes(judge: Chat | None, prompt: str) -> Verdict:
    """The verdict as LongMemEval's script gives it: right if a reply of at most 10 tokens at
    temperature 0 has a yes in it, otherwise wrong.

    Raises:
        JudgeError: no judge.
        mixquant.evaluate.benchmarks.chat.ChatError: it could not be reached.
    """
    if judge is None:
        raise JudgeError("no judge to ask")
    message = {"role": "user", "content": prompt}
    reply = await judge.ask([message], temperature=0.0, max_tokens=10)
    return Verdict(float("yes" in reply.text.lower()), f"judge: {reply.text[:200]}")


def _word(text: str, words: Mapping[str, float]) -> str | None:
    """The one of the words that a reply begins or ends with, or the only one that it has."""
    said: list[str] = [word for word in re.findall(r"[^\W\d_]+", text.casefold()) if word in words]
    if not said:
        return None
    every = re.findall(r"[^\W\d_]+", text.casefold())
    if every[0] in words:
        return every[0]
    if every[-1] in words:
        return every[-1]
    return said[0] if len(set(said)) == 1 else None
