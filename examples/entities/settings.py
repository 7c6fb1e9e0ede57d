"""Settings, chosen by measurement (docs/design.md, "Settings of a table that learns entities")."""

from dataclasses import dataclass


# The memory that is grafted: fields of EngramConfig.
MEMORY = {
    "engram_layer_ids": [1, 10],
    "engram_vocab_size": 200_000,
    "engram_max_ngram_size": 3,
    "engram_n_heads": 8,
    "engram_head_dim": 48,
    "engram_kernel_size": 0,
    "engram_initializer_range": 0.02,
    "engram_value_initializer_range": 0.04,
}

# The control keeps everything but the n-grams: each head has one row.
CONTROL = {"engram_hash_scheme": "one_row"}


@dataclass(frozen=True)
class Settings:
    """How the memory is trained.

    Args:
        train_tokens (`int`): tokens of WordNet entities to teach.
        sample_tokens (`int`): tokens in each measured sample.
        train_length (`int`): tokens in a training sequence.
        passes (`int`): times that the training text is read.
        batch (`int`): sequences in a step.
        learning_rate (`float`): of the dense weights.
        table_lr_multiplier (`float`): times that, of the tables.
        adam_beta2 (`float`): decay of the second moments.
        warmup_steps (`int`): steps of rising learning rate.
        bf16 (`bool`): compute in bfloat16 where autocast does.
        seed (`int`): of dense weights and of the order of the sequences.
    """

    train_tokens: int = 50_176
    sample_tokens: int = 8_192
    train_length: int = 256
    passes: int = 3
    batch: int = 4
    learning_rate: float = 2e-3
    table_lr_multiplier: float = 40.0
    adam_beta2: float = 0.99
    warmup_steps: int = 8
    bf16: bool = True
    seed: int = 0
