"""Beam search over stand-ins for vLLM's classes: which length reaches a worker, and which does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from vllm_engines import require_vllm

require_vllm()

from mixquant.engines.vllm import first_prompts  # noqa: E402
from mixquant.engines.vllm.patches import beams  # noqa: E402


class Processor:
    def process_inputs(self, request_id: str, prompt: Any, params: Any) -> Any:
        return SimpleNamespace(request_id=request_id, sampling_params=params)


class Sequence:
    orig_prompt: ClassVar = {"prompt_token_ids": [1, 2]}

    def get_prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": [1, 2, 3]}


def test_the_length_travels_with_parameters_that_are_not_shared() -> None:
    class Own(Processor):
        pass

    class Beam(Sequence):
        pass

    beams._wrap(Beam, Own)
    shared = SimpleNamespace(extra_args=None)
    plain = Own().process_inputs("a", {"prompt_token_ids": [1]}, shared)
    marked = Own().process_inputs("b", prompt=Beam().get_prompt(), params=shared)
    assert plain.sampling_params is shared
    assert shared.extra_args is None
    assert marked.sampling_params.extra_args == {beams.KEY: 2}


@pytest.mark.parametrize("value", [2**63, -1, True, 0, 5, "5", None])
def test_a_client_cannot_say_how_long_the_first_prompt_was(value: Any) -> None:
    class Own(Processor):
        pass

    class Beam(Sequence):
        pass

    beams._wrap(Beam, Own)
    given = SimpleNamespace(extra_args={beams.KEY: value, "other": 1})
    plain = Own().process_inputs("a", {"prompt_token_ids": [1]}, given)
    marked = Own().process_inputs("b", Beam().get_prompt(), given)
    assert plain.sampling_params.extra_args == {"other": 1}
    assert marked.sampling_params.extra_args == {"other": 1, beams.KEY: 2}
    assert given.extra_args == {beams.KEY: value, "other": 1}
    alone = SimpleNamespace(extra_args={beams.KEY: value})
    assert Own().process_inputs("c", "text", alone).sampling_params.extra_args is None


def test_a_request_that_only_pools_has_no_sampling_parameters() -> None:
    class Own(Processor):
        pass

    class Beam(Sequence):
        pass

    beams._wrap(Beam, Own)
    assert Own().process_inputs("a", {"prompt_token_ids": [1]}, None).sampling_params is None


@pytest.mark.parametrize("value", [2**63, 2**31, -1, True, False, 1.5, "4", None, [4]])
def test_a_length_that_cannot_be_one_changes_nothing_in_a_worker(value: Any) -> None:
    params = SimpleNamespace(extra_args={beams.KEY: value})
    new = SimpleNamespace(req_id="a", sampling_params=params)
    first = first_prompts.FirstPrompts()
    first.follow(SimpleNamespace(scheduled_new_reqs=[new], finished_req_ids=set()))
    assert first.of(["a"], np.array([9])).tolist() == [9]


def test_first_prompts_are_known_from_their_start_to_their_end() -> None:
    def step(new: dict[str, Any], finished: tuple[str, ...] = ()) -> Any:
        return SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=extra))
                for name, extra in new.items()
            ],
            finished_req_ids=set(finished),
        )

    first = first_prompts.FirstPrompts()
    lengths = np.array([9, 9, 9])
    names = ["a", "b", "c"]
    assert first.of(names, lengths).tolist() == [9, 9, 9]
    # What a client says cannot make a prompt longer, and what is no number changes nothing.
    first.follow(step({"a": {beams.KEY: 4}, "b": {beams.KEY: 99}, "c": {beams.KEY: "4"}}))
    assert first.of(names, lengths).tolist() == [4, 9, 9]
    first.follow(step({"d": None}))
    assert first.of(names, lengths).tolist() == [4, 9, 9]
    first.follow(step({}, ("a", "b")))
    assert first.of(names, lengths).tolist() == [9, 9, 9]
