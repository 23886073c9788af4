"""Records the agent trace that `mixquant bench` replays by default.

    python scripts/record_agent_trace.py src/mixquant/bench/data/agent_trace.jsonl

An agent answers questions about Python with one tool, which returns a topic of Python's own
documentation (pydoc_data.topics, of the Python that runs this). Which topics it asks for is scripted:
the recording needs calls that are right, and the model is too small to make them. What it answers in
the end of each turn, SmolLM2-135M-Instruct writes, greedily, after reading all of it. In the file, `by`
says of each assistant's message who wrote it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from mixquant.checkpoints import models

ANSWER_TOKENS = 64

SYSTEM = """\
You are a programming assistant that works in a terminal. People ask you in the middle of their work, \
so be brief and exact. You have one tool, python_help(topic), which returns that topic of Python's \
documentation. Read before you answer, rely on what it says, and quote keywords as they are written \
there."""

# Questions and the topics that are read for each, in order. Lengths differ as an agent's tool results
# do: from under a hundred tokens to two thousand.
SESSIONS = {
    "loops": (
        ("When does Python run the else clause of a loop?", ("while", "for", "else")),
        ("What does break do to it, and what continue?", ("break", "continue")),
        ("And if an exception leaves the loop?", ("try",)),
        ("Can I suppress the exception without try?", ("with", "context-managers")),
    ),
    "comparisons": (
        ("Why is a < b == c not what I expect?", ("comparisons",)),
        ("Does 'not' bind tighter than that?", ("booleans", "operator-summary")),
        ("What counts as false?", ("truth",)),
    ),
    "functions": (
        ("In which order are default values and decorators evaluated?", ("function",)),
        ("How are starred arguments matched in a call?", ("calls",)),
        ("Is a lambda the same thing?", ("lambda",)),
        ("Which names does its body see?", ("naming", "global", "nonlocal")),
    ),
    "imports": (
        ("What does a relative import start from?", ("import",)),
        ("Does it bind a name in my function or in the module?", ("assignment", "del")),
        ("Can I raise ImportError from another exception?", ("raise", "pass")),
    ),
}


def main(file: str) -> None:
    model, tokenizer = models.load("smollm2")
    with Path(file).open("w", encoding="utf-8") as lines:
        for name, turns in SESSIONS.items():
            session = {"session": name, "messages": record(model, tokenizer, turns)}
            lines.write(json.dumps(session, ensure_ascii=False) + "\n")
            print(name, len(session["messages"]), "messages")


def record(model: Any, tokenizer: Any, turns: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for question, wanted in turns:
        messages.append({"role": "user", "content": question})
        for topic in wanted:
            call = {"name": "python_help", "arguments": json.dumps({"topic": topic})}
            calling = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
            messages.append({**calling, "by": "script"})
            messages.append({"role": "tool", "content": topics[topic].strip()})
        messages.append({"role": "assistant", "content": answer(model, tokenizer, messages)})
        messages[-1]["by"] = "SmolLM2-135M-Instruct"
    return messages


def answer(model: Any, tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    # The model's template knows no tools: it reads their results as a user's messages.
    told = [
        {"role": "user" if m["role"] == "tool" else m["role"], "content": m["content"]}
        for m in messages
        if m["content"]
    ]
    ids = tokenizer.apply_chat_template(
        told, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**ids, do_sample=False, max_new_tokens=ANSWER_TOKENS)
    text: str = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip() or "I do not know."


if __name__ == "__main__":
    main(*sys.argv[1:])
