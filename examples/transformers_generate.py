"""Prepare a Transformers model, then generate: prefill in low precision, decode in BF16.

    python examples/transformers_generate.py Qwen/Qwen3-0.6B README.md "What is this project for?"

The file is the long prompt. A prompt below 128 tokens is not quantized (`min_prefill_tokens`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixquant


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model about a file.")
    parser.add_argument("model", help="a directory or a Hugging Face hub name")
    parser.add_argument("file", type=Path)
    parser.add_argument("question")
    parser.add_argument("--recipe", default="balanced", help="a preset, JSON, or a JSON file")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    if torch.cuda.is_available():
        model.to("cuda")

    mixquant.prepare(model, given.recipe)  # in place
    print(mixquant.summary(model))  # layers, formats, kernels, extra memory

    prompt = f"{given.file.read_text()}\n\n{given.question}\n"
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(
        prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template
    ).to(model.device)
    written = model.generate(**inputs, max_new_tokens=given.max_new_tokens, do_sample=False)
    print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
