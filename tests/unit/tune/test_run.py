"""The run on a tiny model: measured like `mixquant fidelity`, predicted, decided, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import second_checkpoints
import tiny_models
import torch

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.models import Checkpoint, find
from mixquant.core.recipe import FormatName, Recipe
from mixquant.evaluate.fidelity import answers_transformers
from mixquant.evaluate.fidelity.passages import Passages
from mixquant.evaluate.fidelity.run import figures
from mixquant.files.folders import FolderError
from mixquant.tune import measure, sensitivity
from mixquant.tune import run as running
from mixquant.tune.budget import Budget
from mixquant.tune.choice import Choice
from mixquant.tune.cost import CostModel
from mixquant.tune.run import Texts, Tuned, Tuner
from mixquant.tune.search import Predictor
from mixquant.tune.sensitivity import draw, edges, variants_of
from mixquant.tune.targets import NOMINAL, Target, target
from mixquant.tune.units import units_of
from mixquant.tune.work import Work, WorkError

BLACKWELL = Target("blackwell", ("nvfp4", "fp8"), NOMINAL)


def passages(seed: int, texts: int = 2, prompt: int = 96, answer: int = 12) -> Passages:
    random = np.random.default_rng(seed)
    tokens = random.integers(3, tiny_models.VOCABULARY, size=(texts, prompt + answer)).tolist()
    return Passages(
        prompt,
        tuple(tuple(one[:prompt]) for one in tokens),
        tuple(tuple(one[prompt:]) for one in tokens),
    )


def texts(seed: int) -> Texts:
    return Texts((f"first of {seed}", f"second of {seed}"), passages(seed))


def tuner(checkpoint: Checkpoint, folder: Path, budget: Budget, **changes: Any) -> Tuner:
    given = {"target": BLACKWELL, "searched": texts(1), "held_out": texts(2), **changes}
    return Tuner(
        checkpoint, budget=budget, cost_tokens=2048, folder=folder, command="mixquant tune", **given
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for runs of several budgets, which measure much of the same."""
    return tmp_path_factory.mktemp("tuned") / "work"


def same(one: Tuned, other: Tuned) -> bool:
    results = [
        tuned.results.model_copy(update={"environment": one.results.environment})
        for tuned in (one, other)
    ]
    return one.recipe == other.recipe and results[0] == results[1]


@pytest.mark.parametrize("everywhere", [False, True])
def test_divergence_is_that_of_fidelity(checkpoint: Checkpoint, everywhere: bool) -> None:
    """The continuation read with the prompt, or token by token: the same divergence."""
    recipe = Recipe(
        format={"default": "nvfp4", "k_proj": "fp8", "*.layers.1.mlp.up_proj": "bf16"},
        min_prefill_tokens=0,
        precise_tail=16,
        prefill_attention="bf16",
        everywhere=everywhere,
    )
    some = passages(5)
    reference, own = (answers_transformers.run(checkpoint, one, [some]) for one in (None, recipe))
    judged = figures("arm", some, reference.answers[0], own.answers[0])
    logits = measure.in_bf16(checkpoint, lambda model: measure.logits(model, some))
    found = measure.kl(checkpoint, recipe, some, logits)
    assert found == pytest.approx(judged.kl_mean, rel=0.1)
    assert found > 0.01


def test_predictions_are_near_what_is_measured(checkpoint: Checkpoint) -> None:
    """One projection quantized, and several, with precise heads and tails."""
    some = passages(3, texts=4)
    borders = edges(96, (0, 16), (1, 32))
    variants = variants_of(("nvfp4", "fp8"))
    model = measure.load_model(checkpoint)
    before = [parameter.requires_grad for parameter in model.parameters()]
    units = units_of(model, ("nvfp4", "fp8"))
    draws = draw(model, units, some, variants, borders, 32, seed=0)
    assert draws.shape == (128, 14, 3, 4)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert not model.get_submodule("model.layers.0.mlp.up_proj")._forward_hooks
    reference = measure.logits(model, some)
    predictor = Predictor(draws, variants, tuple(borders))
    bf16: tuple[FormatName, ...] = ("bf16",) * 14
    ratios = []
    cases: tuple[tuple[tuple[FormatName, ...], int, int], ...] = (
        (("nvfp4", *bf16[1:]), 0, 1),
        ((*bf16[:2], "nvfp4", *bf16[3:]), 0, 1),
        ((*bf16[:9], "nvfp4", *bf16[10:]), 0, 32),
        (("fp8",) * 14, 16, 1),
        (("nvfp4", "fp8") * 7, 0, 32),
    )
    for formats, head, tail in cases:
        choice = Choice(formats, "4/6", head, tail)
        found = measure.kl(checkpoint, choice.recipe(units, "nvfp4"), some, reference)
        ratios.append(found / predictor.kl(choice))
    assert min(ratios) > 0.4 and max(ratios) < 2.5, ratios


def test_draws_are_derivatives(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the answer's likelihood changes as the quantization's error is added, in FP32; and a
    text's numbers do not depend on the texts beside it."""
    likeliest = lambda chances, *_, **__: chances.argmax(dim=-1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(torch, "multinomial", likeliest)
    some = passages(4, texts=2, prompt=64, answer=3)
    model = measure.load_model(checkpoint).float()
    units = units_of(model, ("nvfp4",))
    variants = (("nvfp4", "6"),)
    together = draw(model, units, some, variants, (0, 40, 64), 1, seed=0)
    assert together.shape == (2, 14, 1, 2)
    for text in range(2):
        one = Passages(64, some.prompts[text : text + 1], some.continuations[text : text + 1])
        alone = draw(model, units, one, variants, (0, 40, 64), 1, seed=0)[0]
        assert np.allclose(alone, together[text], rtol=1e-3, atol=1e-4)

    tokens = torch.tensor([[*some.prompts[0], *some.continuations[0][:-1]]])
    with torch.no_grad():
        answer = model(tokens).logits[0, -3:].argmax(dim=-1, keepdim=True)
        for index in (2, 9):
            module = model.get_submodule(units.chosen[index].layer)

            def likelihood(step: float, module: Any = module) -> float:
                def add(linear: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
                    x, y = args[0][0, :40], out[0, :40]
                    changed = out.clone()
                    changed[0, :40] += step * sensitivity._error(
                        "", linear, x, y, ("nvfp4", "6"), None
                    )
                    return changed

                hook = module.register_forward_hook(add)
                log_p = model(tokens).logits[0, -3:].double().log_softmax(dim=-1)
                hook.remove()
                return float(log_p.gather(-1, answer).sum())

            slope = (likelihood(1e-3) - likelihood(-1e-3)) / 2e-3
            assert together[0, index, 0, 0] * 6**0.5 == pytest.approx(slope, rel=0.02, abs=1e-3)


@pytest.mark.parametrize(
    "budget", [Budget("recovered", 0.9), Budget("kl", 0.2), Budget("bits", 6.0)]
)
def test_a_budget_is_kept(checkpoint: Checkpoint, work: Path, budget: Budget) -> None:
    said: list[str] = []
    shares: list[float] = []
    tuned = tuner(
        checkpoint,
        work,
        budget,
        say=said.append,
        progress=lambda doing, share: shares.append(share),
    ).run()
    results = tuned.results
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] < 1
    one = next(one for one in results.tried if one.arm == "tuned")
    lost = next(one for one in results.tried if one.arm == "quantized")
    assert one.held_out is not None and one.recovered is not None and lost.held_out is not None
    assert one.recovered == pytest.approx(1 - one.held_out / lost.held_out)
    match budget.kind:
        case "kl":
            assert one.held_out <= 0.2
        case "recovered":
            assert one.recovered >= 0.9
        case "bits":
            assert 5.5 < one.bits <= 6.0
    assert one.time is not None and 1 < one.time < 4
    assert any("block scales" in line for line in said)
    assert results.texts != results.held_out
    assert [arm.name for arm in results.arms] == [one.arm for one in results.tried]
    assert tuned.recipe.prefill_attention == "bf16" and not tuned.recipe.emulate
    # What is written is what was measured on the texts held out.
    held_out = texts(2).passages
    reference = measure.in_bf16(checkpoint, lambda model: measure.logits(model, held_out))
    again = Recipe.from_json(tuned.recipe.to_json())
    assert measure.kl(checkpoint, again, held_out, reference) == pytest.approx(one.held_out)


@pytest.mark.slow
def test_a_run_that_was_interrupted(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time, it goes on where it stopped, and ends as if it had not been. Its work serves more."""
    monkeypatch.setattr(running, "ROWS_WITH_GRADIENTS", 96)  # a batch for each text

    def run(
        folder: str, until: int, budget: Budget | None = None
    ) -> tuple[Tuned | None, list[str]]:
        with monkeypatch.context() as patch:
            done = counted(patch, until)
            try:
                chosen = budget or Budget("recovered", 0.9)
                return tuner(checkpoint, tmp_path / folder, chosen).run(), done
            except KeyboardInterrupt:
                return None, done

    whole, every = run("whole", 1000)
    before: list[str] = []
    for calls in (1, 3, 3):
        interrupted, done = run("work", calls)
        assert interrupted is None and len(done) == calls
        before += done
    resumed, after = run("work", 1000)
    assert whole is not None and resumed is not None and same(resumed, whole)
    assert before + after == every
    again, nothing = run("work", 1000)
    assert again is not None and same(again, whole) and not nothing
    other, done = run("work", 1000, Budget("bits", 6.0))
    assert other is not None and "draw" not in done and len(done) <= 2


def counted(monkeypatch: pytest.MonkeyPatch, calls: int) -> list[str]:
    """The long pieces of work from here on; after so many the user interrupts."""
    done: list[str] = []

    def counts(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(done) == calls:
                raise KeyboardInterrupt
            made = of(*args, **kwargs)
            done.append(name)
            return made

        return call

    monkeypatch.setattr(measure, "kl", counts("kl", measure.kl))
    monkeypatch.setattr(running, "draw", counts("draw", running.draw))
    return done


def test_other_work_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tuner(checkpoint, tmp_path / "work", Budget("kl", 0.1))
    with pytest.raises(
        WorkError, match="another run, which differs in the texts searched on; remove it"
    ):
        tuner(checkpoint, tmp_path / "work", Budget("kl", 0.1), searched=texts(3))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(WorkError, match="holds other files"):
        tuner(checkpoint, tmp_path / "mine", Budget("kl", 0.1))
    with pytest.raises(WorkError, match="begin like texts of --text"):
        tuner(checkpoint, tmp_path / "new", Budget("kl", 0.1), held_out=texts(1))
    longer = Texts(("one", "two"), passages(1, prompt=100, answer=8))  # they begin alike
    with pytest.raises(WorkError, match="begin like texts of --text"):
        tuner(checkpoint, tmp_path / "new", Budget("kl", 0.1), held_out=longer)
    assert not (tmp_path / "new").exists()


def test_longer_prompts_decide(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are measured at their own length, and the work of the search serves them, too."""
    first = tuner(checkpoint, tmp_path / "work", Budget("recovered", 0.9)).run()
    longer = passages(7, prompt=192)
    done = counted(monkeypatch, 1000)
    tuned = tuner(
        checkpoint,
        tmp_path / "work",
        Budget("recovered", 0.9),
        held_out=Texts(("a", "b"), longer),
    ).run()
    assert "draw" not in done
    assert (tuned.results.prompt_tokens, tuned.results.check_tokens) == (96, 192)
    assert first.results.check_tokens == 96
    one = next(one for one in tuned.results.tried if one.arm == "tuned")
    assert one.held_out is not None and one.recovered is not None and one.recovered >= 0.9
    reference = measure.in_bf16(checkpoint, lambda model: measure.logits(model, longer))
    found = measure.kl(checkpoint, tuned.recipe, longer, reference)
    assert found == pytest.approx(one.held_out)


@pytest.fixture(scope="module")
def second(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model in NVFP4, rounded otherwise than the engine rounds it."""
    folder = tmp_path_factory.mktemp("second") / "nvfp4"
    return str(second_checkpoints.write(Path(checkpoint.source), folder, factor=1.05))


def test_sensitivities_are_those_of_the_prefill_model(checkpoint: Checkpoint, second: str) -> None:
    """The error of the checkpoint's weights, and of those that are rounded here, in their formats."""
    some = passages(4, texts=1, prompt=64, answer=3)
    model = measure.load_model(checkpoint)
    units = units_of(model, ("nvfp4", "fp8"))
    own, theirs = (
        draw(model, units, some, (("nvfp4", "6"), ("fp8", "6")), (0, 64), 2, 0, source)
        for source in (None, second)
    )
    assert np.array_equal(own[:, :, 1], theirs[:, :, 1])
    assert (own[:, :, 0] != theirs[:, :, 0]).all()


def test_a_prefill_model_that_leaves_a_layer_in_bf16_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj"
    model = measure.load_model(checkpoint)

    def leave(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]
        tensors[f"{name}.weight"] = model.get_submodule(name).weight.detach().clone()

    source = second_checkpoints.write(Path(checkpoint.source), tmp_path / "nvfp4", tensors=leave)
    it = tuner(checkpoint, tmp_path / "work", Budget("kl", 0.1), prefill_model=str(source))
    with pytest.raises(WorkError, match=rf"leaves {name} in BF16 \(layers so left: 1\)"):
        it.run()


def test_a_recipe_with_a_prefill_model(checkpoint: Checkpoint, second: str, tmp_path: Path) -> None:
    tuned = tuner(
        checkpoint, tmp_path / "work", Budget("recovered", 0.9), prefill_model=second
    ).run()
    # Blocks of the checkpoint have their scales, and vLLM scales those of rows by 6.
    assert (tuned.recipe.prefill_model, tuned.recipe.block_scale) == (second, "6")
    tried = {one.arm: one for one in tuned.results.tried}
    recipes = {arm.name: Recipe.from_dict(arm.recipe) for arm in tuned.results.arms if arm.recipe}
    theirs = next(name for name in tried if name.endswith(", prefill model"))
    assert recipes[theirs].prefill_model == second
    # What costs and recovered shares are relative to is the same as without it.
    assert recipes["plain"].prefill_model is recipes["quantized"].prefill_model is None
    assert recipes["quantized"].everywhere and tried["plain"].time == 1
    arms = (("tuned", "held_out", 2), (theirs, "searched", 1), ("plain", "held_out", 2))
    for name, of, seed in arms:
        some = texts(seed).passages
        reference = measure.logits(measure.load_model(checkpoint), some)
        found = measure.kl(checkpoint, recipes[name], some, reference)
        assert found == pytest.approx(getattr(tried[name], of))
    predicted, measured = tried[theirs].predicted, tried[theirs].searched
    assert predicted is not None and measured is not None and 0.4 < measured / predicted < 2.5


def test_prefill_models_that_do_not_fit(
    checkpoint: Checkpoint, second: str, tmp_path: Path
) -> None:
    def begin(prefill_model: str | None, folder: str = "new") -> None:
        tuner(checkpoint, tmp_path / folder, Budget("kl", 0.1), prefill_model=prefill_model)

    fp8 = second_checkpoints.write(Path(checkpoint.source), tmp_path / "fp8", "fp8")
    with pytest.raises(WorkError, match=r"has layers in fp8; .* blackwell has them in nvfp4 alone"):
        begin(str(fp8))
    tiny_models.build("llama", seed=1).save_pretrained(tmp_path / "other")
    other = second_checkpoints.write(tmp_path / "other", tmp_path / "of another")
    with pytest.raises(CheckpointError, match="does not fit the main model"):
        begin(str(other))
    assert not (tmp_path / "new").exists()
    begin(None, "work")
    with pytest.raises(WorkError, match="which differs in the prefill model;"):
        begin(second, "work")


def test_damaged_work(tmp_path: Path) -> None:
    work = Work(tmp_path / "work", {"model": "m"})
    assert work.number("a", lambda: 0.5) == 0.5
    assert work.array("b", lambda: np.arange(3)).tolist() == [0, 1, 2]
    work = Work(tmp_path / "work", {"model": "m"})
    assert work.number("a", lambda: 7.0) == 0.5
    assert work.array("b", lambda: np.arange(9)).tolist() == [0, 1, 2]
    whole = (tmp_path / "work" / "b.npy").read_bytes()
    for damaged in (b"half", b"", whole[:-1]):
        (tmp_path / "work" / "b.npy").write_bytes(damaged)
        with pytest.raises(WorkError, match=r"b\.npy: it is damaged; remove it"):
            work.array("b", lambda: np.arange(3))
    (tmp_path / "work" / "numbers.json").write_text("{")
    with pytest.raises(WorkError, match="remove it"):
        Work(tmp_path / "work", {"model": "m"})


def test_a_file_in_the_place_of_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            FolderError, match="a file is in its place; name a directory with --work"
        ):
            Work(folder, {"model": "m"})


def test_too_few_bits(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is measured."""
    monkeypatch.setattr(measure, "kl", None)
    with pytest.raises(WorkError, match=r"no recipe has 4 bits or fewer: the fewest are 4\.50"):
        tuner(checkpoint, tmp_path / "work", Budget("bits", 4.0)).run()
    # The number in the message is one that a second try can take.
    units = SimpleNamespace(chosen=(SimpleNamespace(work=1),) * 3, fixed=1)
    cost = CostModel(units, BLACKWELL, 2048)  # type: ignore[arg-type]
    plain = Choice(("nvfp4",) * 3, "6", 0, 1)
    exact = cost.bits(plain)  # 7.375
    with pytest.raises(WorkError, match=r"the fewest are 7\.38, with every layer in nvfp4"):
        tuner(checkpoint, tmp_path / "work", Budget("bits", exact - 1e-9))._check_bits(cost, plain)
    tuner(checkpoint, tmp_path / "work", Budget("bits", exact))._check_bits(cost, plain)


@pytest.mark.parametrize(
    ("architecture", "is_mixture"), [("llama", False), ("gemma4_moe", True), ("qwen3_moe", True)]
)
def test_experts_are_named_as_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, is_mixture: bool
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    tiny_models.build(architecture).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(measure, "kl", stop)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        tuner(
            find(str(tmp_path / "model")),
            tmp_path / "work",
            Budget("recovered", 0.9),
            say=said.append,
        ).run()
    assert [line.startswith("Experts are measured in BF16") for line in said] == [True] * is_mixture


@pytest.mark.parametrize("name", ["hopper", pytest.param("cpu", marks=pytest.mark.slow)])
def test_other_targets(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    aim = replace(target(name, torch.device("cpu")), rates=NOMINAL)
    tuned = tuner(checkpoint, tmp_path / "work", Budget("recovered", 0.8), target=aim).run()
    formats = tuned.recipe.format
    assert isinstance(formats, dict) and formats["default"] == aim.plain
    assert set(formats.values()) <= {*aim.formats, "bf16"}
    assert tuned.recipe.block_scale == "6"
    one = next(one for one in tuned.results.tried if one.arm == "tuned")
    assert one.recovered is not None and one.recovered >= 0.8
