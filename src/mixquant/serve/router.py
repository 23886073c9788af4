"""vllm-router as a process of a set: its own launcher, and a check of the key that it has no option for.

Run through ``alone.py`` or with ``-m``. It imports nothing of mixquant, so that it starts at once.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str]) -> None:
    """vllm-router with its own arguments, after ``--key-check URL`` and ``--``.

    The router asks that address whether a bearer token that it was shown is right. Its option
    ``--api-key`` is something else: what it shows to engines, and for all to see in the process list.
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
