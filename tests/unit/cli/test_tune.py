"""`mixquant tune`: a tiny model from the command line, and what it refuses before it loads one."""

from __future__ import annotations

import random
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import second_checkpoints
import tiny_models
from refusals import refusal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixquant import cli, results
from mixquant.cli.tune import DEFAULT_TEXTS, _built_in
from mixquant.core.recipe import Recipe
from mixquant.evaluate.fidelity.passages import documentation
from mixquant.files.folders import alone_in


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model in which each word is a token."""
    folder = tmp_path_factory.mktemp("tiny")
    words = {f"w{number}": number for number in range(tiny_models.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny_models.build("llama").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """The options of two texts to search on and two to hold out."""
    options = []
    for number, option in enumerate(("--text", "--text", "--held-out", "--held-out")):
        file = tmp_path / f"{number}.txt"
        words = random.Random(number).choices(range(3, tiny_models.VOCABULARY), k=160)
        file.write_text(" ".join(f"w{word}" for word in words))
        options += [option, str(file)]
    return options


def test_a_recipe_and_its_report(
    capsys: pytest.CaptureFixture[str], tiny: str, texts: list[str], tmp_path: Path
) -> None:
    recipe, frontier, page = (tmp_path / name for name in ("r.json", "f.json", "p.html"))
    command = ["tune", tiny, "--target", "blackwell", "--recovered", "0.9", *texts]
    short = ["--length", "128", "--answer-tokens", "16"]
    command += [*short, "--check-length", "136", "--cost-length", "4096"]
    command += ["--out", str(recipe), "--json", str(frontier)]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "tuned" in printed.out and "Measured over predicted" in printed.out
    assert "128 tokens searched on, of 136 held out" in " ".join(printed.out.split())
    said = " ".join(printed.err.split())
    assert f"Recipe written to {recipe}" in said
    assert "The budget was checked with prompts of 136 tokens." in said

    found = results.read(frontier)
    assert isinstance(found, results.Tuning)
    assert (found.prompt_tokens, found.check_tokens) == (128, 136)
    tuned = next(one for one in found.tried if one.arm == "tuned")
    assert tuned.recovered is not None and tuned.recovered >= 0.9
    assert tuned.time is not None and tuned.time > 1
    written = Recipe.load(recipe)
    assert ("vLLM on a GPU scales rows by 6" in said) == (written.block_scale == "4/6")
    assert written.to_dict() == next(arm.recipe for arm in found.arms if arm.name == "tuned")

    assert cli.main(["fidelity", tiny, "--recipe", str(recipe), *texts[:2], *short]) == 0
    assert cli.main(["report", str(frontier), "--out", str(page)]) == 0
    assert "Tuning" in page.read_text() and "with prompts of 136 tokens" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kl", "0.1", "--bits", "5"], "give one budget: --kl, --recovered or --bits"),
        (["--recovered", "1.5"], "'--recovered'"),
        (["--kl", "inf"], "expected a finite number, got inf"),
        (["--target", "volta"], "'--target'"),
        (["--text", __file__], "give both --text and --held-out"),
        (["--held-out", __file__], "give both --text and --held-out"),
        (["--text", __file__, "--held-out", __file__, "--texts", "4"], "leave it out with --text"),
        (["--out", "nowhere/x.json"], "cannot write nowhere/x.json"),
        (["--out", "x.json", "--json", "./x.json"], "--out and --json both name x.json"),
        (["--length", "1000"], "exceed the context"),
        (["--check-length", "1000"], "exceed the context"),
        (["--rates", "nowhere.json"], "cannot read rates from nowhere.json"),
        (["--rates", __file__], "cannot read rates from"),
        (
            ["--text", __file__, "--held-out", __file__, "--length", "8", "--answer-tokens", "2"],
            "of the texts of --held-out begin like texts of --text",
        ),
    ],
)
def test_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.setattr("mixquant.tune.measure.load_model", None)
    monkeypatch.chdir(tmp_path)
    assert says in refusal(capsys, "tune", tiny, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_stopped_says_where_its_work_is(
    capsys: pytest.CaptureFixture[str],
    tiny: str,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mixquant.tune.run.draw", stop)
    recipe, work = tmp_path / "r.json", tmp_path / "r.work"
    command = ["tune", tiny, "--target", "hopper", *texts, "--length", "32", "--out", str(recipe)]
    assert cli.main([*command, "--answer-tokens", "8"]) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert f"Stopped. The work done is in {work}; the same command continues from there." in said
    assert work.is_dir() and not recipe.exists()


def test_built_in_texts_are_as_many_as_are_long_enough() -> None:
    def words(text: str) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    shortest = {
        n: min(len(text.split()) for text in documentation(n).values()) for n in (24, 16, 8)
    }
    assert shortest[24] < shortest[16] < shortest[8]
    for number, least in shortest.items():
        assert len(_built_in(None, words, least)) == number
    assert len(_built_in(None, words, 10**9)) == 8  # `cut` says what is too short
    assert len(_built_in(5, words, 10**9)) == 5


def test_topics_searched_on_with_one_number_are_not_held_out_with_another() -> None:
    halves = [
        ["\n".join(list(documentation(number).values())[half::2]) for number in DEFAULT_TEXTS]
        for half in (0, 1)
    ]
    for topic in topics.values():
        if sum(topic.strip() in other for other in topics.values()) > 1:
            continue  # "if" is also "else"
        assert {sum(topic in text for text in half) for half in halves} == {0, len(DEFAULT_TEXTS)}


def test_a_second_run_in_the_same_folder_is_refused(
    capsys: pytest.CaptureFixture[str], tiny: str, texts: list[str], tmp_path: Path
) -> None:
    work = tmp_path / "r.work"
    command = ["tune", tiny, "--target", "hopper", *texts, "--length", "32", "--answer-tokens", "8"]
    command += ["--out", str(tmp_path / "r.json")]
    with alone_in(work, "--work"):
        assert f"another process writes to {work}: wait for it" in refusal(capsys, *command)
    assert cli.main(command) == 0  # its lock is no other file


def test_a_prefill_model(
    capsys: pytest.CaptureFixture[str], tiny: str, texts: list[str], tmp_path: Path
) -> None:
    second = str(second_checkpoints.write(Path(tiny), tmp_path / "nvfp4"))
    recipe = tmp_path / "r.json"
    command = ["tune", tiny, "--target", "blackwell", "--recovered", "0.8", "--out", str(recipe)]
    command += [*texts, "--length", "128", "--answer-tokens", "16"]
    nowhere = refusal(capsys, *command, "--prefill-model", "no/where/else")
    assert "'no/where/else' is not a checkpoint: there is no such directory" in nowhere
    assert not recipe.with_suffix(".work").exists()
    assert cli.main([*command, "--prefill-model", second]) == 0
    assert "prefill model" in capsys.readouterr().out
    assert Recipe.load(recipe).prefill_model == second
    measure = ["fidelity", tiny, "--recipe", str(recipe), *texts[:2], "--length", "128"]
    assert cli.main([*measure, "--answer-tokens", "16"]) == 0


def test_rates(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    for text in ('{"tflops": {"fp8": 1200}}', '{"tflops": {"bf16": 0}}', '{"bf16": 650}', "[]"):
        file.write_text(text)
        assert "holds no rates" in refusal(capsys, "tune", tiny, "--rates", str(file))
