"""An agent with two tools, against `mixquant serve`, by OpenAI's client.

Start a server, then ask about the files of a folder:

    mixquant serve Qwen/Qwen3-8B
    python examples/agent_loop.py "Which file defines the phase rule?" --folder src

Each turn sends the whole conversation again. The server finds most of it in its prefix cache and
reads only what is new: the tool's result. The last line of each turn shows both numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

MAX_CHARACTERS = 20_000  # of one tool result

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "list_files",
            "description": "List the files of the folder that match a glob pattern.",
            "parameters": {
                "type": "object",
                "properties": {"pattern": {"type": "string", "description": "such as **/*.py"}},
                "required": ["pattern"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": "Return the text of one file.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string", "description": "relative to the folder"}},
                "required": ["path"],
            },
        },
    },
]


def list_files(folder: Path, pattern: str) -> str:
    found = (path for path in folder.glob(pattern) if inside(folder, path) and path.is_file())
    return "\n".join(sorted(str(path.relative_to(folder)) for path in found)) or "no file matches"


def read_file(folder: Path, path: str) -> str:
    # The model chooses the path, so a path out of the folder is refused.
    if not inside(folder, folder / path):
        raise ValueError(f"{path} is outside the folder")
    return (folder / path).read_text(errors="replace")


def inside(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def call(folder: Path, name: str, arguments: str) -> str:
    """Runs one tool. A mistake of the model comes back as text, so that it can try again."""
    tools = {"list_files": list_files, "read_file": read_file}
    try:
        if name not in tools:
            raise ValueError(f"there is no tool {name!r}; there are {', '.join(tools)}")
        return tools[name](folder, **json.loads(arguments))[:MAX_CHARACTERS]
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        return f"error: {error}"


def run(client: OpenAI, model: str, folder: Path, question: str, turns: int = 10) -> str:
    """Asks, runs the tools that the model calls, and returns the model's answer.

    Raises:
        RuntimeError: the model still calls tools after so many turns.
    """
    messages: list[Any] = [
        {
            "role": "system",
            "content": "Answer questions about the files of a folder. Use the tools.",
        },
        {"role": "user", "content": question},
    ]
    for turn in range(1, turns + 1):
        begun = time.perf_counter()
        answer = client.chat.completions.create(model=model, messages=messages, tools=TOOLS)
        seconds = time.perf_counter() - begun
        if usage := answer.usage:
            details = usage.prompt_tokens_details
            cached = (details and details.cached_tokens) or 0
            print(
                f"turn {turn}: {usage.prompt_tokens - cached} new prompt tokens behind {cached} "
                f"cached ones, {usage.completion_tokens} written, {seconds:.2f} s",
                file=sys.stderr,
            )
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for each in message.tool_calls:
            if each.type != "function":
                continue
            print(f"  {each.function.name}({each.function.arguments})", file=sys.stderr)
            result = call(folder, each.function.name, each.function.arguments)
            messages.append({"role": "tool", "tool_call_id": each.id, "content": result})
    raise RuntimeError(f"no answer after {turns} turns")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model about the files of a folder.")
    parser.add_argument("question")
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of mixquant serve")
    parser.add_argument("--api-key", default="none", help="needed if the server asks for a key")
    given = parser.parse_args()
    client = OpenAI(base_url=given.url, api_key=given.api_key)
    model = client.models.list().data[0].id
    try:
        print(run(client, model, given.folder, given.question))
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
