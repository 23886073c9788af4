"""Stands in for vLLM's server where a test is not about vLLM: the same options, a `Stub` behind them.

    python fake_vllm.py --port PORT --served-model-name NAME [anything]

It adds its process and its arguments to the file FAKE_VLLM_STARTED. With FAKE_VLLM_HOLD set it answers
so many requests and holds the others; with --broken it does not start. Sums are right, except that a
model with everything quantized is wrong where the first number is odd.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
from pathlib import Path

from chat_stub import Body, Stub, question, serving


def solve(body: Body, wrong_if_odd: bool = False) -> str:
    """The answer to a problem that holds ``A + B``."""
    found = re.search(r"(\d+) \+ (\d+)", question(body)[0])
    assert found is not None
    first, second = int(found[1]), int(found[2])
    return rf"So it is \boxed{{{first + second + (wrong_if_odd and first % 2)}}}."


def main(arguments: list[str]) -> None:
    with Path(os.environ["FAKE_VLLM_STARTED"]).open("a") as file:
        file.write(json.dumps({"process": os.getpid(), "arguments": arguments}) + "\n")
    if "--broken" in arguments:
        print("ValueError: broken, as it was told to be")
        sys.exit(1)
    wrong_if_odd = '"everywhere":true' in " ".join(arguments)
    left = threading.Semaphore(int(os.environ.get("FAKE_VLLM_HOLD", "1000000")))

    def answer(body: Body) -> str:
        left.acquire()
        return solve(body, wrong_if_odd)

    named = dict(itertools.pairwise(arguments))
    stub = Stub(answer, {named["--served-model-name"]: int(named.get("--max-model-len", 8192))})
    with serving(stub, port=int(named["--port"])):
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
