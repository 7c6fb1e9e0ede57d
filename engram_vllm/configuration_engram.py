"""The configuration of a graft in vLLM: the fields of its `config.json` as they are.

The package's files import it in the place of `EngramConfig`, which needs a newer Transformers than vLLM allows.
Promises: `text_config` is the backbone's, which vLLM takes widths and depths from. Never checks or changes a field:
the graft checked them, and `refusals` says what the plugin does not serve.
Source: docs/format.md.
"""

from transformers import AutoConfig, PretrainedConfig


REMEDY = "install a newer engram-transformers, or a version of vllm that docs/serving.md names."


class EngramFormatError(ValueError):
    """A checkpoint does not hold what its configuration and index say: damaged, incomplete or of another memory."""


class ServedConfig(PretrainedConfig):
    """Configuration of a graft, read from its `config.json`.

    Args:
        text_config (`dict`, *optional*): the backbone's configuration; None for a composite backbone.
        kwargs: all other fields, under their names.

    Example:

    ```python
    >>> from engram_vllm.configuration_engram import ServedConfig

    >>> ServedConfig(text_config={"model_type": "llama"}, engram_max_ngram_size=3).engram_orders
    [2, 3]
    ```"""

    model_type = "engram_lm"
    sub_configs = {"text_config": AutoConfig}
    engram_zero_centred_norms = engram_conv_across_documents = False  # in grafts from before these fields

    def __init__(self, text_config: dict | None = None, **kwargs):
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        super().__init__(**kwargs)

    @property
    def engram_orders(self) -> list[int]:
        """Orders of the n-grams, 2..N."""
        return list(range(2, self.engram_max_ngram_size + 1))

    @property
    def engram_vocab_sizes(self) -> list[int]:
        """Lower bound for a head's rows, one for each order."""
        sizes = self.engram_vocab_size
        return [sizes] * len(self.engram_orders) if isinstance(sizes, int) else list(sizes)

    @property
    def engram_memory_dim(self) -> int:
        """Values in the memory vector of one token: orders x heads x row width."""
        return len(self.engram_orders) * self.engram_n_heads * self.engram_head_dim
