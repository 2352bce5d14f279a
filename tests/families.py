"""The model families of docs/measurements.md, each with a tiny configuration. `family_check.py` tries them."""

from dataclasses import dataclass, field
from typing import Any

IMAGE_TOKEN = 98
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 4, "num_channels": 3}


@dataclass(frozen=True)
class Family:
    """One row of the table: a class of transformers with a tiny configuration."""

    name: str
    model: str  # class name in transformers
    sizes: dict[str, Any] = field(default_factory=dict)  # on top of SIZES, where the configuration has those
    attention: str = "sdpa"
    layers: str = "layers"  # what the name of the list of layers ends in
    refused: str | None = None  # a regular expression for the reason; None: the family is served
    drawn: bool = False  # one of those drawn at random


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
LATENT |= {"first_k_dense_replace": 2, "moe_intermediate_size": 24}
LLAMA4 = {**ROUTED, "head_dim": 16, "attention_chunk_size": 5, "intermediate_size_mlp": 64}
TEXT = {**SIZES, "rope_parameters": None, "head_dim": 16}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
QWEN_VISION |= {"patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16}
PER_LAYER = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
NO_INTERFACE = "has no layers that send their attention through transformers' attention interface"

FAMILIES = [
    Family("Llama", "LlamaForCausalLM"),
    Family("Llama", "LlamaForCausalLM", attention="eager"),
    Family("Llama", "LlamaForSequenceClassification"),
    Family("Mistral", "MistralForCausalLM", {"sliding_window": 4}),
    Family("Mixtral", "MixtralForCausalLM", ROUTED),
    Family("Qwen2-MoE", "Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 24}),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", {**MOE, "head_dim": 16}),
    Family("Qwen2", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    Family("Qwen3", "Qwen3ForCausalLM", {"head_dim": 16}),
    Family("Gemma 2", "Gemma2ForCausalLM", {"head_dim": 16, "sliding_window": 4}, "eager"),
    Family("Gemma 3", "Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2}),
    Family("Phi-3", "Phi3ForCausalLM", {"sliding_window": 4}),
    Family("OLMo-2", "Olmo2ForCausalLM"),
    Family("Granite", "GraniteForCausalLM"),
    Family("Cohere", "CohereForCausalLM"),
    Family("SmolLM3", "SmolLM3ForCausalLM"),
    Family("StarCoder2", "Starcoder2ForCausalLM", {"sliding_window": 4}),
    Family("GPT-2", "GPT2LMHeadModel", layers="h"),
    Family("GPT-NeoX", "GPTNeoXForCausalLM"),
    Family("OPT", "OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    Family("GPT-OSS", "GptOssForCausalLM", {**ROUTED, "head_dim": 16, "sliding_window": 4}, "eager"),
    Family("DeepSeek-V3", "DeepseekV3ForCausalLM", LATENT),
    Family("BERT", "BertForSequenceClassification", layers="layer"),
    Family("BERT", "BertForMaskedLM", layers="layer"),
    Family("BERT", "BertForQuestionAnswering", layers="layer"),
    Family("RoBERTa", "RobertaForSequenceClassification", layers="layer"),
    Family("ELECTRA", "ElectraForTokenClassification", layers="layer"),
    Family("DistilBERT", "DistilBertForMaskedLM", {"dim": 64, "hidden_dim": 128, "n_layers": 4}, layers="layer"),
    Family("ALBERT", "AlbertForSequenceClassification", {"embedding_size": 16}, layers="albert_layers"),
    Family("ModernBERT", "ModernBertForSequenceClassification", {"classifier_pooling": "mean", "local_attention": 6}),
    Family("ViT", "ViTForImageClassification"),
    Family("DINOv2", "Dinov2ForImageClassification", layers="layer"),
    Family("SigLIP, vision", "SiglipVisionModel"),
    Family(
        "Gemma 3 with images",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "sliding_window": 4, "sliding_window_pattern": 2},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
        },
        layers="language_model.layers",
    ),
    Family(
        "Qwen2.5-VL with images",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**SIZES, "rope_parameters": MROPE},
            "vision_config": QWEN_VISION,
            "image_token_id": IMAGE_TOKEN,
        },
        layers="language_model.layers",
    ),
    Family("Llama 4 without temperature", "Llama4ForCausalLM", {**LLAMA4, "attn_temperature_tuning": False}),
    Family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN_VISION},
        refused="adds image features to the hidden states between its layers",
    ),
    Family("Llama 4", "Llama4ForCausalLM", LLAMA4, refused="Llama4TextAttention counts the tokens it is given"),
    Family("DeBERTa", "DebertaV2ForSequenceClassification", attention="eager", refused=NO_INTERFACE),
    Family("Bloom", "BloomForCausalLM", attention="eager", refused=NO_INTERFACE),
    Family("LFM2", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"] * 2}, refused="Lfm2ShortConv"),
    Family("Qwen3-Next", "Qwen3NextForCausalLM", {**MOE, "head_dim": 16}, refused="Qwen3NextGatedDeltaNet"),
    Family("Falcon-H1", "FalconH1ForCausalLM", refused="mixes tokens in Conv1d"),
    Family("MiniMax", "MiniMaxForCausalLM", ROUTED, refused="MiniMaxLightningAttention"),
    Family("Gemma 3n", "Gemma3nForCausalLM", PER_LAYER, refused="shares keys and values with other layers"),
    Family("Gemma 4", "Gemma4ForCausalLM", PER_LAYER, refused="shares keys and values with other layers"),
    Family("DeepSeek-V3.2", "DeepseekV32ForCausalLM", LATENT, refused="DeepseekV32Indexer"),
    Family("Doge", "DogeForCausalLM", refused="DogeAttention computes with the mask itself"),
    Family("T5", "T5ForConditionalGeneration", {"d_model": 32, "d_ff": 48, "d_kv": 8}, refused="encoder-decoder"),
    Family("BART", "BartForConditionalGeneration", {"d_model": 32}, refused="encoder-decoder"),
    # Drawn with seed 0 from the 120 model types with a causal class and the attention interface, those above left out.
    Family("Seed-OSS", "SeedOssForCausalLM", {"head_dim": 16}, drawn=True),
    Family("GraniteMoE", "GraniteMoeForCausalLM", ROUTED, drawn=True),
    Family("PhiMoE", "PhimoeForCausalLM", ROUTED, drawn=True),
    Family("XLM-RoBERTa", "XLMRobertaForCausalLM", {"is_decoder": True}, layers="layer", drawn=True),
    Family("Helium", "HeliumForCausalLM", {"head_dim": 16}, drawn=True),
    Family("A.X K2", "AXK2ForCausalLM", LATENT, drawn=True, refused="AXK2Indexer"),
    Family("ERNIE 4.5 MoE", "Ernie4_5_MoeForCausalLM", {**MOE, "moe_num_experts": 4, "moe_k": 2}, drawn=True),
    Family("Kimi Linear", "KimiLinearForCausalLM", LATENT | HYBRID, drawn=True, refused="KimiLinear.* mixes tokens in"),
    Family("Jais 2", "Jais2ForCausalLM", drawn=True),
    Family(
        "GraniteMoE hybrid",
        "GraniteMoeHybridForCausalLM",
        ROUTED | HYBRID,
        drawn=True,
        refused="mixes tokens in .*Mamba",
    ),
]
