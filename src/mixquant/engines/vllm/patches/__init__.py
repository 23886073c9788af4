"""The ledger: every place where vLLM, or a model that it has loaded, is changed.

Where vLLM has a public hook, the plugin uses it: the entry point ``vllm.general_plugins``, a
quantization method, ``additional_config``. `LEDGER` lists the places where no hook serves. What became
of a model's patches is in the table that the log shows at start.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One change of vLLM.

    Attributes:
        module: which makes the change: of this package, or, with a dot, of `mixquant`.
        targets: what is wrapped or replaced, by its full name in vLLM. A target that only some versions
            have is one of several; one of them is always there.
        does: what the change does.
        why: why no public hook serves.
        guard: what happens where the target is another than the one that was read.
        read: versions of vLLM in which the target was read.
        run: versions in which the patch ran, and on what.
        until: what would make the patch unnecessary.
    """

    module: str
    targets: tuple[str, ...]
    does: str
    why: str
    guard: str
    read: str
    run: str
    until: str


LEDGER = (
    Patch(
        module="configuration",
        targets=("vllm.config.VllmConfig.__post_init__",),
        does="Reads the recipe, checks it, and writes it where vLLM hashes it into its compile cache.",
        why="A quantization method never sees the whole configuration.",
        guard="The wrapper calls the original unchanged for every other quantization method.",
        read="0.25.1 to 0.33.0",
        run="0.25.1 and 0.33.0 on an H100; 0.32.0 on CPUs",
        until="A hook that is given the finished VllmConfig before workers start.",
    ),
    Patch(
        module="runners",
        targets=(
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs",
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model",
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner.profile_run",
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner.initialize_kv_cache",
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner.reload_weights",
            "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs",
            "vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model",
            "vllm.v1.worker.gpu.model_runner.GPUModelRunner.profile_run",
            "vllm.v1.worker.gpu.model_runner.GPUModelRunner.initialize_kv_cache",
            "vllm.v1.worker.gpu.model_runner.GPUModelRunner.reload_weights",
            "vllm.config.CompilationConfig.cudagraph_capture_sizes",
            "vllm.forward_context.ForwardContext.cudagraph_runtime_mode",
        ),
        does="Notes the sequences of each pass: positions, rows, prompt lengths. Has model runner V2 "
        "capture quantized CUDA graphs beside its own, and run a pass without a graph where none serves "
        "it. Gives each pass room on Python's stack. Refuses a reload of weights in the kernels' "
        "format.",
        why="A layer is given rows. Nothing tells it which sequence a row belongs to, or where its "
        "prompt ends. And vLLM captures each size once, for all passes.",
        guard="Versions are refused outside the supported range. A pass whose rows are not the ones "
        "that were noted is precise. A pass that a quantized graph does not serve runs without one. The "
        "log warns if a pass runs whose inputs were not prepared there, or if there is no such runner.",
        read="0.25.1 to 0.33.0",
        run="0.25.1 and 0.33.0 on an H100; 0.32.0 on CPUs",
        until="Prompt lengths and positions by request in vLLM's forward context.",
    ),
    Patch(
        module="attention",
        targets=("vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.forward",),
        does="Quantized rows attend in FP8 on Hopper, and long first chunks in BF16 in the same kernel. "
        "Other rows keep vLLM's kernel.",
        why="vLLM chooses one attention backend for all rows of a model.",
        guard="Layers, backends and metadata are taken by an allow-list. Everything else stays BF16, "
        "and the table says why.",
        read="0.25.1 and 0.33.0",
        run="0.33.0 on an H100 and an H200",
        until="Attention backends by row, or by phase, in vLLM.",
    ),
    Patch(
        module="norms_and_activations",
        targets=(
            "vllm.model_executor.layers.activation.SiluAndMul._forward_method",
            "vllm.model_executor.layers.layernorm.RMSNorm._forward_method",
        ),
        does="Leaves an RMSNorm or a SiLU-and-multiply to the layer behind it, which computes it "
        "together with the quantization of its rows.",
        why="vLLM's own fusions are passes over compiled graphs. There the choice per row is opaque.",
        guard="The bodies of the model's forward methods are compared statement by statement. Others "
        "are not fused, and the table says how many.",
        read="0.25.1 to 0.33.0",
        run="0.25.1 and 0.33.0 on an H100",
        until="A fusion pass of vLLM that accepts an operator of a plugin's own.",
    ),
    Patch(
        module="loading",
        targets=("the loaded model's load_weights",),
        does="Makes copies again whose weights were written to, or refuses the weights.",
        why="vLLM processes weights after it has loaded them itself, but not after a worker extension "
        "has called load_weights.",
        guard="A copy is compared with a sample of its weight. What is the same is left alone.",
        read="0.25.1 to 0.33.0",
        run="0.32.0 on CPUs",
        until="process_weights_after_loading is called by whoever writes weights.",
    ),
    Patch(
        module="beams",
        targets=(
            "vllm.entrypoints.generate.beam_search.utils.BeamSearchSequence.get_prompt",
            "vllm.beam_search.BeamSearchSequence.get_prompt",
            "vllm.v1.engine.input_processor.InputProcessor.process_inputs",
        ),
        does="Tells workers how long the first prompt of a beam was.",
        why="Beam search submits prompt and answer so far as a new prompt, at every step.",
        guard="Where there is no such class, the log says that rows of beams' answers are quantized.",
        read="0.25.1 to 0.33.0",
        run="0.32.0 on CPUs",
        until="Beam search that keeps the length of its prompt.",
    ),
    Patch(
        module="engines.vllm.linear.method",
        targets=(
            "vllm.model_executor.models.deepseek_v2.DeepSeekV2FusedQkvAProjLinear"
            "._use_min_latency_gemm",
        ),
        does="In a prefill engine, keeps the layer from a kernel that reads its BF16 weight, which is "
        "not there.",
        why="The layer calls that kernel itself, past its quantization method.",
        guard="A layer without the attribute is left alone.",
        read="0.32.0",
        run="none: no model at hand has such a layer",
        until="A layer that asks its quantization method for every product.",
    ),
    Patch(
        module="evaluate.fidelity.vllm_worker",
        targets=(
            "the loaded model's compute_logits",
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs",
            "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs",
        ),
        does="Has an engine write a given answer, and records its logits. Only in engines that "
        "`mixquant fidelity --engine vllm` starts.",
        why="Custom logits processors differ between the two model runners.",
        guard="A pass with several requests is an error.",
        read="0.32.0",
        run="0.33.0 on an H100; 0.32.0 on CPUs",
        until="One interface of both runners for forced answers and their logits.",
    ),
)
