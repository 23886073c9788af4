"""The rule, against a second implementation that goes row by row and follows its text."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.core.phase import (
    PhasePlan,
    Thresholds,
    everything_quantized,
    in_force,
    plan_in_force,
    plan_pass,
)


@dataclass(frozen=True)
class Sequence:
    """What a pass holds of one sequence."""

    first: int  # position of its first row; negative: that many rows of padding come first
    rows: int
    prompt: int  # its prompt's length


thresholds = st.builds(
    Thresholds,
    min_prefill_tokens=st.integers(0, 40),
    precise_head=st.integers(0, 8),
    precise_tail=st.integers(0, 8),
)
sequences = st.lists(
    st.builds(
        Sequence,
        first=st.integers(-10, 30),
        rows=st.integers(0, 25),
        prompt=st.integers(0, 45),
    ),
    max_size=6,
)


def plan_for(t: Thresholds, batch: list[Sequence], graph: bool = False) -> PhasePlan:
    return plan_pass(
        t,
        [s.first for s in batch],
        [s.rows for s in batch],
        [s.prompt for s in batch],
        may_replay_graph=graph,
    )


def by_the_text(t: Thresholds, batch: list[Sequence], graph: bool) -> list[str]:
    """For each row of the pass: quantized, precise or padding."""
    kinds: list[str] = []
    for sequence in batch:
        for position in range(sequence.first, sequence.first + sequence.rows):
            if position < 0:
                kinds.append("padding")
                continue
            is_prompt_token = position < sequence.prompt  # 1
            in_head = position < t.precise_head  # 2
            in_tail = position >= sequence.prompt - t.precise_tail
            allowed = is_prompt_token and not in_head and not in_tail
            kinds.append("quantized" if allowed else "precise")
    enough = kinds.count("quantized") >= t.min_prefill_tokens  # 3
    if not enough or graph:  # 4
        kinds = ["precise" if kind == "quantized" else kind for kind in kinds]
    return kinds


def kinds_of(plan: PhasePlan) -> list[str]:
    kinds = ["padding"] * plan.rows
    for name in ("quantized", "precise"):
        for start, stop in getattr(plan, name):
            assert kinds[start:stop] == ["padding"] * (stop - start), "two groups overlap"
            kinds[start:stop] = [name] * (stop - start)
    return kinds


@given(thresholds, sequences, st.booleans())
def test_the_rule(t: Thresholds, batch: list[Sequence], graph: bool) -> None:
    plan = plan_for(t, batch, graph)
    wanted = by_the_text(t, batch, graph)
    assert plan.rows == len(wanted)
    assert kinds_of(plan) == wanted
    assert plan.quantized_rows == wanted.count("quantized")
    assert plan.precise_rows == wanted.count("precise")


@given(thresholds, sequences, st.booleans())
def test_ranges_are_ascending_apart_and_merged(
    t: Thresholds, batch: list[Sequence], graph: bool
) -> None:
    plan = plan_for(t, batch, graph)
    for ranges in (plan.quantized, plan.precise):
        for start, stop in ranges:
            assert 0 <= start < stop <= plan.rows
            assert type(start) is type(stop) is int  # no numpy, which JSON and hashing would meet
        for (_, stop), (start, _) in itertools.pairwise(ranges):
            assert stop < start  # equal would be two that should be one


def test_neighbouring_sequences_share_a_range() -> None:
    plan = plan_for(Thresholds(precise_tail=0), [Sequence(0, 5, 9), Sequence(3, 4, 9)])
    assert (plan.quantized, plan.precise) == (((0, 9),), ())
    plan = plan_for(Thresholds(), [Sequence(9, 1, 4), Sequence(5, 1, 2), Sequence(0, 3, 3)])
    assert (plan.quantized, plan.precise) == (((2, 4),), ((0, 2), (4, 5)))


def test_an_example_in_full() -> None:
    """A decode, a prompt's last chunk, a padded prompt, and a prompt with drafts behind it."""
    batch = [Sequence(30, 1, 20), Sequence(16, 8, 24), Sequence(-3, 9, 6), Sequence(10, 8, 14)]
    plan = plan_for(Thresholds(min_prefill_tokens=13, precise_head=2, precise_tail=1), batch)
    #  0   | 1 ... 7 | 8 | 9 10 11 | 12 13 | 14 15 16 | 17 | 18 19 20 | 21 22 23 24 25
    # decode  chunk  tail  padding    head   allowed   tail   allowed   tail, 4 drafts
    assert plan.rows == 26
    assert plan.quantized == ((1, 8), (14, 17), (18, 21))
    assert plan.precise == ((0, 1), (8, 9), (12, 14), (17, 18), (21, 26))
    one_more = Thresholds(min_prefill_tokens=14, precise_head=2, precise_tail=1)
    assert plan_for(one_more, batch).quantized == ()
    assert plan_for(one_more, batch).precise == ((0, 9), (12, 26))


@given(
    st.integers(0, 40),
    st.integers(0, 6),
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(0, 8),
    st.integers(0, 8),
)
def test_chunks_do_not_matter(
    prompt: int, padding: int, chunks: list[int], head: int, tail: int
) -> None:
    """However a prompt is cut, the same tokens are quantized, also if the tail begins in an earlier
    chunk than the last."""
    t = Thresholds(min_prefill_tokens=0, precise_head=head, precise_tail=tail)
    whole = kinds_of(plan_for(t, [Sequence(-padding, padding + prompt, prompt)]))
    pieces: list[str] = []
    position = -padding
    while position < prompt:
        rows = min(chunks[len(pieces) % len(chunks)], prompt - position)
        pieces += kinds_of(plan_for(t, [Sequence(position, rows, prompt)]))
        position += rows
    assert pieces == whole


def test_a_tail_longer_than_the_last_chunk() -> None:
    t = Thresholds(precise_tail=5)
    assert plan_for(t, [Sequence(0, 8, 10)]).quantized == ((0, 5),)
    assert plan_for(t, [Sequence(8, 2, 10)]).quantized == ()


@given(thresholds, sequences, st.randoms(use_true_random=False))
def test_what_else_is_in_the_batch_does_not_matter(
    t: Thresholds, batch: list[Sequence], random: object
) -> None:
    t = replace(t, min_prefill_tokens=0)
    alone = {s: kinds_of(plan_for(t, [s])) for s in batch}
    assert kinds_of(plan_for(t, batch)) == [kind for s in batch for kind in alone[s]]
    shuffled = list(batch)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert kinds_of(plan_for(t, shuffled)) == [kind for s in shuffled for kind in alone[s]]


@given(thresholds, sequences)
def test_rows_count_over_the_whole_pass(t: Thresholds, batch: list[Sequence]) -> None:
    """The least number of rows is all or nothing, and padding, head and tail are not in it."""
    allowed = plan_for(replace(t, min_prefill_tokens=0), batch).quantized_rows
    found = plan_for(t, batch).quantized_rows
    assert found == (allowed if allowed >= t.min_prefill_tokens else 0)


@given(thresholds, sequences)
def test_a_pass_that_may_replay_a_graph_is_precise(t: Thresholds, batch: list[Sequence]) -> None:
    t = replace(t, min_prefill_tokens=0)
    assert plan_for(t, batch, graph=True).quantized == ()


def test_arrays_are_taken_as_lists_are() -> None:
    batch = [Sequence(0, 9, 9), Sequence(12, 1, 9)]
    lists = plan_for(Thresholds(), batch)
    for kind in (np.int32, np.int64, np.uint32):
        arrays = [
            np.array([getattr(s, key) for s in batch], dtype=kind)
            for key in ("first", "rows", "prompt")
        ]
        assert plan_pass(Thresholds(), *arrays) == lists
    assert plan_pass(Thresholds(), [], [], []) == PhasePlan(0, (), ())


@pytest.mark.parametrize(
    ("first", "rows", "prompt", "message"),
    [
        ([0], [1, 2], [3], "one entry per sequence"),
        ([0, 0], [1, 2], [3], "one entry per sequence"),
        ([[0]], [[1]], [[2]], "one entry per sequence"),
        ([0], [-1], [3], "negative"),
        ([0], [1], [-3], "negative"),
    ],
)
def test_what_is_no_pass_is_refused(
    first: list[int], rows: list[int], prompt: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plan_pass(Thresholds(), first, rows, prompt)
    assert "\n" not in str(caught.value)


# --- the plan in force -----------------------------------------------------------------------------


def test_a_plan_ends_with_its_pass() -> None:
    plan = everything_quantized(3)
    assert plan_in_force() is None
    with in_force(plan):
        assert plan_in_force() is plan
        with in_force(None):
            assert plan_in_force() is None  # a pass without a plan hides the one around it
        assert plan_in_force() is plan
    assert plan_in_force() is None


def test_a_pass_cannot_begin_inside_another_one() -> None:
    plan = everything_quantized(3)
    with in_force(plan):
        with pytest.raises(RuntimeError, match="inside another one"), in_force(plan):
            pass
        assert plan_in_force() is plan
    assert plan_in_force() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_ends_too(error: type[BaseException]) -> None:
    with pytest.raises(error), in_force(everything_quantized(3)):
        raise error
    assert plan_in_force() is None


def test_a_plan_is_in_force_in_its_thread_only() -> None:
    seen: list[PhasePlan | None] = []
    with in_force(everything_quantized(3)):
        thread = threading.Thread(target=lambda: seen.append(plan_in_force()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_everything_quantized_has_no_precise_row() -> None:
    assert kinds_of(everything_quantized(5)) == ["quantized"] * 5
    assert everything_quantized(0) == PhasePlan(0, (), ())


def test_what_is_derived_belongs_to_one_plan() -> None:
    one, other = everything_quantized(3), everything_quantized(3)
    assert one.derived(int, lambda plan: plan.rows) == 3
    assert one.derived(int, lambda plan: 5) == 3  # made once
    assert one.derived(str, lambda plan: "of another type") == "of another type"
    assert one == other
    assert other.derived(int, lambda plan: 5) == 5
    assert not (other.index or other.encoded)
