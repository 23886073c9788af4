"""What `generate` quantizes: each row that reaches a quantized product is one that the rule allows.

The rows are counted and identified from the formats' side (see tiny_models.Recorder), and compared
with prompts cut by hand: the code that decides is not asked.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    MIXTURES_OF_EXPERTS,
    Pass,
    Recorder,
    build,
    distance,
    left_padded,
    tokens,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import mixquant
from mixquant import Recipe

HEAD, TAIL = 3, 1
RECIPE = Recipe(
    preset="fast", format="int8", min_prefill_tokens=0, precise_head=HEAD, precise_tail=TAIL
)
GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def prepared(recorder: Recorder, model: PreTrainedModel, recipe: Any = RECIPE) -> PreTrainedModel:
    """A prepared model, without the tiny pass that this takes."""
    model = mixquant.prepare(model, recipe)
    recorder.forget()
    return model


def watched(
    recorder: Recorder, architecture: str = "llama", name: str = "main", **build_options: Any
) -> PreTrainedModel:
    model = build(architecture, **build_options)
    recorder.watch(model, name)
    return prepared(recorder, model, RECIPE)


def allowed(prompt: Tensor, start: int = 0) -> list[int]:
    """The tokens of a prompt ``[1, count]`` that the rule quantizes, from a position on."""
    return prompt[0, max(start, HEAD) : prompt.shape[1] - TAIL].tolist()


def check(passes: list[Pass], *quantized: list[int]) -> None:
    """The first passes quantized these tokens, and all those that follow none."""
    assert len(passes) > len(quantized), "no decode followed"
    found = [each.quantized for each in passes]
    assert found == [*quantized, *[[]] * (len(passes) - len(quantized))]


# --- one call ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_and_its_answer(recorder: Recorder, name: str) -> None:
    prompt = tokens(40)
    model = watched(recorder, name)
    result = model.generate(prompt, **GREEDY)
    passes = recorder.take()
    check(passes, allowed(prompt))
    assert [each.rows for each in passes] == [40, 1, 1, 1, 1]

    # The same answer as by hand, with the phase said.
    cache = DynamicCache(config=model.config)
    with mixquant.phase("prefill"):
        logits = [model(prompt, past_key_values=cache).logits[:, -1]]
    check(recorder.take() + [Pass("main", 0)], allowed(prompt))
    for token in result.sequences[0, 40:-1]:
        logits.append(model(token.view(1, 1), past_key_values=cache).logits[:, -1])
    assert all(each.quantized == [] for each in recorder.take())
    for ours, theirs in zip(result.logits, logits, strict=True):
        assert distance(theirs, ours) < 0.01


def test_every_layer_gets_the_same_rows(recorder: Recorder) -> None:
    """With nothing added to the embeddings, rows can be told in every layer."""
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    recorder.watch(model)
    prepared(recorder, model, RECIPE)
    prompt = tokens(30)
    model.generate(prompt, **GREEDY)
    passes = recorder.take()
    check(passes, allowed(prompt))
    # Five of a layer's seven products take the normed embedding.
    assert len(passes[0].identified) == 2 * 5
    assert passes[0].products == 2 * 7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_padded_on_the_left(recorder: Recorder, name: str) -> None:
    prompts = [tokens(40, seed=1), tokens(25, seed=2), tokens(3, seed=3)]
    model = watched(recorder, name)
    plain = build(name)
    together = model.generate(**left_padded(prompts), **GREEDY).logits[0]
    check(recorder.take(), [token for prompt in prompts for token in allowed(prompt)])
    # As each prompt alone, as far as that holds without us.
    reference = plain.generate(**left_padded(prompts), **GREEDY).logits[0]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, **GREEDY).logits[0][0]
        check(recorder.take(), allowed(prompt))
        spread = distance(plain.generate(prompt, **GREEDY).logits[0][0], reference[row])
        bound = 0.3 if name in MIXTURES_OF_EXPERTS else 0.04
        assert distance(alone, together[row]) < bound + 2 * spread


def test_padding_counts_toward_no_threshold(recorder: Recorder) -> None:
    prompts = [tokens(30, seed=1), tokens(20, seed=2)]
    rows = sum(len(allowed(prompt)) for prompt in prompts)
    for least, quantized in ((rows, True), (rows + 1, False)):
        model = build("llama")
        recorder.watch(model)
        prepared(recorder, model, {**RECIPE.to_dict(), "min_prefill_tokens": least})
        model.generate(**left_padded(prompts), **GREEDY)
        expected = [token for prompt in prompts for token in allowed(prompt)] if quantized else []
        check(recorder.take(), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", [7, 16, 39])
def test_prefill_in_chunks(recorder: Recorder, name: str, size: int) -> None:
    prompt = tokens(40)
    model = watched(recorder, name)
    whole = model.generate(prompt, **GREEDY).logits[0]
    recorder.take()
    chunked = model.generate(prompt, prefill_chunk_size=size, **GREEDY).logits[0]
    passes = recorder.take()
    expected = allowed(prompt)
    bounds = [(start, min(start + size, 40)) for start in range(0, 40, size)]
    check(passes, *[
        [token for token in prompt[0, a:b].tolist() if token in expected] for a, b in bounds
    ])  # fmt: skip
    assert [token for each in passes for token in each.quantized] == expected
    assert distance(whole, chunked) < (0.4 if name in MIXTURES_OF_EXPERTS else 0.06)


def test_prefill_in_chunks_of_a_padded_batch(recorder: Recorder) -> None:
    prompts = [tokens(40, seed=1), tokens(25, seed=2)]
    model = watched(recorder)
    model.generate(**left_padded(prompts), prefill_chunk_size=16, **GREEDY)
    found = [token for each in recorder.take() for token in each.quantized]
    assert sorted(found) == sorted(allowed(prompts[0]) + allowed(prompts[1]))


@pytest.mark.parametrize("name", ["llama", "gemma4", "qwen3_5"])
def test_static_cache(recorder: Recorder, name: str) -> None:
    prompt = tokens(40)
    model = watched(recorder, name)
    dynamic = model.generate(prompt, **GREEDY).logits[0]
    recorder.take()
    for extra in ({}, {"prefill_chunk_size": 16}):
        static = model.generate(prompt, cache_implementation="static", **extra, **GREEDY)
        passes = recorder.take()
        assert [token for each in passes for token in each.quantized] == allowed(prompt)
        assert all(each.quantized == [] for each in passes[-4:])
        assert distance(dynamic, static.logits[0]) < 0.06


def test_sampling_with_a_seed(recorder: Recorder) -> None:
    prompt = tokens(30)
    model = watched(recorder)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(model.generate(prompt, max_new_tokens=8, do_sample=True, num_beams=1))
        check(recorder.take(), allowed(prompt))
    assert torch.equal(found[0], found[1])


def test_several_answers_to_a_prompt(recorder: Recorder) -> None:
    prompts = [tokens(30, seed=1), tokens(20, seed=2)]
    model = watched(recorder)
    torch.manual_seed(0)
    model.generate(**left_padded(prompts), max_new_tokens=4, do_sample=True, num_return_sequences=3)
    check(recorder.take(), allowed(prompts[0]) * 3 + allowed(prompts[1]) * 3)


@pytest.mark.parametrize("sample", [False, True])
def test_beams(recorder: Recorder, sample: bool) -> None:
    prompts = [tokens(30, seed=1), tokens(20, seed=2)]
    model = watched(recorder)
    torch.manual_seed(0)
    model.generate(
        **left_padded(prompts), max_new_tokens=4, do_sample=sample, num_beams=2,
        num_return_sequences=2,
    )  # fmt: skip
    check(recorder.take(), allowed(prompts[0]) * 2 + allowed(prompts[1]) * 2)


def test_embeddings_in_place_of_tokens(recorder: Recorder) -> None:
    prompts = [tokens(30, seed=1), tokens(20, seed=2)]
    model = watched(recorder)
    by_token = model.generate(prompts[0], **GREEDY).logits
    recorder.take()
    embed = model.get_input_embeddings()
    by_embedding = model.generate(inputs_embeds=embed(prompts[0]), **GREEDY).logits
    check(recorder.take(), allowed(prompts[0]))
    assert torch.equal(by_embedding[0], by_token[0])

    batch = left_padded(prompts)
    ids = batch.pop("input_ids")
    model.generate(inputs_embeds=embed(ids), **batch, **GREEDY)
    check(recorder.take(), allowed(prompts[0]) + allowed(prompts[1]))


def test_without_a_cache(recorder: Recorder) -> None:
    """Each pass reads the prompt again, and the answer so far after it: precise."""
    prompt = tokens(30)
    model = watched(recorder)
    cached = model.generate(prompt, **GREEDY).logits[0]
    recorder.take()
    result = model.generate(prompt, use_cache=False, **GREEDY)
    passes = recorder.take()
    assert [each.rows for each in passes] == [30, 31, 32, 33, 34]
    assert [each.quantized for each in passes] == [allowed(prompt)] * 5
    assert torch.equal(result.logits[0], cached)


@pytest.mark.parametrize("count", [1, 2, HEAD + TAIL, HEAD + TAIL + 1])
def test_prompts_as_short_as_their_head_and_tail(recorder: Recorder, count: int) -> None:
    prompt = tokens(count)
    model = watched(recorder)
    model.generate(prompt, **GREEDY)
    check(recorder.take(), allowed(prompt))
    assert len(allowed(prompt)) == (1 if count > HEAD + TAIL else 0)


def test_inference_mode(recorder: Recorder) -> None:
    prompt = tokens(30)
    model = watched(recorder)
    reference = model.generate(prompt, **GREEDY).logits
    recorder.take()
    with torch.inference_mode():
        result = model.generate(prompt, **GREEDY).logits
    check(recorder.take(), allowed(prompt))
    # Inference tensors do not tell whether they were written to, so fewer steps are fused.
    assert distance(reference[0], result[0]) < 0.03


# --- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["all", "new"])
@pytest.mark.parametrize("cache_type", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma4", "qwen3_5"])
def test_a_conversation(recorder: Recorder, name: str, cache_type: str, ids: str) -> None:
    """What the cache does not hold of a turn is that turn's prompt; its answer is decode again."""
    model = watched(recorder, name)
    cache: Any = (
        DynamicCache(config=model.config)
        if cache_type == "dynamic"
        else StaticCache(config=model.config, max_cache_len=128)
    )
    text = tokens(30)
    for turn in range(3):
        start = 0 if turn == 0 else text.shape[1] - 12 - 1  # the last answer's end is not cached
        inputs: dict[str, Any] = {"input_ids": text}
        if ids == "new" and turn:
            inputs = {"input_ids": text[:, start:], "attention_mask": torch.ones_like(text)}
        result = model.generate(**inputs, past_key_values=cache, **GREEDY)
        passes = recorder.take()
        check(passes, allowed(text, start))
        assert [each.rows for each in passes] == [text.shape[1] - start, 1, 1, 1, 1]
        answer = result.sequences[:, -5:]
        text = torch.cat([text, answer, tokens(12, seed=20 + turn)], dim=1)


def test_a_conversation_in_a_padded_batch(recorder: Recorder) -> None:
    prompts = [tokens(30, seed=1), tokens(20, seed=2)]
    model = watched(recorder)
    cache = DynamicCache(config=model.config)
    batch = left_padded(prompts)
    sequences = model.generate(**batch, past_key_values=cache, **GREEDY).sequences
    recorder.take()
    more = [tokens(10, seed=3), tokens(10, seed=4)]
    ids = torch.cat([sequences, torch.cat(more)], dim=1)
    added = torch.ones(2, ids.shape[1] - 30, dtype=torch.long)
    mask = torch.cat([batch["attention_mask"], added], dim=1)
    model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    last = [[int(sequences[row, -1]), *more[row][0, :-TAIL].tolist()] for row in range(2)]
    check(recorder.take(), last[0] + last[1])


def test_chunks_on_top_of_a_cache_are_refused(recorder: Recorder) -> None:
    model = watched(recorder)
    cache = DynamicCache(config=model.config)
    text = tokens(40)
    first = model.generate(
        text[:, :20], past_key_values=cache, prefill_chunk_size=8, **GREEDY
    ).sequences
    recorder.take()
    whole = torch.cat([first, text[:, 20:]], dim=1)
    length = cache.get_seq_length()
    with pytest.raises(ValueError, match="prefill_chunk_size") as caught:
        model.generate(whole, past_key_values=cache, prefill_chunk_size=8, **GREEDY)
    assert "\n" not in str(caught.value)
    assert recorder.take() == []
    assert cache.get_seq_length() == length
    model.generate(whole, past_key_values=cache, **GREEDY)
    check(recorder.take(), allowed(whole, length))


# --- drafts --------------------------------------------------------------------------------------


def test_prompt_lookup(recorder: Recorder) -> None:
    """Its first pass holds prompt and drafts: the drafts are decode."""
    prompt = tokens(12).repeat(1, 3)
    model = watched(recorder)
    result = model.generate(prompt, prompt_lookup_num_tokens=4, **GREEDY)
    passes = recorder.take()
    check(passes, allowed(prompt))
    assert passes[0].rows == 36 + 4
    # The drafts' logits are those of BF16 on that cache: so the first token's are, in any case.
    plain = model.generate(prompt, **GREEDY)
    assert distance(plain.logits[0], result.logits[0]) < 0.01


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
def test_drafts_on_top_of_a_cache(recorder: Recorder, drafts: str) -> None:
    model = watched(recorder)
    kwargs: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if drafts == "assistant":
        kwargs = {"assistant_model": watched(recorder, name="assistant", seed=1)}
    cache = DynamicCache(config=model.config)
    prompt = tokens(12).repeat(1, 3)
    text = model.generate(prompt, past_key_values=cache, **GREEDY).sequences
    recorder.take()
    length = cache.get_seq_length()
    text = torch.cat([text, tokens(6).repeat(1, 2)], dim=1)
    new = {"input_ids": text[:, length:], "attention_mask": torch.ones_like(text)}

    # Transformers 5.19 reads tokens that are cached a second time when it is given them again
    # (the cache ends up 100 columns long and not 59), as it does with prefill_chunk_size.
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(text, past_key_values=copy.deepcopy(cache), **kwargs, **GREEDY)
    assert recorder.take() == []

    model.generate(**new, past_key_values=cache, **kwargs, **GREEDY)
    passes = recorder.take()
    check(passes, allowed(text, length))
    assert passes[0].rows > text.shape[1] - length
    if drafts == "assistant":  # which has no cache yet, and is given the new tokens only
        check(recorder.take("assistant"), allowed(text[:, length:]))


@pytest.mark.parametrize("which", ["both", "main", "assistant"])
def test_assisted(recorder: Recorder, which: str) -> None:
    """The assistant is asked once a round, with all that was accepted as its prompt."""
    main, assistant = build("llama"), build("llama", seed=1, num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    recorder.watch(main, "main")
    recorder.watch(assistant, "assistant")
    if which != "assistant":
        prepared(recorder, main, RECIPE)
    if which != "main":
        prepared(recorder, assistant, RECIPE)
    # Twice: nothing of the first call may be taken for the second's.
    for prompt in (tokens(20), tokens(34, seed=5)):
        main.generate(prompt, assistant_model=assistant, **{**GREEDY, "max_new_tokens": 10})
        ours, theirs = recorder.take("main"), recorder.take("assistant")
        check(ours, *([] if which == "assistant" else [allowed(prompt)]))
        check(theirs, *([] if which == "main" else [allowed(prompt)]))
        assert ours[0].rows > prompt.shape[1], "the first pass held no draft"
        assert len(ours) > 1, "one round only"


def test_assisted_by_itself(recorder: Recorder) -> None:
    """Its own first layer drafts: the assistant is the same object."""
    model = watched(recorder)
    for prompt in (tokens(20), tokens(34, seed=5)):
        model.generate(prompt, assistant_early_exit=1, **{**GREEDY, "max_new_tokens": 10})
        passes = recorder.take()
        verified = next(i for i, each in enumerate(passes) if i and each.rows > prompt.shape[1])
        for i, each in enumerate(passes):
            assert each.quantized == (allowed(prompt) if i in (0, verified) else [])


def test_a_generation_inside_another_of_another_model(recorder: Recorder) -> None:
    """A logits processor, say, that asks a second prepared model."""
    main, other = build("llama"), build("llama", seed=1)
    for model, name in ((main, "main"), (other, "other")):
        recorder.watch(model, name)
        prepared(recorder, model, RECIPE)
    inner, outer = tokens(25, seed=6), tokens(40)

    def ask(input_ids: Tensor, scores: Tensor) -> Tensor:
        other.generate(inner, **GREEDY)
        other(inner)  # a direct call is not the outer generation's, whatever its rows
        return scores

    main.generate(outer, logits_processor=[ask], **{**GREEDY, "max_new_tokens": 3})
    check(recorder.take("main"), allowed(outer))
    found = [each.quantized for each in recorder.take("other")]
    assert found == [allowed(inner), [], [], [], [], []] * 3


# --- direct calls --------------------------------------------------------------------------------


def test_everywhere_quantizes_answers_too(recorder: Recorder) -> None:
    prompt = tokens(40)
    model = build("llama")
    recorder.watch(model)
    prepared(recorder, model, {**RECIPE.to_dict(), "everywhere": True})
    answer = model.generate(prompt, **GREEDY).sequences[0]
    passes = recorder.take()
    assert [token for each in passes for token in each.quantized] == answer[:-1].tolist()
    model(prompt)
    assert [each.quantized for each in recorder.take()] == [prompt[0].tolist()]


def test_direct_calls(recorder: Recorder) -> None:
    prompt = tokens(40)
    model = watched(recorder)

    def found() -> list[list[int]]:
        return [each.quantized for each in recorder.take()]

    with mixquant.phase("prefill"):
        model(prompt)
        model(input_ids=prompt[:, :20])
        model(inputs_embeds=model.get_input_embeddings()(prompt))
    assert found() == [allowed(prompt), allowed(prompt[:, :20]), allowed(prompt)]

    model(prompt)
    with mixquant.phase("decode"):
        model(prompt)
    assert found() == [[], []]

    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=64),
    ):
        with mixquant.phase("prefill", prompt_length=36):  # the last four are no prompt tokens
            for chunk in prompt.split(15, dim=1):
                model(chunk, past_key_values=cache)
        expected = allowed(prompt[:, :36])
        assert found() == [expected[: 15 - HEAD], expected[15 - HEAD : 30 - HEAD],
                           expected[30 - HEAD :]]  # fmt: skip
        with mixquant.phase("decode"):
            model(tokens(1, seed=9), past_key_values=cache)
        assert found() == [[]]


def test_direct_calls_of_a_padded_batch(recorder: Recorder) -> None:
    prompts = [tokens(30, seed=1), tokens(20, seed=2)]
    batch = left_padded(prompts)
    model = watched(recorder)
    expected = allowed(prompts[0]) + allowed(prompts[1])
    with mixquant.phase("prefill"):
        model(**batch)
        model(batch["input_ids"], batch["attention_mask"])
    with mixquant.phase("prefill", prompt_length=[30, 20]):
        model(**batch)
    found = [each.quantized for each in recorder.take()]
    assert found == [expected, expected, expected]
    # Padding on the right carries no token either, and the prompt ends before it.
    flipped = {key: value.flip(1) for key, value in batch.items()}
    with mixquant.phase("prefill"):
        model(**flipped)
    assert recorder.take()[0].quantized == allowed(prompts[0].flip(1)) + allowed(prompts[1].flip(1))


def test_two_caches_in_one_block(recorder: Recorder) -> None:
    prompt = tokens(40)
    model = watched(recorder)
    for kind in ("dynamic", "static"):
        caches = [
            DynamicCache(config=model.config)
            if kind == "dynamic"
            else StaticCache(config=model.config, max_cache_len=64)
            for _ in range(2)
        ]
        begun = (1, 10)  # within the precise head, and beyond it
        for cache, count in zip(caches, begun, strict=True):
            model(prompt[:, :count], past_key_values=cache)
        recorder.take()
        with mixquant.phase("prefill"):
            for cache, count in zip(caches, begun, strict=True):
                model(prompt[:, count:], past_key_values=cache)
        found = [each.quantized for each in recorder.take()]
        assert found == [allowed(prompt, count) for count in begun]


# --- what is refused, and a real model -----------------------------------------------------------


def test_continuous_batching_is_refused(recorder: Recorder) -> None:
    model = watched(recorder)
    prompt = tokens(20)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate_batch([prompt[0].tolist()])
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.init_continuous_batching()
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate(prompt, cache_implementation="paged", max_new_tokens=2)
    assert all(each.quantized == [] for each in recorder.take())


@pytest.mark.slow
def test_smollm2(recorder: Recorder, smollm2_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.bfloat16)
    order = torch.randperm(40000, generator=torch.Generator().manual_seed(0)) + 100
    prompts = [order[None, :60], order[None, 60:100]]
    # Its answer is not among the known tokens: it would be missed as "no row of the first layer".
    recorder.watch(plain, known=order[:100])
    model = prepared(recorder, plain, RECIPE)
    batch = left_padded(prompts)
    greedy = {**GREEDY, "max_new_tokens": 3}
    together = model.generate(**batch, **greedy).logits[0]
    check(recorder.take(), allowed(prompts[0]) + allowed(prompts[1]))
    chunked = model.generate(**batch, prefill_chunk_size=25, **greedy).logits[0]
    found = [token for each in recorder.take() for token in each.quantized]
    assert sorted(found) == sorted(allowed(prompts[0]) + allowed(prompts[1]))
    alone = model.generate(prompts[1], **greedy).logits[0]
    check(recorder.take(), allowed(prompts[1]))
    for other in (chunked[1:], alone):
        divergence = torch.nn.functional.kl_div(
            other.float().log_softmax(-1),
            together[1:].float().log_softmax(-1),
            log_target=True,
            reduction="sum",
        )
        assert divergence < 0.05


def test_a_copy_made_in_the_middle_of_a_conversation(recorder: Recorder) -> None:
    model = watched(recorder)
    cache = DynamicCache(config=model.config)
    first = model.generate(tokens(20), past_key_values=cache, **GREEDY).sequences
    text = torch.cat([first, tokens(15, seed=4)], dim=1)
    copied, its_cache = copy.deepcopy(model), copy.deepcopy(cache)
    length = cache.get_seq_length()
    recorder.take()
    ours = model.generate(text, past_key_values=cache, **GREEDY)
    check(recorder.take(), allowed(text, length))
    theirs = copied.generate(text, past_key_values=its_cache, **GREEDY)
    assert all(map(torch.equal, ours.logits, theirs.logits))
