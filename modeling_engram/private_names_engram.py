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
_MODULE_DICTIONARY = "named_parameters(), children(): 20 times slower, and these are read in every step of decoding"

PRIVATE_NAMES = (
    PrivateName(
        "torch.nn.Module._parameters", "what a table holds, and taking rows out", _MODULE_DICTIONARY, "in place"
    ),
    PrivateName("torch.nn.Module._modules", "the tables in order", _MODULE_DICTIONARY, "in place"),
    PrivateName(
        "torch.nn.Module._forward_pre_hooks", "whether a memory is there already", "none to list them", "in place"
    ),
    PrivateName("torch.nn.Module._apply", "tables keep their dtype under .half() and .to(dtype)", "none", "overridden"),
    PrivateName(
        "torch.nn.Module._save_to_state_dict",
        "sharded tables refuse to be saved as whole ones",
        "documented for overriding",
        "overridden",
    ),
    PrivateName(
        "torch.nn.Module._load_from_state_dict", "the same for loading", "documented for overriding", "overridden"
    ),
    PrivateName("torch.nn.Module._compiled_call_impl", "taking back `module.compile()`", "none to undo it"),
    PrivateName(
        "torch.nn.Module._replicate_for_data_parallel",
        "a replica without several GPUs",
        "nn.parallel.replicate wants GPUs",
    ),
    PrivateName(
        "torch.Tensor._make_wrapper_subclass",
        "a gradient of few rows with a table's shape",
        "named by torch's own guide to tensor subclasses",
    ),
    PrivateName(
        "torch.ops.aten._amp_foreach_non_finite_check_and_unscale_", "gradient scalers reach row gradients", "none"
    ),
    PrivateName(
        "torch._dynamo.mark_static_address",
        "CUDA graphs keep a history where it is",
        "none in torch.compiler; Transformers uses it too",
    ),
    PrivateName("torch.optim.AdamW._init_group", "dense states for dense groups alone", "none", "overridden"),
    PrivateName(
        "transformers.PreTrainedModel._init_weights",
        "fresh weights of the memory",
        "documented for custom models",
        "overridden",
    ),
    PrivateName(
        "transformers.PreTrainedModel._can_set_experts_implementation",
        "experts are the backbone's",
        "none",
        "overridden",
    ),
    PrivateName(
        "transformers.PreTrainedModel._set_gradient_checkpointing",
        "refusing what would run hooks twice",
        "two public names, by version; both come to this",
        "overridden",
    ),
    PrivateName(
        "transformers.PreTrainedModel._upload_modified_files",
        "saying how many bytes an upload has",
        "push_to_hub() does not know the files",
        "overridden",
    ),
    PrivateName(
        "transformers.PreTrainedModel._no_split_modules", "a table stays on one device", _CLASS_TRAIT, "in place"
    ),
    PrivateName(
        "transformers.PreTrainedModel._skip_keys_device_placement", "caches are not moved", _CLASS_TRAIT, "in place"
    ),
    PrivateName(
        "transformers.PreTrainedModel._tied_weights_keys",
        "which weights are the embeddings again",
        _CLASS_TRAIT,
        "in place",
    ),
    PrivateName("transformers.PreTrainedModel._is_stateful", "whether assisted decoding is possible", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._can_compile_fullgraph", "whether generate compiles whole", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._supports_sdpa", "the backbone's kinds of attention", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._supports_flash_attn", "the backbone's kinds of attention", _CLASS_TRAIT),
    PrivateName("transformers.PreTrainedModel._supports_flex_attn", "the backbone's kinds of attention", _CLASS_TRAIT),
    PrivateName(
        "transformers.PreTrainedModel._supports_attention_backend", "the backbone's kinds of attention", _CLASS_TRAIT
    ),
    PrivateName(
        "transformers.PreTrainedModel._hf_peft_config_loaded",
        "whether Transformers has loaded an adapter",
        "active_adapters() raises without one",
    ),
    PrivateName(
        "transformers.PreTrainedConfig._attn_implementation",
        "which attention was chosen",
        "set_attn_implementation sets it, nothing tells it",
    ),
    PrivateName(
        "transformers.GenerationMixin._prepare_cache_for_generation",
        "an assistant's history is recorded from the first token",
        "none",
        "overridden",
    ),
    PrivateName(
        "transformers.GenerationMixin._valid_auto_compile_criteria",
        "no compiling while the past is recorded",
        "disable_compile is the user's",
        "overridden",
    ),
    PrivateName(
        "transformers.GenerationMixin._supports_default_dynamic_cache", "whether the state is in a Cache", "none"
    ),
    PrivateName(
        "transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaModel._setup_cache",
        "a state that is on modules",
        "none",
    ),
    PrivateName(
        "transformers.initialization",
        "`_is_hf_initialized` of a tensor: filled from a checkpoint",
        "transformers.initialization reads it and offers no question",
    ),
    PrivateName(
        "transformers.modeling_layers.GradientCheckpointingLayer",
        "`_gradient_checkpointing_func` of the layer that is probed",
        "activation_checkpointing_enable wants a whole model",
    ),
    PrivateName(
        "transformers.Trainer._wrap_model",
        "DDP refuses a model of which it has nothing to train",
        _TRAINER_HOOK,
        "overridden",
    ),
    PrivateName(
        "transformers.Trainer._get_output_dir", "where a checkpoint goes in a search", _TRAINER_HOOK, "in place"
    ),
    PrivateName(
        "transformers.Trainer._save_checkpoint",
        "a checkpoint that fails is not left half-written",
        _TRAINER_HOOK,
        "overridden",
    ),
    PrivateName(
        "transformers.Trainer._save", "a checkpoint of a trained memory is what changed", _TRAINER_HOOK, "overridden"
    ),
    PrivateName("transformers.Trainer._finish_current_push", "a push ends first", _TRAINER_HOOK, "in place"),
    PrivateName("transformers.Trainer._push_from_checkpoint", "a push has the memory too", _TRAINER_HOOK, "overridden"),
    PrivateName(
        "transformers.Trainer._load_from_checkpoint", "resuming from what changed", _TRAINER_HOOK, "overridden"
    ),
    PrivateName("transformers.Trainer._load_best_model", "the same for the best model", _TRAINER_HOOK, "overridden"),
    PrivateName(
        "accelerate.hooks.add_hook_to_module",
        "`_hf_hook` and `_old_forward` of a hooked module",
        "none to ask for the hooks of a module",
        "in place",
    ),
    PrivateName(
        "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        "`_ddp_params_and_buffers_to_ignore` of a model: tables are not reduced densely",
        "this function is private too",
    ),
    PrivateName(
        "peft.tuners.tuners_utils.BaseTuner._check_target_module_exists",
        "whether an adapter reaches the memory",
        "none",
    ),
    PrivateName(
        "peft.LoraConfig._register_custom_module", "LoRA on the memory's projections", "documented as experimental"
    ),
)
