"""A real vLLM server that tests share, and what a test must know of it."""

from __future__ import annotations

from dataclasses import dataclass

# SmolLM2's own does not show tools. All of their schemas would be too much for its context.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou can call functions.{% for tool in tools %}\n"
    "{{ tool.function.name }}: {{ tool.function.description }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content or '' }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Served:
    """A real vLLM server with mixquant's default recipe and SmolLM2."""

    url: str
    name: str = "served"
    key: str = "a-key-that-must-not-leak"
    context: int = 7168  # tokens; the model would take 8192
