"""A prepared model that answers on standard output, for `mixquant generate` and `mixquant chat`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mixquant.checkpoints.models import Checkpoint, load_model
from mixquant.cli.console import InputError, err
from mixquant.cli.hints import quantized_tokens
from mixquant.cli.options import saved_recipe
from mixquant.cli.progress import progress_bar
from mixquant.core.recipe import Recipe


class Answerer:
    """Writes answers to standard output as they come, and keeps the KV cache between them.

    Attributes:
        tokens: the conversation so far. Its last token is in no cache yet.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Any,
        recipe: Recipe | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        from transformers import TextStreamer, set_seed
        from transformers.utils import logging

        from mixquant.engines.transformers import prepare

        logging.disable_progress_bar()  # ours tells the same
        with progress_bar() as progress:
            progress(f"Loading {checkpoint.name}", 0.0)
            model = load_model(checkpoint)
            progress("Quantizing", 0.8)
            self._model = prepare(model, recipe or saved_recipe(checkpoint))
        sampling = {"do_sample": True, "temperature": temperature}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        self._options = {
            **(sampling if temperature > 0 else greedy),
            "max_new_tokens": max_new_tokens,
            "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            "return_dict_in_generate": True,
        }
        set_seed(seed)
        self.reset()

    def reset(self) -> None:
        """Starts a new conversation."""
        self.tokens: list[int] = []
        self._cache: Any = None

    def answer(self, tokens: list[int], *, stoppable: bool = False) -> None:
        """Writes an answer, and on standard error what was read, in which format, and how long it took.

        Args:
            tokens: the conversation with the new message. Begins with `self.tokens`.
            stoppable: Ctrl-C ends the answer and keeps what is written; a second one is a
                KeyboardInterrupt. Otherwise the first one is.
        """
        import torch

        from mixquant.engines.transformers import summary
        from mixquant.engines.transformers.counting import quantized_rows

        cached = max(len(self.tokens) - 1, 0)
        ids = torch.tensor([tokens], device=self._model.device)
        start = time.perf_counter()
        with _stop_on_interrupt(stoppable) as stopping, quantized_rows(self._model) as rows:
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self._cache,
                stopping_criteria=stopping,
                **self._options,
            )
        seconds = time.perf_counter() - start
        self.tokens, self._cache = output.sequences[0].tolist(), output.past_key_values
        read = len(tokens) - cached
        quantized = quantized_tokens(summary(self._model), read, rows[0])
        from_cache = f", {cached} were cached" if cached else ""
        err.print(
            f"[dim]read {read} tokens ({quantized}){from_cache}; "
            f"wrote {len(self.tokens) - len(tokens)}; {seconds:.1f} s[/dim]",
            soft_wrap=True,
        )


@contextmanager
def _stop_on_interrupt(stoppable: bool) -> Iterator[Any]:
    """Stopping criteria for `generate` that end it after the token during which Ctrl-C was pressed.

    An exception in the middle of a pass would leave a KV cache with some layers ahead of others.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    pressed = False

    class Interrupted(StoppingCriteria):  # type: ignore[misc]  # Transformers is untyped
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.new_full((input_ids.shape[0],), pressed).bool()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if not stoppable or threading.current_thread() is not threading.main_thread():
        yield StoppingCriteriaList()
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield StoppingCriteriaList([Interrupted()])
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        err.print("[dim]stopped; Ctrl-C again ends the chat[/dim]")


def check_length(checkpoint: Checkpoint, prompt: int, answer: int) -> None:
    if checkpoint.context is not None and prompt + answer > checkpoint.context:
        raise InputError(
            f"the prompt is too long: {prompt} tokens and an answer of {answer} exceed the context "
            f"of {checkpoint.context} tokens"
        )
