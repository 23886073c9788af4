"""Agent traces: which are refused, and what is replayed of the others."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import REPOSITORY

from mixquant.bench.trace import BUILTIN, Session, TraceError, parse, read_trace, turns
from mixquant.bench.workloads import Plan, points

GOOD = {"session": "s", "messages": [
    {"role": "user", "content": "What does pass do?"},
    {"role": "assistant", "content": "Nothing."},
]}  # fmt: skip


def changed(**values: Any) -> dict[str, Any]:
    return {**GOOD, **values}


class Characters:
    """A tokenizer of characters."""

    all_special_ids = ()

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 97, "b": 98}

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def text_of(tokens: tuple[int, ...]) -> str:
    return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ('{"session": "a", "messages": [], "session": "b"}', "the key 'session' appears twice"),
        ("[" * 100_000, "nested deeper than 100 levels"),
        ("[]", "line 2: Input should be"),
        (json.dumps(changed(session="")), "line 2, field 'session'"),
        (json.dumps(changed(session=7)), "line 2, field 'session'"),
        (json.dumps({"messages": GOOD["messages"]}), "line 2, field 'session'"),
        (json.dumps({"session": "s"}), "line 2, field 'messages'"),
        (json.dumps(changed(messages=[])), "line 2, field 'messages'"),
        (json.dumps(changed(messages="hello")), "line 2, field 'messages'"),
        (
            json.dumps(changed(messages=[*GOOD["messages"], {"role": "robot", "content": "x"}])),
            "line 2, field 'messages.2.role'",
        ),
        (
            json.dumps(changed(messages=[*GOOD["messages"], {"role": "user"}])),
            "line 2, field 'messages.2': Value error, a message has either content or tool_calls",
        ),
        (
            json.dumps(changed(messages=[{"role": "user", "content": 5}, GOOD["messages"][1]])),
            "line 2, field 'messages.0.content'",
        ),
        (
            json.dumps(changed(messages=GOOD["messages"][::-1])),
            "the first message is the assistant's",
        ),
        (json.dumps(changed(messages=[GOOD["messages"][0]] * 2)), "there is no turn to replay"),
        (json.dumps(changed(session="first")), "field 'session': 'first' occurs twice"),
        (json.dumps(changed(session="\ud800")), "line 2 is not JSON: it holds half a"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number_and_field(line: str, says: str) -> None:
    text = json.dumps(changed(session="first")) + "\n" + line + "\n"
    with pytest.raises(TraceError) as raised:
        parse(text, "t.jsonl")
    assert says in str(raised.value)
    assert str(raised.value).startswith("t.jsonl, line 2")
    assert "\n" not in str(raised.value)


def test_a_file_without_a_session_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="holds no session"):
        parse("\n \n", "t.jsonl")
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(str(tmp_path))
    binary = tmp_path / "t.jsonl"
    binary.write_bytes(b"\xff")
    with pytest.raises(TraceError, match="not UTF-8"):
        read_trace(str(binary))


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
others = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "tool", "developer"]),
    texts,
)
answers = st.one_of(
    st.builds(lambda content: {"role": "assistant", "content": content, "extra": 1}, texts),
    st.builds(
        lambda name: {"role": "assistant", "content": None, "tool_calls": [{"name": name}]}, texts
    ),
)
conversations = st.builds(
    lambda first, rest, last: [first, *rest, last],
    others,
    st.lists(st.one_of(others, answers), max_size=8),
    answers,
)


@given(st.lists(conversations, min_size=1, max_size=4))
def test_every_answer_is_a_turn_that_reads_all_before_it(all_messages: list[list[Any]]) -> None:
    lines = [
        json.dumps({"session": str(i), "messages": m}, ensure_ascii=bool(i % 2))
        for i, m in enumerate(all_messages)
    ]
    sessions = parse("\n".join(lines), "t.jsonl")
    assert len(sessions) == len(all_messages)
    for session, messages in zip(sessions, all_messages, strict=True):
        requests = turns(session, Characters(), "mark")
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(requests) == len(spoken)
        for request, place in zip(requests, spoken, strict=True):
            assert text_of(request.prompt).startswith("mark\n")
            for message in messages[:place]:
                assert (message["content"] or "") in text_of(request.prompt)
            assert request.output_tokens >= 1
        for before, after in pairwise(requests):
            # What a prefix cache can use: the prompt before, and the recorded answer.
            assert after.prompt[: len(before.prompt)] == before.prompt
            assert len(after.prompt) >= len(before.prompt) + before.output_tokens


def test_runs_and_concurrencies_share_no_prefix() -> None:
    sessions = tuple(read_trace(BUILTIN))
    plan = Plan((), (), (2, 99), (), (), sessions, 10, 5, seed=3)
    found = [point for point in points(plan, Characters()) if point.workload == "agent"]
    assert [point.concurrency for point in found] == [2, len(sessions)]
    beginnings = [
        text_of(point.run(number)[0][0].prompt).split("\n")[0]
        for point in found
        for number in range(3)
    ]
    assert len(set(beginnings)) == len(beginnings) == 6
    # Within a run the sessions begin alike, and the warm-up is one of them.
    assert len({text_of(s[0].prompt).split("\n")[0] for s in found[0].run(1)}) == 1
    assert len(found[0].run(0)) == 1
    requests = [request for session in found[0].run(1) for request in session]
    assert found[0].prompt_tokens == sum(len(request.prompt) for request in requests)
    assert found[0].longest == max(len(r.prompt) + r.output_tokens for r in requests)


def test_the_trace_that_ships_has_an_agents_shape(smollm2: tuple[Any, Any]) -> None:
    """Prompts grow by tool results, long and short, and much more is read than written."""
    _, tokenizer = smollm2
    sessions = read_trace(BUILTIN)
    assert len(sessions) >= 4
    new: list[int] = []
    for session in sessions:
        assert session.messages[0] == sessions[0].messages[0]  # the instructions can be reused
        assert any(message.role == "tool" for message in session.messages)
        requests = turns(session, tokenizer, "mark")
        lengths = [len(request.prompt) for request in requests]
        new += [after - before for before, after in pairwise([0, *lengths])]
        assert lengths == sorted(lengths)
        assert max(lengths) + max(r.output_tokens for r in requests) <= 8192
        assert sum(r.output_tokens for r in requests) < lengths[-1] / 3
    assert min(new) < 128 < max(new)  # some turns stay below min_prefill_tokens
    assert max(new) > 1500


def test_messages_say_who_wrote_them() -> None:
    lines = (REPOSITORY / "src/mixquant/bench/data/agent_trace.jsonl").read_text()
    for line in lines.splitlines():
        Session.model_validate_json(line)
        for message in json.loads(line)["messages"]:
            if message["role"] == "assistant":
                assert message["by"] in ("script", "SmolLM2-135M-Instruct")
