"""What only a GPU can show: the native kernels' numbers, and the engine on CUDA.

The reference of a native product is the emulated one, which the CPU tests hold to references of
their own.
"""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixquant
from mixquant.formats import BY_NAME, EMULATION, native_formats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

ROWS = (1, 16, 17, 513, 2048)


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, columns), torch.nan, dtype=dtype, device="cuda")


@pytest.fixture(params=["nvfp4", "fp8", "int8"])
def native(request):
    fmt = BY_NAME[request.param]
    kernel = fmt.kernel(torch.device("cuda"))
    if not kernel.native:
        pytest.skip(f"this GPU does not multiply {request.param}")
    return fmt, kernel


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_native_products_are_the_emulated_ones(native, rows, dtype, with_bias):
    fmt, kernel = native
    torch.manual_seed(rows)
    x = torch.randn(rows, 512, device="cuda", dtype=dtype)
    weight = torch.randn(768, 512, device="cuda", dtype=dtype) * 0.05
    bias = torch.randn(768, device="cuda", dtype=dtype) if with_bias else None
    out, expected = poisoned(rows, 768, dtype), poisoned(rows, 768, dtype)
    fmt.linear(fmt.quantize_rows(x, kernel), fmt.quantize_weight(weight, kernel), bias, out)
    fmt.linear(
        fmt.quantize_rows(x, EMULATION), fmt.quantize_weight(weight, EMULATION), bias, expected
    )
    if fmt.name == "int8" and dtype == torch.float32:
        assert torch.equal(out, expected)
    # Row-wise FP8 products come in BF16 only: half a unit in the last place of the product.
    scale = expected.float().abs().max().item()
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=scale * 2**-9)


def test_codes_do_not_depend_on_the_device(native):
    fmt, _ = native
    torch.manual_seed(0)
    x = torch.randn(65, 512, dtype=torch.bfloat16)
    here, there = fmt.quantize_rows(x, EMULATION), fmt.quantize_rows(x.cuda(), EMULATION)
    for name in here.__dataclass_fields__:
        if isinstance(value := getattr(here, name), torch.Tensor):
            assert torch.equal(value.float(), getattr(there, name).float().cpu()), name


@pytest.mark.parametrize("split", [1, 7, 64])
def test_int8_rows_do_not_depend_on_the_others(split):
    fmt = BY_NAME["int8"]
    kernel = fmt.kernel(torch.device("cuda"))
    torch.manual_seed(1)
    x = torch.randn(130, 512, device="cuda", dtype=torch.bfloat16)
    weight = fmt.quantize_weight(torch.randn(256, 512, device="cuda").bfloat16(), kernel)
    whole = poisoned(130, 256, torch.bfloat16)
    fmt.linear(fmt.quantize_rows(x, kernel), weight, None, whole)
    for start in range(0, 130, split):
        part = poisoned(len(x[start : start + split]), 256, torch.bfloat16)
        fmt.linear(fmt.quantize_rows(x[start : start + split], kernel), weight, None, part)
        assert torch.equal(part, whole[start : start + split])


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


@pytest.mark.parametrize("name", ["fp8", "int8", "nvfp4"])
def test_a_prepared_model_on_the_gpu(plain, name):
    ids = torch.randint(0, 512, (2, 300), device="cuda")
    recipe = {"format": name, "preset": "fast", "min_prefill_tokens": 0, "precise_head": 0}
    model = mixquant.prepare(copy.deepcopy(plain), recipe)
    with torch.no_grad():
        expected = plain(ids).logits.float()
        assert torch.equal(model(ids).logits.float(), expected)  # no phase said: precise
        with mixquant.phase("prefill"):
            got = model(ids).logits.float()
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < {"fp8": 0.12, "int8": 0.06, "nvfp4": 0.45}[name]


def test_the_fastest_native_format_is_the_default(plain):
    model = mixquant.prepare(copy.deepcopy(plain))
    native = native_formats(torch.device("cuda"))
    best = next(name for name in ("nvfp4", "fp8", "int8") if name in native)
    used = {layer.format for layer in mixquant.summary(model).layers if layer.native}
    assert best in used


def test_generate_with_a_static_cache_is_not_compiled(plain):
    """On a GPU Transformers compiles the forward pass for static caches; that would freeze a plan."""
    ids = torch.randint(0, 512, (1, 200), device="cuda")
    model = mixquant.prepare(copy.deepcopy(plain), {"format": "fp8", "min_prefill_tokens": 0})
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    settings |= {"output_logits": True, "pad_token_id": 0, "eos_token_id": None}
    static = model.generate(ids, cache_implementation="static", **settings)
    assert not getattr(model, "_compiled_call", None)
    dynamic = model.generate(ids, **settings)
    torch.testing.assert_close(static.logits[0], dynamic.logits[0], rtol=0, atol=0.05)


def test_moving_a_model_remakes_its_copy(plain):
    model = mixquant.prepare(copy.deepcopy(plain).cpu(), {"format": "int8", "preset": "fast"})
    layer = model.model.layers[0].mlp.down_proj
    assert layer.parts[0].weight.kernel == BY_NAME["int8"].kernel(torch.device("cpu"))
    model.cuda()
    assert layer.parts[0].weight.kernel == BY_NAME["int8"].kernel(torch.device("cuda"))
    assert layer.parts[0].weight.codes.is_cuda
