"""What the vLLM plugin decides before anything is loaded: versions, recipe, refusals, the hash key."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import tiny_models
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

import mixquant
from mixquant import _version
from mixquant.core.recipe import Recipe, RecipeError
from mixquant.engines.vllm import counters, hardware, plugin, settings, versions
from mixquant.engines.vllm.config import PhaseQuantizationConfig
from mixquant.engines.vllm.patches import configuration
from mixquant.engines.vllm.patches import runners as passes
from mixquant.engines.vllm.settings import SettingsError, resolve
from mixquant.formats import int8


@pytest.fixture(autouse=True)
def _no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_export", lambda path: None)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this machine one that multiplies the given formats natively."""

    def becomes(*formats: str, name: str = "this GPU") -> None:
        monkeypatch.setattr(hardware, "native_in_vllm", lambda: (frozenset(formats), name))

    return becomes


def said(error: BaseException) -> str:
    """The message of an error, which has to be one line, without what pydantic adds to it."""
    text = str(error)
    if isinstance(error, ValidationError):
        text = error.errors()[0]["msg"].removeprefix("Value error, ")
    assert text
    assert "\n" not in text, text
    return text


def refusal(*args: Any, by: Callable[..., Any], **kwargs: Any) -> str:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        by(*args, **kwargs)
    return said(caught.value)


# --- versions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version",
    ["0.25.1", "0.25.1+cu129", "0.26", "0.32.0+cpu", "0.32.1.dev5+g1234567", "0.33.0rc1", "0.33.9"],
)
def test_versions_that_are_known(version: str) -> None:
    assert versions.problem(version) is None
    versions.require(version)


@pytest.mark.parametrize(
    "version",
    ["0.25.0", "0.25.1rc1", "0.25.1.dev3", "0.34", "0.34.0", "0.34.0rc1", "0.34.0.dev1+cpu", "1.0"]
    + ["dev", "", "0.1.dev1+gabc", "unknown version"],
)
def test_versions_that_are_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(versions.OVERRIDE, raising=False)
    with pytest.raises(versions.UnsupportedVersion) as caught:
        versions.require(version)
    message = said(caught.value)
    assert all(part in message for part in (version, "0.25.1", "0.34", versions.OVERRIDE))
    with pytest.warns(RuntimeWarning, match="mixquant knows vLLM"):
        versions.warn_if_unknown(version)
    monkeypatch.setenv(versions.OVERRIDE, "0")
    with pytest.raises(versions.UnsupportedVersion):
        versions.require(version)
    monkeypatch.setenv(versions.OVERRIDE, "1")
    versions.require(version)


def test_the_state_of_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert versions.plugin_state() == "registered: --quantization mixquant"
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert "left out by VLLM_PLUGINS" in versions.plugin_state()
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(versions, "entry_points", lambda group: ())
    assert "not registered" in versions.plugin_state()
    monkeypatch.setattr(versions, "installed", lambda: "0.99.0")
    assert versions.OVERRIDE in versions.plugin_state()
    monkeypatch.setattr(versions, "installed", lambda: None)
    assert versions.plugin_state() == "vLLM is not installed"


def test_the_installed_version_is_found_and_known() -> None:
    import vllm

    assert versions.installed() == vllm.__version__.partition("+")[0]
    assert versions.problem(vllm.__version__) is None


# --- the recipe -------------------------------------------------------------------------------------


def test_default_preset_path_and_dict(device: Callable[..., None], tmp_path: Path) -> None:
    device("int8", "fp8")
    assert resolve(None) == Recipe().resolved(frozenset({"int8", "fp8"}))
    assert resolve(None).format == {"default": "fp8"}
    assert resolve("exact").format == {"default": "bf16"}
    file = tmp_path / "recipe.json"
    file.write_text('{"format": "int8", "min_prefill_tokens": 7}')
    assert resolve(str(file)) == resolve({"format": "int8", "min_prefill_tokens": 7})
    assert resolve(str(file)).min_prefill_tokens == 7
    assert resolve(str(file)).format == {"default": "int8"}


def test_balanced_spares_what_writes_the_cache(device: Callable[..., None]) -> None:
    device("nvfp4", "fp8")
    recipe = resolve(None)
    assert recipe.format_of("model.layers.0.mlp.up_proj") == "nvfp4"
    assert recipe.format_of("model.layers.0.self_attn.k_proj") == "fp8"
    assert recipe.precise_head == 4


@pytest.mark.parametrize(
    "given",
    [
        None,
        "fast",
        "exact",
        {"format": "nvfp4", "emulate": True},
        {"format": {"k_proj": "bf16", "default": "int8"}, "ignore": ["down_proj", "lm_head"]},
        {"precise_head": 3, "precise_tail": 0, "min_prefill_tokens": 0},
        {"role": "prefill"},
        {"role": "decode", "format": "nvfp4"},
    ],
)
def test_resolved_twice_is_the_same(given: Any, device: Callable[..., None]) -> None:
    """As in a worker: what the first process wrote into additional_config, through JSON."""
    device("int8")
    once = resolve(given)
    written = json.loads(json.dumps({**once.to_dict(), "version": "0.1.0"}))
    assert resolve(written) == once
    assert resolve(resolve(written).to_dict()) == once


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"fromat": "int8"}, "'fromat'"),
        ({"format": "int4"}, "'int4'"),
        ({"format": {"k_proj": "int8"}}, "'default'"),
        ({"format": {"default": "int4"}}, "'format'"),
        ({"min_prefill_tokens": -1}, "min_prefill_tokens"),
        ({"min_prefill_tokens": "many\nmore"}, "min_prefill_tokens"),
        ({"emulate": "yes"}, "emulate"),
        ("no\nsuch", "fast, balanced, exact"),
        ("no/such.json", "no/such.json"),
        ('{"format": ', "JSON"),
        (7, "7"),
        (["fast"], "fast"),
        (True, "True"),
    ],
)
def test_recipes_that_are_none(given: Any, named: str, device: Callable[..., None]) -> None:
    device("int8")
    with pytest.raises(RecipeError) as caught:
        resolve(given)
    assert named in said(caught.value)


def test_a_text_too_long_for_a_path(device: Callable[..., None]) -> None:
    device("int8")
    with pytest.raises(RecipeError) as caught:
        resolve('"format": "int8"' * 50)
    said(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"fromat": 1}', "\xff\n\n", ""])
def test_files_that_hold_no_recipe(
    content: str, tmp_path: Path, device: Callable[..., None]
) -> None:
    device("int8")
    file = tmp_path / "recipe.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError) as caught:
        resolve(str(file))
    assert str(file) in said(caught.value)


@pytest.mark.parametrize(
    ("native", "format", "named"),
    [
        (("int8",), "nvfp4", "nvfp4"),
        (("int8", "fp8"), "nvfp4", "nvfp4"),
        (("nvfp4", "fp8"), "int8", "int8"),
        (("int8",), {"k_proj": "fp8", "default": "int8"}, "fp8"),
        ((), "auto", "int8"),
    ],
)
def test_a_foreign_format_needs_emulate(
    native: tuple[str, ...], format: Any, named: str, device: Callable[..., None]
) -> None:
    device(*native, name="A100")
    message = refusal({"format": format}, by=resolve)
    # It names the device, the format, what the device can, and the way out.
    assert message.startswith(f"A100 does not multiply {named} natively")
    can = message[message.index("(") : message.index(")")]
    assert all(name in can for name in native or ("none",))
    assert "emulate" in message
    assert resolve({"format": format, "emulate": True}).emulate
    assert resolve({"format": format, "preset": "exact"}).format == {"default": "bf16"}


def test_bf16_is_native_everywhere(device: Callable[..., None]) -> None:
    device()
    assert resolve({"format": "bf16"}).format == {"default": "bf16"}


def test_a_decode_engine_asks_for_nothing_of_the_format(device: Callable[..., None]) -> None:
    """So that it takes the recipe of the prefill engines, whatever it holds."""
    device()
    given = {"role": "decode", "prefill_model": "/no/such/directory"}
    assert resolve(given).format == {"default": "bf16"}
    assert resolve(resolve(given).to_dict()) == resolve(given)
    message = refusal({**given, "role": "prefill"}, by=resolve)
    assert "/no/such/directory" in message


@pytest.mark.parametrize(
    ("level", "formats"),
    [
        (80, {"int8"}),
        (86, {"int8"}),
        (89, {"int8", "fp8"}),
        (90, {"int8", "fp8"}),
        (100, {"fp8", "nvfp4"}),
        (103, {"fp8", "nvfp4"}),
        (110, {"fp8"}),
        (120, {"fp8", "nvfp4"}),
        (121, {"fp8", "nvfp4"}),
    ],
)
def test_what_nvidia_gpus_multiply(
    level: int, formats: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.platforms

    platform = SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        get_device_capability=lambda: SimpleNamespace(to_int=lambda: level),
        get_device_name=lambda: "a GPU",
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    assert hardware.native_in_vllm() == (frozenset(formats), "a GPU")


def test_what_other_platforms_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    for cpu, sums, formats in ((True, True, {"int8"}), (True, False, set()), (False, True, set())):
        # Without VNNI oneDNN's sums saturate.
        monkeypatch.setattr(int8, "_onednn_multiplies", lambda sums=sums: sums)
        platform = SimpleNamespace(
            is_cpu=lambda cpu=cpu: cpu, is_cuda=lambda: False, device_name="tpu"
        )
        monkeypatch.setattr(vllm.platforms, "current_platform", platform)
        found, name = hardware.native_in_vllm()
        assert found == formats
        assert ("CPU" if cpu else "tpu") in name


# --- the hook ---------------------------------------------------------------------------------------


def config_like(**changes: Any) -> Any:
    """What the hook reads of a VllmConfig. Changes of a nested one: ``parallel={...}``."""
    model = {
        "quantization": "mixquant",
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "model": "a/model",
        "quantization_config": None,
    }
    parallel = {
        "enable_dbo": False,
        "ubatch_size": 0,
        "prefill_context_parallel_size": 1,
        "data_parallel_size": 2,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**model | changes.pop("model", {})),
        parallel_config=SimpleNamespace(**parallel | changes.pop("parallel", {})),
        quant_config=changes.pop("quant_config", None) or PhaseQuantizationConfig(),
        additional_config=changes.pop("additional_config", {}),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=changes.pop("sizes", None), max_cudagraph_capture_size=None
        ),
        **changes,
    )


def test_the_hook_is_put_on_once_and_runs_around_vllms_own(device: Callable[..., None]) -> None:
    device("int8")
    calls: list[str] = []

    class Config:
        def __init__(self, like: Any) -> None:
            self.additional_config: dict[str, Any] = {}
            self.__dict__.update(vars(like))
            self.__post_init__()

        def __post_init__(self) -> None:
            calls.append("vLLM")
            self.additional_config["seen"] = "mixquant" in self.additional_config

    configuration.install(Config)
    once = Config.__post_init__
    configuration.install(Config)
    assert Config.__post_init__ is once
    config: Any = Config(config_like())
    assert calls == ["vLLM"]
    assert not config.additional_config["seen"]  # the recipe is settled after it
    assert config.additional_config["mixquant"]["version"] == mixquant.__version__
    assert config.quant_config.default_graph_sizes and config.quant_config.default_threshold
    config.__post_init__()  # with what was resolved
    assert config.quant_config.default_threshold
    config = Config(config_like(sizes=[1, 2]))
    assert not config.quant_config.default_graph_sizes
    calls.clear()
    refusal(config_like(parallel={"enable_dbo": True}), by=Config)
    assert not calls  # checked before it
    for other in (
        config_like(model={"quantization": "fp8"}, parallel={"enable_dbo": True}),
        SimpleNamespace(**vars(config_like()) | {"model_config": None}),
    ):
        assert "mixquant" not in Config(other).additional_config


def test_registering_again_changes_nothing() -> None:
    plugin.register()
    hook = VllmConfig.__post_init__
    plugin.register()
    assert VllmConfig.__post_init__ is hook
    assert hook.mixquant and not hasattr(hook.__wrapped__, "mixquant")
    assert VllmConfig().additional_config == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallel": {"enable_dbo": True}}, "--enable-dbo"),
        ({"parallel": {"ubatch_size": 2}}, "--ubatch-size"),
        ({"parallel": {"prefill_context_parallel_size": 2}}, "--prefill-context-parallel-size"),
        ({"model": {"runner_type": "pooling"}}, "a/model"),
        ({"model": {"is_encoder_decoder": True}}, "encoder-decoder"),
        ({"model": {"quantization_config": {"linear": "fp8"}}}, "--quantization-config"),
        ({"additional_config": SimpleNamespace(compute_hash=lambda: "")}, "additional_config"),
    ],
)
def test_engines_that_are_refused(changes: dict[str, Any], named: str) -> None:
    settings.check(config_like())
    with pytest.raises(SettingsError) as caught:
        settings.check(config_like(**changes))
    assert named in said(caught.value)


def test_platforms_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    for cpu, cuda in ((True, False), (False, True), (False, False)):
        platform = SimpleNamespace(
            is_cpu=lambda cpu=cpu: cpu, is_cuda=lambda cuda=cuda: cuda, device_name="tpu"
        )
        monkeypatch.setattr(vllm.platforms, "current_platform", platform)
        if cpu or cuda:
            settings.check(config_like())
        else:
            assert "not on tpu" in refusal(config_like(), by=settings.check)


def test_older_configurations_lack_some_fields() -> None:
    config = config_like()
    del config.model_config.quantization_config
    for name in ("enable_dbo", "ubatch_size", "prefill_context_parallel_size"):
        delattr(config.parallel_config, name)
    settings.check(config)


def test_an_unknown_version_is_refused_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.delenv(versions.OVERRIDE, raising=False)
    assert "0.99.0" in refusal(config_like(), by=settings.check)
    monkeypatch.setenv(versions.OVERRIDE, "1")
    settings.check(config_like())


def test_settling_writes_recipe_and_version_and_keeps_the_rest(device: Callable[..., None]) -> None:
    device("int8")
    given = {"mixquant": {"min_prefill_tokens": 5}, "other": 1}
    config = config_like(additional_config=given)
    settings.settle(config)
    recipe = resolve({"min_prefill_tokens": 5})
    assert config.quant_config.recipe == recipe
    assert config.additional_config == {
        "other": 1,
        "mixquant": {**recipe.to_dict(), "version": mixquant.__version__},
    }
    assert given == {"mixquant": {"min_prefill_tokens": 5}, "other": 1}  # the caller's, untouched
    before, path = dict(config.additional_config), config.quant_config.counters
    assert Path(path).stat().st_size == 2 * 8 * 8  # eight counters for each of two ranks
    settings.settle(config)  # as `replace` of a configuration does
    assert (config.additional_config, config.quant_config.counters) == (before, path)


def test_a_setting_without_effect_is_said_once(
    device: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(settings.logger, "warning", lambda text, *args: said.append(text % args))
    device("int8")
    config = config_like(additional_config={"mixquant": {"preset": "exact", "format": "int8"}})
    settings.settle(config)
    settings.settle(config)  # as `replace` of a configuration does, and other processes do
    assert said == ["recipe key 'format' changes nothing: preset exact quantizes nothing"]


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"mixqaunt": {"preset": "exact"}}, "mixqaunt"),
        ({"MixQuant": "exact"}, "MixQuant"),
        ({"mix-quant": "exact"}, "mix-quant"),
        ({"other": 1, "preset": "exact"}, "preset"),
        ({"ignore": ["lm_head"]}, "ignore"),
    ],
)
def test_a_recipe_in_the_wrong_place_is_refused(given: dict[str, Any], key: str) -> None:
    with pytest.raises(settings.SettingsError, match=f"the key {key!r} but no key 'mixquant'"):
        settings.check(config_like(additional_config=given))


@pytest.mark.parametrize("given", [{}, {"other": 1, "quantizer": 2}, {"mixquant": "fast", "a": 1}])
def test_keys_of_other_plugins_are_left_alone(given: dict[str, Any]) -> None:
    settings.check(config_like(additional_config=given))


def test_a_given_recipe_goes_before_the_checkpoints(device: Callable[..., None]) -> None:
    device("int8")
    method = PhaseQuantizationConfig.from_config({"recipe": {"min_prefill_tokens": 9}})
    config = config_like(quant_config=method)
    settings.settle(config)
    assert method.recipe is not None and method.recipe.min_prefill_tokens == 9
    config = config_like(quant_config=method, additional_config={"mixquant": "exact"})
    settings.settle(config)
    assert method.recipe == resolve("exact")


# --- the method ------------------------------------------------------------------------------------


def test_the_method_is_sent_to_workers_with_its_recipe(device: Callable[..., None]) -> None:
    device("int8")
    method = PhaseQuantizationConfig()
    method.recipe, method.counters = resolve("fast"), "/a/file"
    method.ledger._copies["a"] = 1
    there = pickle.loads(pickle.dumps(method))
    assert (there.recipe, there.counters) == (method.recipe, method.counters)
    assert there.ledger._copies == {"a": 1}


ORDINARY = (
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.11.mlp.gate_up_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.shared_expert.down_proj",
    "language_model.model.layers.3.self_attn.o_proj",
    "model.language_model.layers.3.linear_attn.in_proj_qkvz",
    "lm_head",
)


@pytest.mark.parametrize("prefix", ORDINARY)
def test_layers_of_the_decoder_are_taken(prefix: str) -> None:
    assert PhaseQuantizationConfig().why_precise(prefix) is None


@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        ("visual.blocks.0.attn.qkv", "not tokens"),
        ("visual.merger.linear_fc1", "not tokens"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", "not tokens"),
        ("vision_model.encoder.layers.0.mlp.fc1", "not tokens"),
        ("audio_tower.layers.0.fc1", "not tokens"),
        ("multi_modal_projector.linear_1", "not tokens"),
        ("model.embed_vision.embedding_projection", "not tokens"),
        ("mtp.layers.0.mlp.down_proj", "drafts"),
        ("model.mtp.fc", "drafts"),
        ("eagle.layers.0.mlp.down_proj", "drafts"),
        ("model.mtp_layers.0.mlp.down_proj", "drafts"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.mlp.shared_expert_gate", "router"),
        ("model.layers.0.router.proj", "router"),
        ("model.layers.0.block_sparse_moe.gate", "router"),
    ],
)
def test_layers_that_are_left_as_they_are(
    prefix: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "install", lambda method: None)
    method = PhaseQuantizationConfig()
    method.recipe = Recipe(format="int8").resolved(frozenset({"int8"}))
    found = method.why_precise(prefix)
    assert found is not None and why in found
    layer = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    assert type(method.get_quant_method(layer, prefix)) is UnquantizedLinearMethod
    assert layer.mixquant_why_precise == found
    assert type(method.get_quant_method(layer, ORDINARY[0])).__name__ == "PhaseLinearMethod"
    assert method.get_quant_method(torch.nn.LayerNorm(4), ORDINARY[0]) is None


@pytest.mark.parametrize("tag", ["eagle_head", "dflash_head", "draft_model", "medusa_head"])
def test_a_drafter_is_told_by_who_builds_it(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers have names that the model's own have, and vLLM gives it the same configuration."""
    from vllm.compilation.backends import set_model_tag

    monkeypatch.setattr(passes, "install", lambda method: None)
    method = PhaseQuantizationConfig()
    method.recipe = Recipe(format="int8", role="prefill").resolved(frozenset({"int8"}))
    layer = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    with set_model_tag(tag):
        assert type(method.get_quant_method(layer, ORDINARY[0])) is UnquantizedLinearMethod
        # One that vLLM made for the drafter alone, without a recipe.
        assert type(PhaseQuantizationConfig().get_quant_method(layer, ORDINARY[0])) is (
            UnquantizedLinearMethod
        )
    assert layer.mixquant_why_precise == "it drafts"
    assert type(method.get_quant_method(layer, ORDINARY[0])).__name__ == "PhaseLinearMethod"
    with set_model_tag("self_decoder"):  # a part of the model itself
        assert method.why_precise(ORDINARY[0]) is None


def test_layers_behind_the_last_one_draft() -> None:
    method = PhaseQuantizationConfig()
    assert method.why_precise("model.layers.61.mlp.down_proj") is None
    method.layers = 61
    assert method.why_precise("model.layers.61.mlp.down_proj") == "it drafts"
    assert method.why_precise("model.layers.60.mlp.down_proj") is None


def test_only_a_checkpoint_of_another_method_is_refused() -> None:
    override = PhaseQuantizationConfig.override_quantization_method
    for found in ("compressed-tensors", "awq"):
        assert found in refusal({"quant_method": found}, "mixquant", by=override)
        # vLLM asks every method about every quantized checkpoint.
        assert override({"quant_method": found}, None) is None
        assert override({"quant_method": found}, "fp8", hf_config=object()) is None
    for ours in ({"quant_method": "mixquant"}, {"quant_method": ""}, {}, None):
        assert override(ours, "mixquant") is None


# --- vLLM's own chain, from arguments to the configuration ------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny_models.build("qwen3").save_pretrained(path)
    return path


def engine_config(
    model: Path, given: Any = None, quantization: str | None = "mixquant", **arguments: Any
) -> Any:
    plugin.register()
    if given is not None:
        arguments["additional_config"] = {"mixquant": given}
    return EngineArgs(
        model=str(model), quantization=quantization, skip_tokenizer_init=True, **arguments
    ).create_engine_config()


def with_quantization(directory: Path, into: Path, config: dict[str, Any]) -> Path:
    """A copy of a model's configuration, which says that its weights are quantized."""
    values = json.loads((directory / "config.json").read_text())
    values["quantization_config"] = config
    (into / "config.json").write_text(json.dumps(values))
    return into


def test_the_recipe_reaches_the_method_and_additional_config(
    directory: Path, device: Callable[..., None]
) -> None:
    device("int8")
    config = engine_config(directory, {"min_prefill_tokens": 3})
    assert isinstance(config.quant_config, PhaseQuantizationConfig)
    assert config.quant_config.recipe == resolve({"min_prefill_tokens": 3})
    there = pickle.loads(pickle.dumps(config))
    assert there.quant_config.recipe == config.quant_config.recipe
    assert there.compute_hash() == config.compute_hash()
    assert not there.quant_config.default_threshold
    # vLLM checks it again when an engine in a process of its own has started.
    there.__post_init__()
    assert there.quant_config.recipe == config.quant_config.recipe
    assert there.quant_config.default_graph_sizes == config.quant_config.default_graph_sizes


def test_two_recipes_never_share_a_key_and_one_has_one(
    directory: Path,
    device: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device("int8", "fp8")
    recipes: list[Any] = [
        None,
        {"min_prefill_tokens": 0},
        {"precise_head": 2},
        {"precise_tail": 2},
        {"format": "int8"},
        {"format": "nvfp4", "emulate": True},
        {"format": "nvfp4", "emulate": True, "block_scale": "4/6"},
        {"format": {"k_proj": "bf16", "default": "fp8"}},
        {"ignore": ["lm_head", "down_proj"]},
        "exact",
        {"role": "prefill"},
        {"role": "decode"},
    ]
    keys = [engine_config(directory, recipe).compute_hash() for recipe in recipes]
    assert len(set(keys)) == len(recipes)
    file = tmp_path / "recipe.json"
    file.write_text('{"format":   "int8"}')
    same = [str(file), resolve({"format": "int8"}).to_dict(), {"format": {"default": "int8"}}]
    for given in same:
        assert engine_config(directory, given).compute_hash() == keys[4]
    monkeypatch.setattr(_version, "__version__", "99")
    assert engine_config(directory).compute_hash() != keys[0]


@pytest.mark.parametrize(
    ("given", "arguments", "named"),
    [
        ({"fromat": 1}, {}, "fromat"),
        ({"format": "nvfp4"}, {}, "nvfp4"),
        ({"prefill_model": "/no/such/directory"}, {}, "/no/such/directory"),
        (None, {"enable_dbo": True}, "--enable-dbo"),
        (None, {"runner": "pooling"}, "pooling"),
    ],
)
def test_refusals_through_vllm(
    given: Any,
    arguments: dict[str, Any],
    named: str,
    directory: Path,
    device: Callable[..., None],
) -> None:
    device("int8")
    assert named in refusal(directory, given, by=engine_config, **arguments)


@pytest.mark.parametrize("sends", [False, True])
def test_a_prefill_engine_that_sends_to_nobody_says_so(
    sends: bool, directory: Path, device: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    device("int8")
    warnings: list[str] = []
    monkeypatch.setattr(settings.logger, "warning", lambda text: warnings.append(text))
    config = engine_config(directory, {"role": "prefill"})
    assert len(warnings) == 1 and "--kv-transfer-config" in warnings[0]
    warnings.clear()
    config.kv_transfer_config = object() if sends else None
    settings.settle(config)
    assert bool(warnings) != sends
    for role in ("both", "decode"):
        engine_config(directory, {"role": role})
    assert len(warnings) == (not sends)


def test_a_checkpoint_quantized_by_another_method(directory: Path, tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    model = with_quantization(directory, tmp_path, config)
    message = refusal(model, by=engine_config)
    assert "compressed-tensors" in message and "prefill_model" in message


@pytest.mark.parametrize("quantization", ["mixquant", None])
def test_a_model_that_transformers_saved_brings_its_recipe(
    quantization: str | None, tmp_path: Path, device: Callable[..., None]
) -> None:
    device("int8")
    model = tiny_models.build("qwen3")
    recipe = Recipe(format="int8", min_prefill_tokens=11, ignore=("lm_head", "down_proj"))
    mixquant.prepare(model, recipe)
    model.save_pretrained(tmp_path)
    config = engine_config(tmp_path, quantization=quantization)
    assert config.quant_config.recipe == recipe.resolved(frozenset({"int8"}))
    assert config.additional_config["mixquant"]["min_prefill_tokens"] == 11
    given = engine_config(tmp_path, {"min_prefill_tokens": 12}, quantization)
    assert given.quant_config.recipe == resolve({"min_prefill_tokens": 12})


def test_other_methods_are_left_alone(directory: Path) -> None:
    config = engine_config(directory, {"fromat": "not ours to read"}, quantization=None)
    assert config.quant_config is None
    assert config.additional_config == {"mixquant": {"fromat": "not ours to read"}}


# --- what depends on the recipe ----------------------------------------------------------------------


def test_batch_invariance_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = config_like()
    quantizes = Recipe(format="int8").resolved(frozenset({"int8"}))
    exact = Recipe(preset="exact").resolved(frozenset({"int8"}))
    settings._check_recipe(model, quantizes)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    settings._check_recipe(model, exact)
    with pytest.raises(SettingsError) as caught:
        settings._check_recipe(model, quantizes)
    assert "VLLM_BATCH_INVARIANT" in said(caught.value)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    settings._check_recipe(model, quantizes)


def test_float32_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: the products there write BF16 or FP16."""
    import vllm.platforms

    quantizes = Recipe(format="fp8").resolved(frozenset({"fp8"}))
    exact = Recipe(preset="exact").resolved(frozenset({"fp8"}))
    for on_gpu in (False, True):
        platform = SimpleNamespace(is_cuda=lambda on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(vllm.platforms, "current_platform", platform)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            model = config_like(model={"dtype": dtype})
            settings._check_recipe(model, exact)
            if on_gpu and dtype == torch.float32:
                with pytest.raises(SettingsError) as caught:
                    settings._check_recipe(model, quantizes)
                assert "--dtype float32" in said(caught.value)
            else:
                settings._check_recipe(model, quantizes)


def test_a_weight_transfer_that_writes_past_the_copies_is_refused() -> None:
    quantizes = Recipe(format="int8").resolved(frozenset({"int8"}))
    exact = Recipe(preset="exact").resolved(frozenset({"int8"}))
    for backend in ("nccl", "ipc", "sparse_nccl", "nccl_m2n", "sharded_rdt", "one/of/their/own"):
        config = config_like(weight_transfer_config=SimpleNamespace(backend=backend))
        settings._check_recipe(config, exact)
        if backend in ("nccl", "ipc"):
            settings._check_recipe(config, quantizes)
        else:
            with pytest.raises(SettingsError) as caught:
                settings._check_recipe(config, quantizes)
            assert backend in said(caught.value)
    settings._check_recipe(config_like(weight_transfer_config=None), quantizes)
