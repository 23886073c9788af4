"""The names that `mixquant` exports: imported when they are used, and otherwise like any others."""

import copy
import pickle
from typing import Any

import pytest

import mixquant


def test_every_exported_name_is_there() -> None:
    names: dict[str, Any] = {}
    exec("from mixquant import *", names)
    for name in mixquant.__all__:
        assert names[name] is getattr(mixquant, name)
        assert name in dir(mixquant)
    assert callable(mixquant.summary)


def test_another_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'mixquant' has no attribute 'prepar'"):
        mixquant.prepar  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="prepar"):
        exec("from mixquant import prepar")


def test_what_is_exported_can_be_pickled_and_copied() -> None:
    recipe = mixquant.Recipe.load("fast")
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
    config = mixquant.MixQuantConfig("fast", min_prefill_tokens=7)
    for other in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config)):
        assert type(other) is mixquant.MixQuantConfig
        assert other.to_dict() == config.to_dict()
    for name in mixquant.__all__:
        found = getattr(mixquant, name)
        assert pickle.loads(pickle.dumps(found)) is found or name == "__version__"


def test_the_registered_method_is_the_exported_one() -> None:
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    config = AutoQuantizationConfig.from_dict(mixquant.MixQuantConfig("fast").to_dict())
    assert type(config) is mixquant.MixQuantConfig
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    assert type(quantizer).__module__ == "mixquant.engines.transformers.quantizer"
    assert quantizer.pre_quantized
