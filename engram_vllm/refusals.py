"""What the plugin does not serve, by the graft's configuration and by vLLM's settings.

Promises: each is refused with what to do, before a weight is loaded. Never needs vLLM.
Source: docs/serving.md.
"""

OPTIONS = ("engram_packs", "engram_placement")


def check_engine(vllm_config) -> None:
    """Raises ValueError for settings of vLLM with which the memory was not tested or cannot work."""
    parallel, v1 = vllm_config.parallel_config, not vllm_config.use_v2_model_runner
    given = vllm_config.additional_config
    unknown = [name for name in given if name.startswith("engram_") and name not in OPTIONS]
    refused = {
        f"additional_config has {unknown}: its names for a memory are {OPTIONS}": unknown,
        "the memory is not compiled yet: give --enforce-eager": not vllm_config.model_config.enforce_eager,
        f"world size {parallel.world_size}: the memory runs in one process, so leave --tensor-parallel-size and "
        "--pipeline-parallel-size at 1": parallel.world_size > 1,
        "microbatches (--enable-dbo) hand over no request state: leave them out": parallel.use_ubatching,
        "speculative decoding was not tested with a memory: leave --speculative-config out": (
            vllm_config.speculative_config is not None
        ),
        "prompt embeddings have no token ids: leave --enable-prompt-embeds out": (
            vllm_config.model_config.enable_prompt_embeds
        ),
        "a KV cache from elsewhere (--kv-transfer-config) needs model runner V2": (
            v1 and vllm_config.kv_transfer_config is not None
        ),
        "on this device a memory needs model runner V2: leave VLLM_USE_V2_MODEL_RUNNER=0 out": (
            v1 and vllm_config.device_config.device_type != "cpu"
        ),
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"{reason}.")


def check_served(config) -> None:
    """Raises ValueError for a graft that the plugin does not serve."""
    if getattr(config, "engram_memory_delta", None):
        raise ValueError(
            f"engram_memory_delta={config.engram_memory_delta!r}: this folder holds what training changed, and its "
            "weights are in another checkpoint. Load it with engram_transformers and save it with "
            "save_pretrained into a new folder, then serve that."
        )
    if getattr(config, "composite_config", None) is not None:
        raise ValueError(
            "this graft is a whole model that also reads images, and the plugin serves text models: make a graft of "
            "its text model with `engram graft DONOR OUT --text-only`."
        )
    if config.engram_kernel_size:
        raise ValueError(
            f"engram_kernel_size={config.engram_kernel_size}: the convolution reads values of earlier tokens, which "
            "vLLM does not keep. Make a graft without one (`engram graft DONOR OUT --kernel-size 0`) and train that."
        )
    if config.engram_hc_mult != 1:
        raise ValueError(
            f"engram_hc_mult={config.engram_hc_mult}: vLLM's classes of backbones with several residual streams keep "
            "them in other shapes, and the plugin adds to one stream: serve a graft of another backbone."
        )
