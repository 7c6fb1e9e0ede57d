"""Tiny random composite models that read text and images, for the golden tokenizer's 4104 ids, and their inputs.

`COMPOSITES[name]()` makes a new configuration, `FURTHER` has more; `images_for(name, ids)` makes the arguments that
show one image in each row. Every image takes four positions, whose ids are `IMAGE`. Where text models are the same,
they are those of `backbones.py`.
"""

from collections.abc import Callable

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForImageTextToText,
    Cohere2VisionConfig,
    Gemma3Config,
    Gemma4Config,
    Glm4vConfig,
    InternVLConfig,
    Lfm2VlConfig,
    Llama4Config,
    LlavaConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
)

from .backbones import BACKBONES, DELTA, EXPERTS, GROUPED, HEADS, MIXED, SHARED, without


# For every test that grafts a whole composite model; test_multimodal.py shows that older versions are refused.
needs_whole_composites = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="refused before transformers 5.23"
)

IMAGE, VIDEO, BEGIN, END = 4102, 4103, 4100, 4101
TAKES = 4  # positions of an image
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,  # as many as the language model, so that layers cannot be told apart by their number
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}
SQUARE = {**VISION, "image_size": 28, "patch_size": 7}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "initializer_range": 0.1,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
MIXED_DELTA = {**DELTA, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True}}


def gemma3() -> PreTrainedConfig:
    """An image's positions see each other; windows."""
    return Gemma3Config(
        text_config=BACKBONES["gemma3"]().to_dict(),
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=TAKES,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        image_token_index=IMAGE,
        tie_word_embeddings=True,
    )


def gemma4() -> PreTrainedConfig:
    """Embeddings of each layer, keys shared by layers, an image's positions that see each other."""
    text = {**HEADS, **MIXED, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 4104}
    return Gemma4Config(
        text_config={**text, "use_bidirectional_attention": "vision", "global_head_dim": 8},
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=BEGIN,
        eoi_token_id=END,
        audio_token_id=4099,
        boa_token_id=4098,
        eoa_token_index=4097,
    )


def qwen2_5_vl() -> PreTrainedConfig:
    """Positions of three dimensions, and an offset of them that its module keeps."""
    return Qwen2_5_VLConfig(
        text_config={**GROUPED, "rope_parameters": MROPE},
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        **IDS,
    )


def qwen3_vl() -> PreTrainedConfig:
    """Features of the image are added in the first decoder layers too."""
    return Qwen3VLConfig(
        text_config={**HEADS, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **IDS,
    )


def qwen3_5() -> PreTrainedConfig:
    """Gated delta nets beside attention."""
    return Qwen3_5Config(
        text_config={**HEADS, **MIXED_DELTA}, vision_config={**QWEN_VISION, "num_position_embeddings": 16}, **IDS
    )


def qwen3_5_moe() -> PreTrainedConfig:
    """The same with experts."""
    return Qwen3_5MoeConfig(
        text_config={**without(HEADS, "intermediate_size"), **MIXED_DELTA, **SHARED},
        vision_config={**QWEN_VISION, "num_position_embeddings": 16},
        **IDS,
    )


def mistral3() -> PreTrainedConfig:
    """Mistral with Pixtral."""
    return Mistral3Config(
        text_config=BACKBONES["mistral"]().to_dict(),
        vision_config={"model_type": "pixtral", **SQUARE, "head_dim": 8},
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def llama4() -> PreTrainedConfig:
    """Chunked attention, experts; the language model inside is a whole causal one."""
    return Llama4Config(
        text_config={
            **HEADS,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "attention_chunk_size": 8,
            "moe_layers": [1],
            "no_rope_layers": [1, 0, 1],
        },
        vision_config={
            **SQUARE,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        boi_token_index=BEGIN,
        eoi_token_index=END,
        image_token_index=IMAGE,
    )


def smolvlm() -> PreTrainedConfig:
    """Llama with SigLIP; only the outer configuration says that embeddings and head are tied."""
    return SmolVLMConfig(
        text_config=BACKBONES["llama"]().to_dict(),
        vision_config=SQUARE,
        image_token_id=IMAGE,
        pad_token_id=2,
        tie_word_embeddings=True,
    )


def internvl() -> PreTrainedConfig:
    """Qwen3 with InternViT."""
    return InternVLConfig(
        text_config=BACKBONES["qwen3"]().to_dict(),
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=IMAGE,
        image_seq_length=TAKES,
        tie_word_embeddings=False,
    )


COMPOSITES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "mistral3": mistral3,
    "llama4": llama4,
    "smolvlm": smolvlm,
    "internvl": internvl,
}


def glm4v() -> PreTrainedConfig:
    """Positions of three dimensions, and its own way of giving images to several beams."""
    return Glm4vConfig(
        text_config={**GROUPED, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        vision_config={**QWEN_VISION, "image_size": 16, "spatial_merge_size": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=BEGIN,
        image_end_token_id=END,
        video_start_token_id=4098,
        video_end_token_id=4099,
    )


def lfm2_vl() -> PreTrainedConfig:
    """Convolutions beside attention."""
    return Lfm2VlConfig(
        text_config=BACKBONES["lfm2"]().to_dict(),
        vision_config={"model_type": "siglip2_vision_model", **VISION, "patch_size": 7, "num_patches": 16},
        image_token_id=IMAGE,
        downsample_factor=2,
        projector_hidden_size=32,
    )


# More of them, for fewer tests
FURTHER: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config={**GROUPED, "rope_parameters": MROPE},
        vision_config={**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **IDS,
    ),
    "qwen3_vl_moe": lambda: Qwen3VLMoeConfig(
        text_config={**HEADS, **EXPERTS, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **IDS,
    ),
    "llava": lambda: LlavaConfig(
        text_config=BACKBONES["llama"]().to_dict(),
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        image_token_index=IMAGE,
    ),
    "cohere2_vision": lambda: Cohere2VisionConfig(
        text_config={"model_type": "cohere2", **HEADS, **MIXED},
        vision_config={"model_type": "siglip_vision_model", **SQUARE},
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    ),
    "glm4v": glm4v,
    "lfm2_vl": lfm2_vl,
    "paligemma": lambda: PaliGemmaConfig(
        text_config={"model_type": "gemma", **HEADS},
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        image_token_index=IMAGE,
        projection_dim=32,
    ),
}


def composite_donor(name: str, seed: int = 0) -> PreTrainedModel:
    """A composite model with seeded weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config((COMPOSITES | FURTHER)[name]()).eval()
    for parameter in model.parameters():
        if not parameter.any():  # a projector of zeros (gemma3) would show no image; biases may be anything
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def with_image(ids: torch.Tensor, first: int) -> torch.Tensor:
    """Ids `(..., length)` in which an image with its borders begins at a position."""
    ids = ids.clone()
    ids[..., first : first + TAKES + 2] = torch.tensor([BEGIN, *[IMAGE] * TAKES, END])
    return ids


def images_for(name: str, ids: torch.Tensor, seeds: list[int] | None = None) -> dict:
    """Arguments that show one image in each row of ids `(batch, length)`: for each row a seed, which is the image."""
    seeds = list(range(len(ids))) if seeds is None else seeds
    kinds, rows = (ids == IMAGE).long(), len(seeds)  # (batch, length)

    def pixels(*shape: int) -> torch.Tensor:
        shown = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(shown)  # (rows, ...)

    if name.startswith(("qwen", "glm")):
        grid = torch.tensor([[1, 4, 4]] * rows)
        return {"pixel_values": pixels(16, 96).flatten(0, 1), "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if name == "gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1).expand(rows, -1, -1)
        return {"pixel_values": pixels(16, 48), "image_position_ids": places, "mm_token_type_ids": kinds}
    if name == "lfm2_vl":
        shapes, seen = torch.tensor([[4, 4]] * rows), torch.ones(rows, 16, dtype=torch.long)
        return {"pixel_values": pixels(16, 147), "spatial_shapes": shapes, "pixel_attention_mask": seen}
    if name == "smolvlm":
        return {"pixel_values": pixels(1, 3, 28, 28)}
    extra = {"gemma3": {"token_type_ids": kinds}, "mistral3": {"image_sizes": torch.tensor([[28, 28]] * rows)}}
    return {"pixel_values": pixels(3, 28, 28), **extra.get(name, {})}
