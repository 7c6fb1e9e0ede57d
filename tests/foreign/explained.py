"""Every foreign test that fails on an Engram model, or is skipped there and not on the stock models, with its reason.

Keys are patterns of test names; see `Reason` for what an entry holds. `make test-foreign` fails for what is not in this
list and for entries that no longer hold.
"""

from .outcomes import Reason


V4, CAUSAL = "EngramDeepseekV4*", "*ForCausalLMTest"

EXPLAINED: dict[str, Reason] = {
    # Promises that the tests ask to break.
    "test_resize_tokens_embeddings": Reason(
        "failed",
        r"the vocabulary cannot shrink from 109 to 84 ids",
        "The test grows the vocabulary, which passes, and then shrinks it. The ids that it removes have rows in the "
        "memory, so this is refused.",
    ),
    "test_resize_embeddings_untied": Reason(
        "failed",
        r"the vocabulary cannot shrink from 109 to 84 ids",
        "As above.",
        (CAUSAL,),
    ),
    "test_can_init_all_missing_weights": Reason(
        "failed",
        r"a memory is never filled with random rows",
        "The test loads an empty state dict and expects random weights. A checkpoint without its memory is refused.",
    ),
    "test_model_weights_reload_no_missing_tied_weights": Reason(
        "failed",
        r"model\.safetensors' would be read instead of the index and its memory shards",
        "The test puts an empty `model.safetensors` into a saved folder and expects a model with random weights. That "
        "file would hide the memory and is refused.",
    ),
    "test_correct_missing_keys": Reason(
        "failed",
        r"this folder holds a '(llama|deepseek_v4)' model without an Engram memory",
        "The test saves only the backbone and loads it as an Engram model. A checkpoint without a memory is refused.",
    ),
    "test_keep_in_fp32_modules": Reason(
        "failed",
        r"memory\.tables\.0\.order2\.0 was upcasted but it should NOT be",
        "The test expects every weight in the requested type. Tables keep theirs (`engram_table_dtype`), "
        "because they are mapped from the file.",
        (V4,),
    ),
    "test_training_gradient_checkpointing*": Reason(
        "failed",
        r"the gradient of a table has rows alone, and torch's own optimizers cannot train it",
        "The test measures the gradient of every parameter as a dense tensor and steps one of torch's optimizers. A "
        "table's gradient contains only rows and raises an error. tests/integration/test_training.py compares rows "
        "with and without checkpointing.",
        ("EngramLlamaForCausalLMTest", "EngramDeepseekV4ForCausalLMTest"),
    ),
    # Where the tests look for something that lies elsewhere.
    "test_moe_models_record_router_logits": Reason(
        "skipped",
        r"This model has no sparse experts",
        "Transformers looks for experts in the source of the model's own file; here they are in the backbone's, whose "
        "router logits are returned as they are.",
        (V4,),
    ),
    # What the stock backbone does not do either.
    "test_hidden_states_output": Reason(
        "failed",
        r"Lists differ: \[2, 64\] != \[7, 64\]",
        "Fails on the stock model in the same way: V4's hidden states have one more dimension, for its streams. "
        "Transformers' own tests of V4 replace this one.",
        (V4,),
    ),
    "test_reverse_loading_mapping": Reason(
        "failed",
        r"No such file or directory: .*model\.safetensors",
        "Fails on the stock model, for another reason: V4's renamings of old keys cannot be undone one by one, and "
        "Transformers' own tests of V4 leave it out. With a memory it fails earlier: it opens `model.safetensors`, and "
        "a checkpoint with a memory has numbered files (docs/format.md).",
        (V4,),
    ),
    "test_eager_matches_sdpa_inference_??_fp16*": Reason(
        "failed",
        r"expected m1 and m2 to have the same dtype, but got: c10::Half != float",
        "V4 cannot run in float16 in Transformers 5.23: the stock model raises the same error as soon as it is called "
        "(tests/foreign/test_reasons.py). Its tests are skipped before that, as it has no SDPA.",
        (V4,),
    ),
    "test_can_set_attention_dynamically": Reason(
        "skipped",
        r"Parts of this model don't support sdpa",
        "Skipped on the stock model too: V4 has eager attention only.",
        (V4,),
    ),
    "test_sdpa_can_dispatch_non_composite_models": Reason("skipped", r"does not support SDPA", "As above.", (V4,)),
    "test_can_set_attention_dynamically_composite_model": Reason(
        "failed",
        r"does not support an attention implementation through torch.nn.functional.scaled_dot_product_attention yet",
        "The test asks the outer model for SDPA and expects no refusal. V4 has none, and an Engram model takes what "
        "its backbone takes; on Llama it passes.",
        (V4,),
    ),
}
