"""Transformers' ModelTesterMixin on EngramModel and EngramForCausalLM, and on the stock models as the control.

Copied beside the mixin by `tests.foreign.layout` and run there, so it imports nothing of this folder. One model class
for each test case, so that outcomes can be compared test by test.
"""

import random
import unittest
from unittest.mock import patch

import torch
from safetensors import safe_open
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV4Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    initialization,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from engram_transformers import EngramConfig, EngramForCausalLM, EngramModel
from engram_transformers.layer_engram import EngramLayer
from engram_transformers.pretrained_engram import EngramPreTrainedModel
from engram_transformers.rows_table_engram import EngramTable

from . import test_modeling_common
from .test_configuration_common import ConfigTester
from .test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor


# The mixin looks names of classes up in these tables to know which ones take labels and which have no loss. A model
# that is registered with the Auto classes from outside is not in them.
MODEL_MAPPING_NAMES[EngramConfig.model_type] = EngramModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[EngramConfig.model_type] = EngramForCausalLM.__name__


def fill_memory() -> None:
    """Makes fresh tables and convolutions random: at zero the memory would add nothing, and nothing would be tested."""
    fresh = EngramPreTrainedModel._init_weights

    @torch.no_grad()
    def filled(self, module):
        fresh(self, module)
        if isinstance(module, EngramTable):
            for parameter in module.parameters():
                initialization.normal_(parameter)
        elif isinstance(module, EngramLayer):
            initialization.normal_(module.conv)

    EngramPreTrainedModel._init_weights = filled


fill_memory()

VOCABULARY, BATCH, LENGTH = 99, 13, 7
SIZES = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Llama:
    """A plain backbone."""

    config_class, base_model_class, causal_lm_class = LlamaConfig, LlamaModel, LlamaForCausalLM
    gradients_everywhere = True

    @staticmethod
    def config() -> PreTrainedConfig:
        return LlamaConfig(
            **SIZES,
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )


class DeepseekV4:
    """A backbone with two residual streams, experts, and attention over compressed positions."""

    config_class, base_model_class, causal_lm_class = DeepseekV4Config, DeepseekV4Model, DeepseekV4ForCausalLM
    gradients_everywhere = False  # the indexer's scores only choose positions

    @staticmethod
    def config() -> PreTrainedConfig:
        return DeepseekV4Config(
            **SIZES,
            hidden_size=64,
            intermediate_size=64,
            moe_intermediate_size=64,  # grouped matmuls need rows that are multiples of 16 bytes
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
            partial_rotary_factor=8 / 32,
            max_position_embeddings=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            mlp_layer_types=["moe", "moe"],  # routing by hash needs ids, and some tests give embeddings alone
            layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
            q_lora_rank=32,
            o_lora_rank=16,
            o_groups=2,
            index_n_heads=2,
            index_head_dim=16,
            index_topk=2,
            sliding_window=8,
            hc_mult=2,
            hc_sinkhorn_iters=3,
            num_nextn_predict_layers=0,
        )


class ModelTester:
    """What the mixin asks for: a small configuration and a batch of texts of 1 to 7 tokens.

    Args:
        config (callable): makes the configuration.
        base_model_class (`type`): the class that tests of rotary embeddings run on.
    """

    is_training = True
    batch_size, seq_length, vocab_size = BATCH, LENGTH, VOCABULARY
    names_ids = False  # whether batches carry the memory's own ids, for tests that give embeddings in place of ids

    def __init__(self, config, base_model_class: type):
        self.get_config, self.base_model_class = config, base_model_class
        text = config().get_text_config()
        self.hidden_size, self.num_hidden_layers = text.hidden_size, text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([BATCH, LENGTH], VOCABULARY, rng=random.Random(0))  # (batch, length)
        inputs = {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}
        return self.get_config(), {**inputs, "engram_input_ids": ids} if self.names_ids else inputs


def open_numbered(path: str, **kwargs):
    """Opens the first file of a checkpoint that has an index."""
    return safe_open(path.replace("model.safetensors", "model-00001-of-00001.safetensors"), **kwargs)


class StockCase(ModelTesterMixin):
    """A stock model: the control."""

    backbone = Llama
    # The mixin leaves this test out for models that came before 2023 or whose files have no line of copyright.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        set_seed(0)
        self.test_all_params_have_gradient = self.backbone.gradients_everywhere
        self.model_tester = ModelTester(self.backbone.config, self.backbone.base_model_class)
        self.config_tester = ConfigTester(self, config_class=self.backbone.config_class)

    def test_config(self):
        self.config_tester.run_common_tests()


class EngramCase(StockCase):
    """The same with a memory on both layers."""

    _is_composite = True

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        model = cls.all_model_classes[0](cls.engram_config()).eval()
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad(), model.disable_memory():
            bare = model(ids)[0]
        assert not torch.equal(model(ids)[0], bare), "the memory adds nothing, so nothing about it would be tested"

    def setUp(self):
        super().setUp()
        self.model_tester = ModelTester(self.engram_config, EngramModel)
        # As for every configuration of Transformers that holds another one.
        self.config_tester = ConfigTester(self, config_class=EngramConfig, has_text_modality=False)
        if "batched_and_grouped" in self._testMethodName:
            stock = self.backbone.base_model_class
            if not stock._can_set_experts_implementation():
                self.skipTest(f"{stock.__name__} has no experts")

    @classmethod
    def engram_config(cls) -> EngramConfig:
        return EngramConfig(
            text_config=cls.backbone.config(),
            engram_layer_ids=[0, 1],
            engram_vocab_size=101,
            engram_n_heads=2,
            engram_head_dim=4,
        )

    def test_sdpa_can_dispatch_non_composite_models(self):
        # As for a model that is not composite: otherwise it would be skipped. V4 has no such attention to dispatch to.
        self._is_composite = not self.backbone.base_model_class._supports_sdpa
        super().test_sdpa_can_dispatch_non_composite_models()

    def test_load_save_without_tied_weights(self):
        # It opens the file that a model without a memory has; ours are numbered, with an index.
        with patch.object(test_modeling_common, "safe_open", open_numbered):
            super().test_load_save_without_tied_weights()

    # Embeddings have no ids, and the memory is addressed by ids: who gives the one names the other.

    def test_inputs_embeds(self):
        self.model_tester.names_ids = True
        super().test_inputs_embeds()

    def test_inputs_embeds_matches_input_ids(self):
        self.model_tester.names_ids = True
        super().test_inputs_embeds_matches_input_ids()


class StockLlamaModelTest(StockCase, unittest.TestCase):
    all_model_classes = (LlamaModel,)


class StockLlamaForCausalLMTest(StockCase, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (LlamaForCausalLM,)


class StockDeepseekV4ModelTest(StockCase, unittest.TestCase):
    backbone, all_model_classes = DeepseekV4, (DeepseekV4Model,)


class StockDeepseekV4ForCausalLMTest(StockCase, GenerationTesterMixin, unittest.TestCase):
    backbone, all_model_classes = DeepseekV4, (DeepseekV4ForCausalLM,)


class EngramLlamaModelTest(EngramCase, unittest.TestCase):
    all_model_classes = (EngramModel,)


class EngramLlamaForCausalLMTest(EngramCase, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (EngramForCausalLM,)


class EngramDeepseekV4ModelTest(EngramCase, unittest.TestCase):
    backbone, all_model_classes = DeepseekV4, (EngramModel,)


class EngramDeepseekV4ForCausalLMTest(EngramCase, GenerationTesterMixin, unittest.TestCase):
    backbone, all_model_classes = DeepseekV4, (EngramForCausalLM,)
