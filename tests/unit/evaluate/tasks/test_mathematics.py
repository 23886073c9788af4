r"""Mathematics: data, prompts, and what counts as the same answer."""

from __future__ import annotations

import asyncio
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from example_counts import up_to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixquant.evaluate.tasks import Item, TaskError, mathematics
from mixquant.evaluate.tasks.isolation import IsolationError, isolated
from mixquant.evaluate.tasks.registry import task

pytest.importorskip("math_verify")

# reference, what a model boxes
SAME = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", r"\dfrac{1}{2}"),
    ("1/2", r"\tfrac{1}{2}"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    (r"-\frac{35}{9}", "-3.888888889"),
    (r"\frac{243}{625}", "0.3888"),
    (r"3\frac{1}{2}", "3.5"),
    (r"3\frac{1}{2}", r"\frac{7}{2}"),
    (r"1\frac{4}{5}", "1 4/5"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"0.1\overline{6}", r"\frac{1}{6}"),
    ("0.333333", r"\frac{1}{3}"),
    (r"10\%", "10"),
    (r"10\%", "0.1"),
    (r"10\%", "10%"),
    (r"90^\circ", "90"),
    (r"90^\circ", "90 degrees"),
    (r"90^\circ", r"90\text{ degrees}"),
    ("60", "60°"),
    ("5", r"5\text{ cm}"),
    ("5", "5 cm"),
    (r"5\text{ cm}^2", "5"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"\$18.90", "18.90"),
    (r"\$18.90", "18.9"),
    ("12,345", "12345"),
    (r"12,\!345", "12345"),
    ("12{,}345", "12345"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("1{,}000{,}000", "10^6"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"),
    (r"2\sqrt3", r"2 \cdot \sqrt{3}"),
    (r"70 \sqrt{2}", "98.99494936611666"),
    (r"3^{\frac12}", r"\sqrt 3"),
    (r"1.5\times10^{3}", "1500"),
    ("2^{10}", "1024"),
    ("10!", "3628800"),
    (r"\dbinom{10}{3}", "120"),
    (r"\log_2 8", "3"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty,2]", r"x\le 2"),
    ("[2,5)", r"2 \le x < 5"),
    (r"(-\infty, 2)\cup(3,\infty)", r"(-\infty,2) \cup (3, \infty)"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("1,2", "2,1"),
    ("1,2", r"\{2,1\}"),
    (r"\{1,2\}", r"1 \text{ and } 2"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19},1+\sqrt{19}"),
    (r"\{-1, 3\}", r"x=-1 \text{ or } x=3"),
    (r"\emptyset", r"\varnothing"),
    ("(3,4)", r"\left(3, 4\right)"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)"),
    ("(6,31,-1)", "6, 31, -1"),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
    ),
    ("x^2+2x+1", "(x+1)^2"),
    ("p - q", "-q+p"),
    (r"\cot x", r"\frac{1}{\tan x}"),
    ("6+9i", "9i+6"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("y=2x+3", "2x+3"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    (r"2\pi", "2π"),
    ("2516_8", "2516_{8}"),
    ("27", "027"),
    ("27", "27.0"),
    ("27", "27."),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    (r"\text{(C)}", "(C)"),
    (r"\text{June 20}", "June 20"),
    ("even", r"\text{even}"),
    ("-18", "–18"),
    ("-18", "−18"),
    ("-18", "－18"),
    (r"-\frac{1}{2}", "–1/2"),
    ("18", "１８"),
    ("0.5", "０．５"),
    ("1500", "1.5e3"),
    ("1500", "1.5E+3"),
    ("0.0015", "1.5e-3"),
    ("1500", "1.5 x 10^3"),
    ("1500", "1.5×10^{3}"),
    ("18", "18 dollars"),
    ("18", "$18 dollars."),
    ("18", "18 eggs per day"),
    ("18", "18 km/h"),
    ("18", "USD 18"),
    ("18", "€18"),
    ("18 dollars", "18"),
]

DIFFERENT = [
    ("0.5", "0.05"),
    (r"\frac12", r"\frac21"),
    (r"3\frac{1}{2}", r"\frac{3}{2}"),
    (r"\frac{1}{3}", "0.3"),
    (r"\frac{1}{3}", "0.33"),
    (r"0.\overline{3}", "0.3"),
    (r"10\%", "1"),
    (r"50\%", "0.05"),
    (r"90^\circ", r"\frac{\pi}{3}"),
    ("-5", "5"),
    ("10", "100"),
    ("12345", "12,346"),
    ("12", "1,2"),
    ("123", "12 3"),
    ("1,000", "1"),
    (r"\sqrt{2}", "1.414"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    (r"\pi", "3.14"),
    (r"\frac{22}{7}", r"\pi"),
    (r"1.5\times10^3", r"1.5\times10^4"),
    ("6", "6!"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1]"),
    ("[0,1)", "[0,1]"),
    (r"(-\infty,2)", r"(-\infty,2]"),
    ("3", "x>3"),
    ("1,2", "1,3"),
    ("1,2", "1"),
    ("1", "1,2"),
    ("3", r"\{3,4\}"),
    ("0", r"\emptyset"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"),
    ("x^2", "x^3"),
    ("x+1", "y+1"),
    ("7", "7x"),
    ("i", "1"),
    ("x=5", "y=6"),
    ("2516_8", "2517_8"),
    (r"\text{Evelyn}", "Briana"),
    (r"\text{(C)}", r"\text{(D)}"),
    ("C", "B"),
    ("even", "odd"),
    ("5", ""),
    ("5", r"\text{none}"),
    ("18", "–18"),
    ("2", "10–8"),
    ("5", "5 million"),
    ("2", "2 pi"),
    ("3", "3 x"),
    ("1.5", "1.5e3"),
    ("18", "18 and 20"),
    ("18", "19 dollars"),
]

# reference, a whole answer, whether it is right
ANSWERS = [
    ("42", r"<think>\boxed{1}</think>So it is $\boxed{42}$.", True),
    ("42", r"\boxed{42} is what I thought first, but it is \boxed{43}.", False),
    ("42", r"First \boxed{7}; then \boxed{42}.", True),
    ("42", r"<think>It must be \boxed{42}", False),
    ("42", "The final answer is 42.", True),
    ("42", "Hence $x = 42$.", True),
    ("42", "#### 42", True),
    ("42", "So she makes 6 * 7 = $42 every day.", True),
    ("42", "I do not know.", False),
    ("42", "", False),
    ("42", r"\boxed{}", False),
    ("42", r"\boxed{42", False),
    ("-42", "It falls to –42 degrees.", True),
    ("-42", "It falls to −42.", True),
    ("42", "一共 ４２", True),
    ("1500", "That is 1.5e3 metres.", True),
    ("1500", "That is 1.5 × 10^3 metres.", True),
    ("42", r"She makes \$42.", True),
    ("42", "She makes 42 dollars – more than before.", True),
]

HOSTILE = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{(10^{10^{10}})!}",
    r"\boxed{\int_0^1 e^{x^{x^{x}}} dx}",
    r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^3+\sin n}}",
    r"\boxed{" + r"\frac{1}{" * 300 + "1" + "}" * 300 + "}",
    r"\boxed{" + "(" * 900 + "}",
    r"\boxed{x^{999999999}-y^{999999999}}",
    r"\boxed{\prod_{k=1}^{99999999} k}",
    r"\boxed{__import__('os').system('touch hacked')}",
    "9**9**9**9",
    "\\boxed{" * 20000,
    "1+" * 100_000,
    "\x00\ud7ff\U0010ffff",
    "def f():\n    while True: pass\n",
]


def _item(reference: str) -> Item:
    return Item("1", ({"role": "user", "content": "?"},), reference)


def _scores(pairs: list[tuple[str, str]], name: str = "math500") -> list[float]:
    """Of answers to references, all under way at once."""
    benchmark = task(name)

    async def all_of_them() -> list[float]:
        verdicts = await asyncio.gather(
            *(benchmark.score(_item(wanted), {"text": text}) for wanted, text in pairs)
        )
        return [verdict.score for verdict in verdicts]

    return asyncio.run(all_of_them())


def test_equivalent_answers_are_right() -> None:
    scores = _scores([(wanted, rf"So it is $\boxed{{{found}}}$.") for wanted, found in SAME])
    assert [pair for pair, score in zip(SAME, scores, strict=True) if score != 1.0] == []


def test_other_answers_are_wrong() -> None:
    scores = _scores([(wanted, rf"\boxed{{{found}}}") for wanted, found in DIFFERENT])
    assert [pair for pair, score in zip(DIFFERENT, scores, strict=True) if score != 0.0] == []


def test_the_answer_is_what_stands_in_the_last_box_or_ends_the_prose() -> None:
    scores = _scores([(wanted, text) for wanted, text, _ in ANSWERS])
    wrong = [case for case, score in zip(ANSWERS, scores, strict=True) if (score == 1.0) != case[2]]
    assert wrong == []


def test_answers_in_which_nothing_was_found_say_so() -> None:
    texts = {r"\boxed{7}": True, "It is 7.": True, "No idea.": False, "": False, r"\boxed{}": False}
    benchmark = task("gsm8k")

    async def all_of_them() -> list[bool]:
        scored = (benchmark.score(_item("42"), {"text": text}) for text in texts)
        return [verdict.extracted for verdict in await asyncio.gather(*scored)]

    assert asyncio.run(all_of_them()) == list(texts.values())


def test_hostile_answers_are_wrong_and_right_ones_after_them_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as sooner:  # than after ten seconds
        sooner.setattr(mathematics, "isolated", partial(isolated, seconds=1))
        assert _scores([("42", text) for text in HOSTILE]) == [0.0] * len(HOSTILE)
    assert _scores([("42", "{" * 200_000 + r"\boxed{42}")]) == [1.0]
    assert not (tmp_path / "hacked").exists()


LATEX = st.lists(
    st.sampled_from(
        [r"\frac", r"\sqrt", "{", "}", "^", "_", "(", ")", "[", "]", "1", "2", "x", "=", ",", r"\%"]
        + [r"\cup", r"\infty", r"\text{", r"\boxed{", "&", r"\\", r"\begin{pmatrix}", "!", "<", " "]
    ),
    max_size=25,
).map("".join)


@settings(max_examples=up_to(40), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LATEX | st.text())
def test_no_answer_raises(text: str) -> None:
    assert set(_scores([("42", text), ("42", rf"\boxed{{{text}}}")])) <= {0.0, 1.0}


def test_a_call_that_hangs_is_killed() -> None:
    with pytest.raises(IsolationError, match=r"took longer than 0\.5 s"):
        asyncio.run(isolated(time.sleep, 600, seconds=0.5))


def test_a_call_that_eats_memory_or_ends_its_process_does_no_harm() -> None:
    with pytest.raises(IsolationError, match="MemoryError"):
        asyncio.run(isolated(bytearray, 2**40))
    with pytest.raises(IsolationError):
        asyncio.run(isolated(os._exit, 1))
    assert asyncio.run(isolated(abs, -1)) == 1


def _load(name: str, path: Path) -> list[Item]:
    return task(name).load(path, cut=lambda text: text)


def _write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


MATH = {
    "problem": "What is $1+1$?",
    "solution": r"It is $\boxed{2}$.",
    "answer": "2",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/1.json",
}


def test_math500_as_published(tmp_path: Path) -> None:
    (item,) = _load("math500", _write(tmp_path / "math.jsonl", MATH))
    assert item.id == "test/prealgebra/1.json"
    assert item.group == "level 1"
    assert item.messages[0]["content"] == (
        "What is $1+1$?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert item.reference == "2"


@pytest.mark.parametrize(
    "record",
    [
        {"id": 60, "problem": "P", "solution": "S", "answer": "033", "url": "", "year": "2024"},
        {"ID": "2024-I-1", "Problem": "P", "Solution": "S", "Answer": 33},
        {"id": 60, "problem": "P", "solution": r"\boxed{033}", "url": ""},
    ],
    ids=["HuggingFaceH4/aime_2024", "Maxwell-Jia/AIME_2024", "math-ai/aime24"],
)
def test_aime_in_each_published_schema(tmp_path: Path, record: dict[str, Any]) -> None:
    (item,) = _load("aime24", _write(tmp_path / "aime.jsonl", record))
    assert item.id in ("60", "2024-I-1")
    assert item.reference == "33"
    assert "\\boxed{}" in item.messages[0]["content"]


def test_gsm8k_as_published(tmp_path: Path) -> None:
    record = {"question": "How many?", "answer": "500 + 734 = <<500+734=1234>>1234\n#### 1,234"}
    items = _load("gsm8k", _write(tmp_path / "gsm8k.jsonl", record, record))
    assert [item.id for item in items] == ["1", "2"]
    assert items[0].reference == "1234"
    assert _scores([("1234", r"\boxed{\$1,234.00}"), ("1234", r"\boxed{1235}")], "gsm8k") == [1, 0]


def test_parquet_json_and_json_lines_hold_the_same(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([MATH]), tmp_path / "math.parquet")
    (tmp_path / "math.json").write_text(json.dumps([MATH], indent=1))
    _write(tmp_path / "math.jsonl", MATH)
    loaded = [_load("math500", tmp_path / f"math.{end}") for end in ("parquet", "json", "jsonl")]
    assert loaded[0] == loaded[1] == loaded[2]


def _without(field: str) -> dict[str, Any]:
    return {key: value for key, value in MATH.items() if key != field}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("math500", json.dumps(MATH) + "\n{", r"data\.jsonl, line 2: not JSON"),
        ("math500", '{"problem": "1", "problem": "2"}', r"the key 'problem' appears twice"),
        ("math500", '[{"a": {"b": 1, "b": 1}}]', r"the key 'b' appears twice"),
        ("math500", "[1, 2", r"data\.jsonl: not JSON: line 1, column 6"),
        ("math500", json.dumps([MATH, 3]), r"record 2: expected an object, found int"),
        ("math500", json.dumps(_without("answer")), r"line 1: field 'answer': Field required"),
        ("math500", json.dumps({**MATH, "problem": ""}), r"line 1: field 'problem'"),
        ("math500", json.dumps({**MATH, "answer": [2]}), r"line 1: field 'answer'.*string"),
        ("math500", f"{json.dumps(MATH)}\n{json.dumps(MATH)}", r"record 2: id .* is there twice"),
        ("math500", "", r"holds no record"),
        ("math500", "[]", r"holds no record"),
        ("aime25", '{"problem": "P", "answer": "1.5"}', r"field 'answer': expected an integer"),
        ("gsm8k", '{"question": "Q", "answer": "five"}', r"field 'answer': .*ends with ####"),
    ],
)
def test_wrong_data_says_which_line_and_field(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(TaskError, match=message) as caught:
        _load(name, path)
    assert "\n" not in str(caught.value)


def test_unreadable_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="No such file"):
        _load("math500", tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match="directory"):
        _load("math500", tmp_path)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="not UTF-8"):
        _load("math500", tmp_path / "binary.jsonl")


def test_without_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(TaskError, match=r"cannot load .* from the Hub .*--data") as caught:
        task("aime24").load(None, cut=lambda text: text)
    assert "\n" not in str(caught.value)


def test_an_unknown_benchmark_is_answered_with_the_known() -> None:
    with pytest.raises(TaskError, match=r"unknown benchmark 'mmlu'.*math500.*tau2-bench"):
        task("mmlu")
