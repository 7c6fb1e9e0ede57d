"""The private names of other packages that this one touches: a list to go through when one of them has a new release.

Promises: a test asserts that each name is there in the installed version (`tests/house/test_private_names.py`), and
that the shipped code touches no other. What is called goes through `compat_engram.py`. Never imports another package.
Source: transformers 5.20 to 5.24, torch 2.13, accelerate 1.15, peft 0.21.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """A private name of another package.

    Args:
        name (`str`): its dotted path.
        used_for (`str`): why it is needed.
        public (`str`): the public way that was looked for, and why it does not do.
        how (`str`, *optional*, defaults to `"called"`):
            "called" through a function of this module; "overridden" by a class of ours, where nothing calls ours if it
            is renamed; "in place" where it is read on a hot path, or set on an object as its owner documents it.
        since (`str`, *optional*): the first version that has it, if that is later than what this package needs.
        until (`str`, *optional*): the version that announced to drop it.
    """

    name: str
    used_for: str
    public: str
    how: str = "called"
    since: str = ""
    until: str = ""


_CLASS_TRAIT = "none: Transformers reads it from the class; models of custom code are told to set it"
_TRAINER_HOOK = "none: callbacks run before or after it and cannot replace it"
_MODULE_DICTIONARY = "named_parameters(), children(): too slow for every decoding step"

PRIVATE_NAMES = (
    PrivateName("torch.nn.Module._parameters", "reading and taking out rows", _MODULE_DICTIONARY, "in place"),
    PrivateName("torch.nn.Module._modules", "the tables in order", _MODULE_DICTIONARY, "in place"),
    PrivateName(
        "torch.nn.Module._forward_pre_hooks", "finding a memory in a backbone", "none to list them", "in place"
    ),
    PrivateName("torch.nn.Module._apply", "tables keep their dtype under .half() and .to(dtype)", "none", "overridden"),
    PrivateName("torch.nn.Module._save_to_state_dict", "rows that are elsewhere", "documented", "overridden"),
    PrivateName("torch.nn.Module._load_from_state_dict", "rows that are elsewhere", "documented", "overridden"),
    PrivateName("torch.nn.Module._compiled_call_impl", "taking back `module.compile()`", "none to undo it"),
    PrivateName("torch.nn.Module._replicate_for_data_parallel", "testing a replica", "replicate() needs GPUs"),
    PrivateName("torch.Tensor._make_wrapper_subclass", "row gradients", "torch documents it for subclasses"),
    PrivateName("torch.ops.aten._amp_foreach_non_finite_check_and_unscale_", "gradient scalers", "none"),
    PrivateName("torch._dynamo.mark_static_address", "CUDA graphs", "none; Transformers uses it too"),
    PrivateName("torch.optim.AdamW._init_group", "dense states for dense groups alone", "none", "overridden"),
    PrivateName("transformers.PreTrainedModel._init_weights", "initialising the memory", "documented", "overridden"),
    PrivateName(
        "transformers.PreTrainedModel._can_set_experts_implementation", "the backbone's experts", "none", "overridden"
    ),
    PrivateName(
        "transformers.PreTrainedModel._set_gradient_checkpointing",
        "hooks must not run twice",
        "two, by version",
        "overridden",
    ),
    PrivateName(
        "transformers.PreTrainedModel._upload_modified_files", "logging the size of uploads", "none", "overridden"
    ),
    PrivateName(
        "transformers.PreTrainedModel._no_split_modules", "a table stays on one device", _CLASS_TRAIT, "in place"
    ),
    PrivateName(
        "transformers.PreTrainedModel._skip_keys_device_placement", "caches are not moved", _CLASS_TRAIT, "in place"
    ),
    PrivateName("transformers.PreTrainedModel._tied_weights_keys", "tied embeddings", _CLASS_TRAIT, "in place"),
    PrivateName("transformers.PreTrainedModel._is_stateful", "whether assisted decoding is possible", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._can_compile_fullgraph", "whether generate compiles whole", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._supports_sdpa", "the backbone's kinds of attention", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._supports_flash_attn", "the backbone's kinds of attention", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._supports_flex_attn", "the backbone's kinds of attention", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._supports_attention_backend", "attention", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._hf_peft_config_loaded", "loaded adapters", "active_adapters() raises"),
    PrivateName("transformers.PreTrainedConfig._attn_implementation", "the chosen attention", "none to read it"),
    PrivateName("transformers.PreTrainedConfig._attn_implementation_internal", "set without parts", "none sets one"),
    PrivateName(
        "transformers.GenerationMixin._prepare_cache_for_generation", "assistants record", "none", "overridden"
    ),
    PrivateName("transformers.GenerationMixin._valid_auto_compile_criteria", "compiling", "none", "overridden"),
    PrivateName("transformers.GenerationMixin._supports_default_dynamic_cache", "state in a Cache", "none"),
    *(
        PrivateName(f"transformers.GenerationMixin.{name}", purpose, "none: `generate` calls it", "overridden")
        for name, purpose in (
            ("_validate_model_kwargs", "arguments of a composite backbone"),
            ("_maybe_prepare_encoder_kwargs_for_generation", "a composite backbone's images, read before the text"),
            ("_prepare_position_ids_for_generation", "positions of several dimensions"),
            ("_expand_inputs_for_generation", "images of several beams"),
            ("_expand_multimodal_outputs", "images of several beams: composite backbones may override it"),
            ("_update_model_kwargs_for_generation", "arguments of a composite backbone"),
        )
    ),
    PrivateName(
        "transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaModel._setup_cache",
        "a state that is on modules",
        "none",
    ),
    PrivateName("transformers.initialization", "`_is_hf_initialized` of a tensor", "none to ask for it"),
    PrivateName("transformers.modeling_layers.GradientCheckpointingLayer", "`_gradient_checkpointing_func`", "none"),
    PrivateName("transformers.Trainer._wrap_model", "DDP without dense weights", _TRAINER_HOOK, "overridden"),
    PrivateName("transformers.Trainer._get_output_dir", "folder of a search", _TRAINER_HOOK, "in place"),
    PrivateName("transformers.Trainer._save_checkpoint", "no incomplete checkpoints", _TRAINER_HOOK, "overridden"),
    PrivateName("transformers.Trainer._save", "saving a delta", _TRAINER_HOOK, "overridden"),
    PrivateName("transformers.Trainer._finish_current_push", "a push ends first", _TRAINER_HOOK, "in place"),
    PrivateName("transformers.Trainer._push_from_checkpoint", "pushing the memory", _TRAINER_HOOK, "overridden"),
    PrivateName("transformers.Trainer._load_from_checkpoint", "resuming from a delta", _TRAINER_HOOK, "overridden"),
    PrivateName("transformers.Trainer._load_best_model", "loading the best delta", _TRAINER_HOOK, "overridden"),
    PrivateName("accelerate.hooks.add_hook_to_module", "`_hf_hook`, `_old_forward`", "none to list hooks", "in place"),
    PrivateName(
        "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        "`_ddp_params_and_buffers_to_ignore` of a model: tables are not reduced densely",
        "this function is private too",
    ),
    PrivateName("peft.tuners.tuners_utils.BaseTuner._check_target_module_exists", "adapters on the memory", "none"),
    PrivateName("peft.LoraConfig._register_custom_module", "LoRA on projections", "experimental"),
)
