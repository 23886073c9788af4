"""Runs vllm-router as a process of a set: its own launcher, with a check of the key added.

Run through ``alone.py`` or with ``-m``. It imports nothing of mixquant, so it starts at once.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str]) -> None:
    """Runs vllm-router with its own arguments, after ``--key-check URL`` and ``--``.

    The router asks that address whether a bearer token that it got is right; no option of its own
    sets the address. Its option ``--api-key`` is something else: the key that it sends to engines,
    which anyone can see in the process list.
    """
    from vllm_router.launch_router import launch_router, parse_router_args

    parser = argparse.ArgumentParser()
    parser.add_argument("--key-check", required=True, metavar="URL")
    own, others = parser.parse_known_args(arguments)
    settings = parse_router_args(others)
    settings.api_key_validation_urls = [own.key_check]
    launch_router(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
