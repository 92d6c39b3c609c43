"""A zoo of tiny random models of many architectures, to test the compiler and backends with. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mobizo_compiler.step.losses import CausalLMLoss, Loss, MaskedLMLoss, MSELoss, SequenceClassificationLoss
from mobizo_compiler.testing.case import Case
from mobizo_compiler.testing.plain import plain_cases

_ROWS, _TOKENS, _VOCABULARY = 3, 7, 23
_IDS = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
# Hidden size, widths of heads and of the MLP, and numbers of heads differ, so that no projection is square.
_DECODER = _IDS | {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
}
# For architectures whose heads have to have hidden_size / num_attention_heads elements.
_PLAIN = {key: value for key, value in _DECODER.items() if key not in ("head_dim", "num_key_value_heads")}
_PLAIN["hidden_size"] = 24
_ENCODER = _PLAIN | {"hidden_size": 20, "type_vocab_size": 2, "num_labels": 3}
_SEQ2SEQ = _IDS | {
    "d_model": 20,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 28,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5 = _IDS | {
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 28,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
_VISION = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
# Two stages of a vision transformer with fewer and wider patches in the second.
_PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [8, 12],
    "num_attention_heads": [2, 3],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_labels": 3,
}
_SPEECH = _ENCODER | {
    "conv_dim": (8, 12),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
}
# Modules to adapt, by the ends of their names.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA = ("q_proj", "v_proj", "o_proj", "down_proj")
_QUERY = ("query", "value", "intermediate.dense")
_VIT = ("q_proj", "v_proj", "fc1", "classifier")
_FFN = ("q_proj", "v_proj", "fc1", "fc2")
_MIXED = ["sliding_attention", "full_attention"]
_CAUSAL_LM = CausalLMLoss()


def zoo() -> dict[str, Case]:
    """All cases by name: plain modules and architectures of transformers, which is imported when a model is built."""
    groups = (
        plain_cases(),
        _decoders(),
        _encoders(),
        _encoder_decoders(),
        _vision(),
        _speech(),
        _multimodal(),
        _others(),
    )
    return {case.name: case for cases in groups for case in cases}


def _transformers(model: str, config: str, /, *settings: Mapping[str, Any], **more: Any) -> Callable[[], nn.Module]:
    """Builder of a model of transformers; of settings with the same name the last counts."""
    merged = {key: value for setting in (*settings, more) for key, value in setting.items()}

    def build() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**merged))
        _widen(made)
        return made

    return build


@torch.no_grad()
def _widen(model: nn.Module) -> None:
    """Draws weights anew, so wide that a signal keeps its size; the usual ones let it vanish in a tiny model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                cast(Tensor, tensor).uniform_(0.5, 1.5)
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() < 2 or isinstance(module, nn.Embedding):
            continue
        fan_in = weight.shape[0] if type(module).__name__ == "Conv1D" else weight[0].numel()
        weight.normal_(std=(2 / fan_in) ** 0.5)


def _text(
    tokens: int = _TOKENS, last: int | None = None, mask: bool = True, decoder: int = 0
) -> Callable[[], dict[str, Any]]:
    """Token ids and a mask that leaves out the last token of the last row; ids for a decoder if its tokens are given.

    Args:
        tokens: Tokens in a row.
        last: Id of the last token of every row; None for random ones and padding in the last row.
        mask: Whether there is an attention mask.
        decoder: Tokens in a row of `decoder_input_ids`; 0 for no such input.
    """

    def inputs() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        ids_NT = torch.randint(3, _VOCABULARY - 1, (_ROWS, tokens), generator=generator)
        found = {"input_ids": ids_NT}
        if mask:
            found["attention_mask"] = torch.ones_like(ids_NT)
            found["attention_mask"][-1, -1] = 0
            ids_NT[-1, -1] = 0
        if last is not None:
            ids_NT[:, -1] = last
            ids_NT[-1, -2:] = torch.tensor([last, 0])
        if decoder:
            found["decoder_input_ids"] = torch.randint(3, _VOCABULARY - 1, (_ROWS, decoder), generator=generator)
        return found

    return inputs


_TEXT = _text()


def _floats(*others: Callable[[], dict[str, Any]], **shapes: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    """Normal random inputs with these names and shapes, without rows, next to what other makers of inputs make."""

    def inputs() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        found: dict[str, Any] = {}
        for other in others:
            found |= other()
        return found | {key: torch.randn(_ROWS, *shape, generator=generator) for key, shape in shapes.items()}

    return inputs


def _decoder(
    name: str,
    prefix: str,
    targets: tuple[str, ...],
    *settings: Mapping[str, Any],
    head: str = "ForCausalLM",
    config: str = "Config",
    inputs: Callable[[], dict[str, Any]] = _TEXT,
    loss: Loss = _CAUSAL_LM,
    **more: Any,
) -> Case:
    """A decoder on text; `settings` are those of most decoders unless given."""
    build = _transformers(f"{prefix}{head}", f"{prefix}{config}", *(settings or (_DECODER,)), **more)
    return Case(name, "decoder", build, inputs, loss, targets)


def _encoder(
    name: str,
    prefix: str,
    head: str,
    targets: tuple[str, ...] = _QUERY,
    *settings: Mapping[str, Any],
    inputs: Callable[[], dict[str, Any]] = _TEXT,
    loss: Loss | None = None,
    **more: Any,
) -> Case:
    """An encoder on text; `settings` are those of most encoders unless given, the loss follows from the head."""
    build = _transformers(f"{prefix}For{head}", f"{prefix}Config", *(settings or (_ENCODER,)), **more)
    usual = SequenceClassificationLoss() if head == "SequenceClassification" else MaskedLMLoss()
    return Case(name, "encoder", build, inputs, loss or usual, targets)


def _encoder_decoder(
    name: str,
    prefix: str,
    targets: tuple[str, ...] = _FFN,
    *settings: Mapping[str, Any],
    head: str = "ForConditionalGeneration",
    **more: Any,
) -> Case:
    """An encoder-decoder on text; `settings` are those of BART and its relatives unless given."""
    build = _transformers(f"{prefix}{head}", f"{prefix}Config", *(settings or (_SEQ2SEQ,)), **more)
    return Case(name, "encoder-decoder", build, _text(decoder=5), MaskedLMLoss(), targets)


def _image(
    name: str, prefix: str, targets: tuple[str, ...], size: int = 8, *settings: Mapping[str, Any], **more: Any
) -> Case:
    """A classifier of square images; `settings` are those of most vision transformers unless given."""
    usual = {"num_labels": 3, "image_size": size}
    build = _transformers(
        f"{prefix}ForImageClassification", f"{prefix}Config", *(settings or (_VISION,)), usual, **more
    )
    inputs = _floats(pixel_values=(3, size, size))
    return Case(name, "vision", build, inputs, SequenceClassificationLoss(), targets)


def _audio(
    name: str,
    prefix: str,
    head: str,
    targets: tuple[str, ...] = ("q_proj", "v_proj", "intermediate_dense"),
    **more: Any,
) -> Case:
    """An encoder of waves; the loss follows from the head."""
    build = _transformers(f"{prefix}For{head}", f"{prefix}Config", _SPEECH, **more)
    loss: Loss = SequenceClassificationLoss() if head == "SequenceClassification" else MaskedLMLoss()
    return Case(name, "speech", build, _floats(input_values=(200,)), loss, targets)


def _heard(*shape: int, name: str = "input_features") -> Callable[[], dict[str, Any]]:
    """Features of speech, and ids for the decoder."""
    return _floats(lambda: {"decoder_input_ids": _text(5, mask=False)()["input_ids"]}, **{name: shape})


def _trajectory() -> dict[str, Any]:
    """States, actions and rewards of four steps."""
    found = _floats(states=(4, 5), actions=(4, 4), rewards=(4, 1), returns_to_go=(4, 1))()
    found["timesteps"] = torch.arange(4).repeat(_ROWS, 1)
    found["attention_mask"] = torch.ones(_ROWS, 4)
    return found


# A case is an entry of a table of few lines.
# fmt: off
def _decoders() -> list[Case]:
    moe = {"experts_implementation": "batched_mm", "num_experts_per_tok": 2, "moe_intermediate_size": 10}
    moe |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    gpt2 = _IDS | {"n_embd": 20, "n_inner": 28, "n_layer": 2, "n_head": 4, "n_positions": 32}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 10, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 4}
    latent = {"q_lora_rank": 10, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    latent |= {"head_dim": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    latent |= {"n_group": 2, "topk_group": 1}
    return [
        _decoder("llama", "Llama", _LLAMA),
        _decoder("mistral", "Mistral", _LLAMA, sliding_window=4),
        _decoder("qwen2", "Qwen2", _LLAMA),
        _decoder("qwen3", "Qwen3", _LLAMA),
        _decoder("gemma2", "Gemma2", _LLAMA, sliding_window=4, query_pre_attn_scalar=6, layer_types=_MIXED),
        _decoder("gemma3", "Gemma3", _LLAMA, config="TextConfig", sliding_window=4, query_pre_attn_scalar=6,
            layer_types=_MIXED),
        _decoder("phi3", "Phi3", ("qkv_proj", "gate_up_proj", "down_proj"), head="ForSequenceClassification",
            loss=SequenceClassificationLoss(), num_labels=3),
        _decoder("smollm3", "SmolLM3", _LLAMA, no_rope_layers=[1, 0]),
        _decoder("olmo2", "Olmo2", _LLAMA),
        _decoder("gpt2", "GPT2", ("c_attn", "c_fc", "c_proj"), gpt2, head="LMHeadModel"),
        _decoder("gpt_neox", "GPTNeoX", ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"), _PLAIN),
        _decoder("opt", "OPT", _FFN, _PLAIN, ffn_dim=28, word_embed_proj_dim=12),
        _decoder("bloom", "Bloom", ("query_key_value", "dense_h_to_4h"), _IDS, hidden_size=20, n_layer=2, n_head=4),
        _decoder("falcon", "Falcon", ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"), _PLAIN),
        _decoder("mixtral", "Mixtral", _ATTENTION, _DECODER, moe),
        _decoder("mamba", "Mamba", ("in_proj", "x_proj", "out_proj"), _PLAIN, state_size=5, time_step_rank=3),
        _decoder("gemma", "Gemma", _LLAMA),
        _decoder("gptj", "GPTJ", ("q_proj", "v_proj", "fc_in"), gpt2, n_embd=24, rotary_dim=4),
        _decoder("gpt_bigcode", "GPTBigCode", ("c_attn", "c_fc"), gpt2),
        _decoder("stablelm", "StableLm", _LLAMA, _PLAIN, num_key_value_heads=2),
        _decoder("cohere", "Cohere", _LLAMA),
        _decoder("cohere2", "Cohere2", _LLAMA, sliding_window=4, layer_types=_MIXED),
        _decoder("granite", "Granite", _LLAMA),
        _decoder("starcoder2", "Starcoder2", ("q_proj", "v_proj", "c_fc", "c_proj"), _PLAIN, num_key_value_heads=2),
        _decoder("qwen2_moe", "Qwen2Moe", _ATTENTION, _DECODER, moe, shared_expert_intermediate_size=14),
        _decoder("qwen3_moe", "Qwen3Moe", _LLAMA, _DECODER, moe, mlp_only_layers=[1]),
        _decoder("olmoe", "Olmoe", _ATTENTION, _PLAIN, moe, num_key_value_heads=2),
        _decoder("olmo", "Olmo", _LLAMA),
        _decoder("olmo3", "Olmo3", _LLAMA, sliding_window=4, layer_types=_MIXED),
        _decoder("gpt_oss", "GptOss", _ATTENTION, _DECODER, moe, sliding_window=4, layer_types=_MIXED),
        _decoder("phi", "Phi", _FFN, _PLAIN, hidden_size=32, num_key_value_heads=2),
        _decoder("phimoe", "Phimoe", _ATTENTION, _DECODER, moe),
        _decoder("mpt", "Mpt", ("Wqkv", "up_proj", "down_proj"), _IDS, d_model=20, n_heads=4, n_layers=2,
            max_seq_len=32, expansion_ratio=2),
        _decoder("codegen", "CodeGen", ("qkv_proj", "fc_in", "fc_out"), gpt2, n_embd=24, rotary_dim=4),
        _decoder("xglm", "XGLM", _FFN, _IDS, d_model=20, ffn_dim=28, num_layers=2,
            attention_heads=4, max_position_embeddings=32),
        _decoder("biogpt", "BioGpt", _FFN, _PLAIN, hidden_size=20),
        _decoder("rwkv", "Rwkv", ("attention.key", "attention.output", "feed_forward.key"), _IDS, hidden_size=20,
            attention_hidden_size=24, intermediate_size=28, num_hidden_layers=2, context_length=32),
        _decoder("mamba2", "Mamba2", ("in_proj", "out_proj"), _IDS, hidden_size=20, num_hidden_layers=2, expand=2,
            num_heads=4, head_dim=10, state_size=6, n_groups=2, chunk_size=4),
        _decoder("falcon_mamba", "FalconMamba", ("in_proj", "x_proj", "out_proj"), _PLAIN, state_size=5,
            time_step_rank=3),
        _decoder("jamba", "Jamba", ("q_proj", "v_proj", "in_proj", "x_proj"), _DECODER, moe, attn_layer_period=2,
            attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=5, mamba_dt_rank=3,
            use_mamba_kernels=False),
        _decoder("bamba", "Bamba", ("q_proj", "v_proj", "in_proj", "down_proj"), _DECODER, mamba,
            attn_layer_indices=[1]),
        _decoder("zamba2", "Zamba2", ("q_proj", "v_proj", "in_proj"), _DECODER, mamba_d_state=6, mamba_ngroups=2,
            n_mamba_heads=4, mamba_headdim=10, chunk_size=4, layers_block_type=["mamba", "hybrid"], num_mem_blocks=1,
            adapter_rank=3),
        _decoder("falcon_h1", "FalconH1", ("q_proj", "v_proj", "in_proj", "down_proj"), _DECODER, mamba,
            mamba_d_ssm=40),
        _decoder("nemotron", "Nemotron", ("q_proj", "v_proj", "up_proj", "down_proj")),
        _decoder("glm", "Glm", ("q_proj", "v_proj", "gate_up_proj", "down_proj")),
        _decoder("glm4", "Glm4", ("q_proj", "v_proj", "gate_up_proj", "down_proj")),
        _decoder("glm4_moe", "Glm4Moe", _LLAMA, _DECODER, moe, first_k_dense_replace=1),
        _decoder("deepseek_v2", "DeepseekV2", ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "down_proj"), _DECODER, moe,
            latent, topk_method="greedy"),
        _decoder("deepseek_v3", "DeepseekV3", ("q_a_proj", "kv_b_proj", "o_proj", "down_proj"), _DECODER, moe, latent),
        _decoder("helium", "Helium", _LLAMA, _PLAIN, num_key_value_heads=2, head_dim=6),
        _decoder("exaone4", "Exaone4", _LLAMA, sliding_window=4, layer_types=_MIXED),
        _decoder("granitemoe", "GraniteMoe", _ATTENTION, _PLAIN, moe, num_key_value_heads=2),
        _decoder("persimmon", "Persimmon", ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"), _PLAIN,
            hidden_size=32),
        _decoder("gpt_neo", "GPTNeo", ("q_proj", "v_proj", "c_fc", "c_proj"), _IDS, hidden_size=20,
            intermediate_size=28, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
            max_position_embeddings=32),
        _decoder("gpt_neox_japanese", "GPTNeoXJapanese", ("query_key_value", "dense_h_to_4h"), _PLAIN,
            intermediate_multiple_size=2),
        _decoder("ctrl", "CTRL", ("Wq", "Wv", "ffn.0"), gpt2, dff=28, head="LMHeadModel"),
        _decoder("openai_gpt", "OpenAIGPT", ("c_attn", "c_fc"), gpt2, head="LMHeadModel"),
        _decoder("diffllama", "DiffLlama", _LLAMA),
        _decoder("arcee", "Arcee", ("q_proj", "v_proj", "up_proj", "down_proj")),
        _decoder("apertus", "Apertus", ("q_proj", "v_proj", "up_proj", "down_proj")),
        _decoder("hunyuan", "HunYuanDenseV1", _LLAMA),
        _decoder("ernie4_5_moe", "Ernie4_5_Moe", _LLAMA, _DECODER, moe, moe_num_experts=3, moe_k=2,
            moe_layer_start_index=1, moe_layer_end_index=1),
        _decoder("lfm2", "Lfm2", ("q_proj", "v_proj", "in_proj", "w2"), layer_types=["conv", "full_attention"]),
        _decoder("recurrent_gemma", "RecurrentGemma", ("q_proj", "v_proj", "linear_x", "down_proj"), lru_width=16,
            attention_window_size=4, block_types=["recurrent", "attention"]),
        _decoder("bitnet", "BitNet", _LLAMA, _PLAIN, num_key_value_heads=2),
        _decoder("doge", "Doge", _LLAMA),
        _decoder("minimax", "MiniMax", ("qkv_proj", "q_proj", "v_proj"), _DECODER, moe, block_size=4,
            layer_types=["linear_attention", "full_attention"]),
        _decoder("nanochat", "NanoChat", _FFN),
        _decoder("qwen3_next", "Qwen3Next", ("q_proj", "v_proj", "in_proj_qkvz", "down_proj"), _DECODER, moe,
            shared_expert_intermediate_size=14, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=6,
            linear_value_head_dim=5, layer_types=["linear_attention", "full_attention"]),
        _decoder("modernbert_decoder", "ModernBertDecoder", ("q_proj", "v_proj", "Wi", "Wo"), _PLAIN,
            layer_types=_MIXED, local_attention=4, cls_token_id=1, sep_token_id=2),
        _decoder("vaultgemma", "VaultGemma", _LLAMA, sliding_window=4, query_pre_attn_scalar=6, layer_types=_MIXED),
        _decoder("xlstm", "xLSTM", ("q", "v", "proj_up", "proj_down"), _PLAIN, inputs=_text(mask=False), num_heads=4,
            chunk_size=4),
        _decoder("jetmoe", "JetMoe", ("kv_proj",), _DECODER, moe, kv_channels=6),
        _decoder("gemma3n", "Gemma3n", ("q_proj", "v_proj", "down_proj"), config="TextConfig", sliding_window=4,
            layer_types=_MIXED, vocab_size_per_layer_input=23, hidden_size_per_layer_input=6, laurel_rank=3,
            num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0]),
        _decoder("gemma4", "Gemma4", ("q_proj", "v_proj", "down_proj"), config="TextConfig", sliding_window=4,
            layer_types=_MIXED, vocab_size_per_layer_input=23, hidden_size_per_layer_input=6, num_kv_shared_layers=0,
            global_head_dim=8),
        _decoder("llama4", "Llama4", _ATTENTION, config="TextConfig", num_local_experts=2, intermediate_size_mlp=28,
            attention_chunk_size=4, layer_types=["chunked_attention", "full_attention"]),
        _decoder("trocr", "TrOCR", _FFN, _SEQ2SEQ),
        _decoder("imagegpt", "ImageGPT", ("c_attn", "c_fc"), gpt2, head="ForCausalImageModeling"),
    ]


def _encoders() -> list[Case]:
    distilbert = {"dim": 20, "hidden_dim": 28, "n_layers": 2, "n_heads": 4, "num_labels": 1}
    disentangled = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
    return [
        _encoder("bert", "Bert", "MaskedLM"),
        _encoder("roberta", "Roberta", "SequenceClassification"),
        _encoder("distilbert", "DistilBert", "SequenceClassification", ("q_lin", "lin1", "lin2"), _ENCODER, distilbert,
            loss=MSELoss()),
        _encoder("albert", "Albert", "MaskedLM", ("query", "value", "ffn"), embedding_size=12),
        _encoder("electra", "Electra", "TokenClassification", embedding_size=12),
        _encoder("deberta_v2", "DebertaV2", "MaskedLM", ("query_proj", "value_proj", "intermediate.dense"), _ENCODER,
            disentangled),
        _encoder("modernbert", "ModernBert", "MaskedLM", ("Wqkv", "Wi", "Wo"), _PLAIN, layer_types=_MIXED[::-1],
            local_attention=4, cls_token_id=1, sep_token_id=2),
        _encoder("mpnet", "MPNet", "MaskedLM", ("q", "v", "intermediate.dense")),
        _encoder("xlm_roberta", "XLMRoberta", "TokenClassification"),
        _encoder("fnet", "FNet", "MaskedLM", ("intermediate.dense", "output.dense"), inputs=_text(mask=False)),
        _encoder("squeezebert", "SqueezeBert", "SequenceClassification", ("query", "value", "intermediate.conv1d"),
            embedding_size=20, q_groups=1, v_groups=1, intermediate_groups=1),
        _encoder("mobilebert", "MobileBert", "MaskedLM", embedding_size=12, true_hidden_size=16,
            intra_bottleneck_size=16, num_feedforward_networks=2),
        _encoder("convbert", "ConvBert", "SequenceClassification", embedding_size=12, head_ratio=2, conv_kernel_size=3),
        _encoder("nystromformer", "Nystromformer", "MaskedLM", num_landmarks=7, segment_means_seq_len=7,
            conv_kernel_size=3),
        _encoder("roformer", "RoFormer", "MaskedLM", _QUERY, _PLAIN, embedding_size=12),
        _encoder("ernie", "Ernie", "SequenceClassification", task_type_vocab_size=2),
        _encoder("esm", "Esm", "MaskedLM", _QUERY, _PLAIN, position_embedding_type="rotary", mask_token_id=3),
        _encoder("layoutlm", "LayoutLM", "TokenClassification", max_2d_position_embeddings=16),
        _encoder("xlnet", "XLNet", "SequenceClassification", ("layer_1", "layer_2"), _IDS, d_model=20, n_layer=2,
            n_head=4, d_inner=28, use_mems_eval=False, num_labels=3),
        _encoder("funnel", "Funnel", "MaskedLM", ("q_head", "v_head", "linear_1"), _IDS, block_sizes=[1, 1],
            num_decoder_layers=1, d_model=20, n_head=4, d_head=6, d_inner=28, inputs=_text(8)),
        _encoder("big_bird", "BigBird", "MaskedLM", attention_type="block_sparse", block_size=2, num_random_blocks=1,
            inputs=_text(16)),
        _encoder("deberta", "Deberta", "SequenceClassification", ("in_proj", "intermediate.dense"), _ENCODER,
            disentangled),
        _encoder("rembert", "RemBert", "MaskedLM", input_embedding_size=12, output_embedding_size=14),
        _encoder("roberta_prelayernorm", "RobertaPreLayerNorm", "MaskedLM"),
        _encoder("xmod", "Xmod", "MaskedLM", languages=["en"], default_language="en"),
        _encoder("ibert", "IBert", "SequenceClassification", ("classifier.dense", "out_proj")),
        _encoder("yoso", "Yoso", "MaskedLM", use_expectation=True, conv_window=None),
        _encoder("xlm", "XLM", "SequenceClassification", ("q_lin", "lin1"), _IDS, emb_dim=20, n_layers=2, n_heads=4,
            n_words=23, num_labels=3, max_position_embeddings=32),
        _encoder("nomic_bert", "NomicBert", "MaskedLM", _LLAMA, _PLAIN),
        _encoder("eurobert", "EuroBert", "MaskedLM", _LLAMA, _DECODER),
        _encoder("roc_bert", "RoCBert", "SequenceClassification", enable_pronunciation=False, enable_shape=False),
        _encoder("perceiver", "Perceiver", "MaskedLM", ("query", "value", "mlp.dense1"), _IDS, num_latents=5,
            d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=2,
            num_cross_attention_heads=2, max_position_embeddings=7, qk_channels=256, v_channels=16),
        _encoder("tapas", "Tapas", "SequenceClassification", type_vocab_sizes=[3, 8, 8, 2, 8, 8, 10]),
        _encoder("luke", "Luke", "TokenClassification", entity_vocab_size=9, entity_emb_size=6),
        _encoder("markuplm", "MarkupLM", "TokenClassification", max_depth=3, xpath_unit_hidden_size=4,
            max_xpath_tag_unit_embeddings=8, max_xpath_subs_unit_embeddings=8, tag_pad_id=0, subs_pad_id=0),
        _encoder("lilt", "Lilt", "TokenClassification", max_2d_position_embeddings=16, channel_shrink_ratio=2,
            hidden_size=24),
        _encoder("reformer", "Reformer", "MaskedLM", ("query", "value", "feed_forward.dense.dense"), _IDS,
            hidden_size=20, num_attention_heads=4, attention_head_size=6, feed_forward_size=28, attn_layers=["local"],
            local_attn_chunk_length=4, axial_pos_embds=False, is_decoder=False, max_position_embeddings=32,
            inputs=_text(8)),
    ]


def _encoder_decoders() -> list[Case]:
    return [
        _encoder_decoder("t5", "T5", ("q", "v", "wi", "wo"), _T5),
        _encoder_decoder("bart", "Bart"),
        _encoder_decoder("mbart", "MBart"),
        _encoder_decoder("marian", "Marian", head="MTModel"),
        _encoder_decoder("pegasus", "Pegasus"),
        _encoder_decoder("pegasus_x", "PegasusX", block_size=4, num_global_tokens=2),
        _encoder_decoder("mt5", "MT5", ("q", "v", "wi_0", "wo"), _T5),
        _encoder_decoder("longt5", "LongT5", ("q", "v", "wi", "wo"), _T5, local_radius=3,
            encoder_attention_type="transient-global", global_block_size=4),
        _encoder_decoder("blenderbot", "Blenderbot"),
        _encoder_decoder("prophetnet", "ProphetNet", ("query_proj", "value_proj", "intermediate"), _IDS, hidden_size=20,
            num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
            encoder_ffn_dim=28, decoder_ffn_dim=36, max_position_embeddings=32, ngram=2, decoder_start_token_id=1),
        _encoder_decoder("m2m_100", "M2M100"),
        _encoder_decoder("mvp", "Mvp", use_prompt=True, prompt_length=3, prompt_mid_dim=8),
        _encoder_decoder("bigbird_pegasus", "BigBirdPegasus", ("query", "q_proj", "fc1"),
            attention_type="original_full"),
    ]


def _vision() -> list[Case]:
    windows = {"patch_size": 4, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "window_size": 4}
    stages = {"hidden_sizes": [6, 10], "depths": [1, 2], "num_stages": 2}
    return [
        _image("vit", "ViT", _VIT),
        _image("swin", "Swin", ("q_proj", "v_proj", "fc1", "reduction"), 32, windows),
        _image("convnext", "ConvNext", ("pwconv1", "pwconv2", "classifier"), 16, stages, patch_size=4,
            layer_scale_init_value=0.5),
        _image("deit", "DeiT", _VIT),
        _image("beit", "Beit", _VIT, use_relative_position_bias=True),
        _image("dinov2", "Dinov2", _VIT, mlp_ratio=2),
        _image("dinov2_with_registers", "Dinov2WithRegisters", _VIT, mlp_ratio=2, num_register_tokens=2),
        _image("vit_msn", "ViTMSN", _VIT),
        _image("siglip", "Siglip", _VIT, 8, {"vision_config": _VISION, "text_config": _PLAIN, "num_labels": 3}),
        _image("swinv2", "Swinv2", ("query", "value", "intermediate.dense", "reduction"), 32, windows),
        _image("convnextv2", "ConvNextV2", ("pwconv1", "pwconv2", "classifier"), 16, stages, patch_size=4),
        _image("resnet", "ResNet", ("convolution", "classifier.1"), 16, stages, embedding_size=4,
            layer_type="bottleneck"),
        _image("regnet", "RegNet", ("attention.0", "attention.2", "classifier.1"), 16, stages, embedding_size=4,
            groups_width=2, layer_type="y"),
        _image("mobilevit", "MobileViT", ("query", "value", "intermediate.dense"), 32, hidden_sizes=[12, 16, 20],
            neck_hidden_sizes=[4, 6, 8, 10, 12, 14, 18], num_attention_heads=4, patch_size=2),
        _image("mobilevitv2", "MobileViTV2", ("qkv_proj.convolution", "conv1.convolution", "classifier"), 64,
            patch_size=2, width_multiplier=0.125, base_attn_unit_dims=[32, 48, 64]),
        _image("mobilenet_v1", "MobileNetV1", ("classifier",), 32, depth_multiplier=0.1, min_depth=4),
        _image("mobilenet_v2", "MobileNetV2", ("expand_1x1.convolution", "reduce_1x1.convolution", "classifier"), 32,
            depth_multiplier=0.1, min_depth=4),
        _image("efficientnet", "EfficientNet", ("expand_conv", "project_conv", "classifier"), 32, width_coefficient=0.2,
            depth_coefficient=0.3, depth_divisor=4, hidden_dim=256),
        _image("segformer", "Segformer", ("q_proj", "v_proj", "fc1"), 32, _PYRAMID),
        _image("poolformer", "PoolFormer", ("conv1", "conv2"), 32, _PYRAMID, padding=[2, 1], mlp_ratio=2.0,
            layer_scale_init_value=0.5),
        _image("hiera", "Hiera", ("qkv", "fc1", "fc2"), 32, image_size=[32, 32], embed_dim=8, depths=[1, 1],
            num_heads=[2, 2], query_stride=[2, 2], masked_unit_size=[2, 2], masked_unit_attention=[True, False],
            num_query_pool=1, patch_size=[3, 3], patch_stride=[4, 4], patch_padding=[1, 1], mlp_ratio=2.0),
        _image("focalnet", "FocalNet", ("projection_in", "fc1"), 32, embed_dim=8, depths=[1, 1], hidden_sizes=[8, 12],
            focal_levels=[2, 2], focal_windows=[3, 3]),
        _image("cvt", "Cvt", ("projection_query", "projection_value", "intermediate.dense"), 32, embed_dim=[8, 12],
            num_heads=[1, 2], depth=[1, 2], patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1],
            mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0],
            qkv_bias=[True, True], cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3],
            padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1]),
        _image("pvt", "Pvt", ("query", "value", "dense1"), 32, _PYRAMID, sequence_reduction_ratios=[2, 1],
            patch_sizes=[4, 2]),
        _image("pvt_v2", "PvtV2", ("query", "value", "dense1"), 32, _PYRAMID),
        _image("hgnet_v2", "HGNetV2", ("stem4.convolution", "aggregation.0.convolution", "fc"), 32, embedding_size=8,
            stem_channels=[3, 4, 8], stage_in_channels=[8, 12], stage_mid_channels=[6, 6], stage_out_channels=[12, 16],
            stage_num_blocks=[1, 1], stage_downsample=[False, True], stage_light_block=[False, True],
            stage_kernel_size=[3, 5], stage_numb_of_layers=[2, 2], hidden_sizes=[12, 16], depths=[1, 1]),
        Case("videomae", "vision", _transformers("VideoMAEForVideoClassification", "VideoMAEConfig", _VISION,
            num_frames=4, tubelet_size=2), _floats(pixel_values=(4, 3, 8, 8)), SequenceClassificationLoss(), _QUERY),
        Case("vivit", "vision", _transformers("VivitForVideoClassification", "VivitConfig", _VISION, num_frames=4,
            tubelet_size=[2, 4, 4]), _floats(pixel_values=(4, 3, 8, 8)), SequenceClassificationLoss(), _VIT),
        Case("timesformer", "vision", _transformers("TimesformerForVideoClassification", "TimesformerConfig", _VISION,
            num_frames=2), _floats(pixel_values=(2, 3, 8, 8)), SequenceClassificationLoss(),
            ("qkv", "intermediate.dense")),
        Case("segformer_pixels", "vision", _transformers("SegformerForSemanticSegmentation", "SegformerConfig",
            _PYRAMID, decoder_hidden_size=10), _floats(pixel_values=(3, 16, 16)), MSELoss(),
            ("q_proj", "fc1", "linear_fuse")),
        Case("yolos", "vision", _transformers("YolosForObjectDetection", "YolosConfig",
            _VISION | {"image_size": [8, 8]}, num_detection_tokens=4), _floats(pixel_values=(3, 8, 8)),
            MSELoss("pred_boxes"), ("query", "value", "intermediate.dense")),
    ]


def _speech() -> list[Case]:
    whisper = _SEQ2SEQ | {"num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 16}
    return [
        Case("whisper", "speech", _transformers("WhisperForConditionalGeneration", "WhisperConfig", whisper),
            _heard(6, 16), MaskedLMLoss(), _FFN),
        _audio("wav2vec2", "Wav2Vec2", "CTC"),
        _audio("wav2vec2_conformer", "Wav2Vec2Conformer", "CTC", ("linear_q", "linear_v", "intermediate_dense"),
            conv_depthwise_kernel_size=3, position_embeddings_type="relative"),
        _audio("hubert", "Hubert", "SequenceClassification"),
        _audio("wavlm", "WavLM", "SequenceClassification", num_buckets=8, max_bucket_distance=16),
        _audio("unispeech_sat", "UniSpeechSat", "AudioFrameClassification"),
        _audio("data2vec_audio", "Data2VecAudio", "CTC", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
        _audio("sew", "SEW", "CTC", squeeze_factor=2),
        _audio("sew_d", "SEWD", "SequenceClassification", ("value_proj", "intermediate.dense"),
            squeeze_factor=2, max_position_embeddings=32, position_buckets=8, share_att_key=True,
            pos_att_type=("p2c", "c2p"), feature_layer_norm_eps=1e-7),
        Case("wav2vec2_bert", "speech", _transformers("Wav2Vec2BertForCTC", "Wav2Vec2BertConfig", _SPEECH,
            feature_projection_input_dim=6, conv_depthwise_kernel_size=3, left_max_position_embeddings=4,
            right_max_position_embeddings=2), _floats(input_features=(9, 6)), MaskedLMLoss(),
            ("linear_q", "linear_v", "intermediate_dense")),
        Case("audio_spectrogram_transformer", "speech", _transformers("ASTForAudioClassification", "ASTConfig", _VISION,
            max_length=12, num_mel_bins=8, frequency_stride=2, time_stride=2), _floats(input_values=(12, 8)),
            SequenceClassificationLoss(), _VIT[:3]),
        Case("speech_to_text", "speech", _transformers("Speech2TextForConditionalGeneration", "Speech2TextConfig",
            _SEQ2SEQ, input_feat_per_channel=6, input_channels=1, conv_channels=8, max_source_positions=16,
            max_target_positions=16), _heard(16, 6), MaskedLMLoss(), _FFN),
        Case("moonshine", "speech", _transformers("MoonshineForConditionalGeneration", "MoonshineConfig", _IDS,
            hidden_size=24, intermediate_size=28, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
            encoder_num_attention_heads=4, decoder_num_attention_heads=4, encoder_num_key_value_heads=4,
            decoder_num_key_value_heads=4, decoder_start_token_id=1), _heard(1600, name="input_values"), MaskedLMLoss(),
            _FFN),
    ]


def _multimodal() -> list[Case]:
    tower = {"text_config": _PLAIN | {"eos_token_id": 22}, "vision_config": _VISION, "projection_dim": 12}
    both = _floats(_text(last=22), pixel_values=(3, 8, 8))
    return [
        Case("clip", "multimodal", _transformers("CLIPModel", "CLIPConfig", tower), both, MSELoss("text_embeds"),
            ("q_proj", "v_proj", "fc1", "text_projection")),
        Case("siglip_text_image", "multimodal",
            _transformers("SiglipModel", "SiglipConfig", tower | {"text_config": _PLAIN | {"projection_size": 20}}),
            both, MSELoss("image_embeds"), ("q_proj", "v_proj", "fc1")),
        Case("chinese_clip", "multimodal", _transformers("ChineseCLIPModel", "ChineseCLIPConfig",
            {"text_config": _ENCODER, "vision_config": _VISION, "projection_dim": 12}), both, MSELoss("image_embeds"),
            ("q_proj", "v_proj", "fc1")),
        Case("blip", "multimodal", _transformers("BlipForConditionalGeneration", "BlipConfig",
            text_config=_PLAIN | {"encoder_hidden_size": 20}, vision_config=_VISION), both, CausalLMLoss(),
            ("qkv", "query", "fc1", "intermediate.dense")),
        Case("git", "multimodal", _transformers("GitForCausalLM", "GitConfig", _PLAIN, vision_config=_VISION), both,
            MSELoss("logits"), ("query", "value", "fc1")),
        Case("visual_bert", "multimodal", _transformers("VisualBertForQuestionAnswering", "VisualBertConfig", _ENCODER,
            visual_embedding_dim=10), _floats(_text(), visual_embeds=(4, 10)), SequenceClassificationLoss(), _QUERY),
        Case("lxmert", "multimodal", _transformers("LxmertForQuestionAnswering", "LxmertConfig", _ENCODER, l_layers=1,
            x_layers=1, r_layers=1, visual_feat_dim=10, num_qa_labels=3),
            _floats(_text(), visual_feats=(4, 10), visual_pos=(4, 4)), MSELoss("question_answering_score"), _QUERY),
        Case("layoutlmv3", "multimodal", _transformers("LayoutLMv3ForSequenceClassification", "LayoutLMv3Config",
            _ENCODER, input_size=8, patch_size=4, coordinate_size=4, shape_size=2, max_2d_position_embeddings=16,
            rel_pos_bins=8, rel_2d_pos_bins=8), both, SequenceClassificationLoss(), _QUERY),
    ]


def _others() -> list[Case]:
    return [
        Case("patchtsmixer", "other", _transformers("PatchTSMixerForPrediction", "PatchTSMixerConfig",
            context_length=16, prediction_length=3, patch_length=4, patch_stride=4, num_input_channels=2, d_model=6,
            num_layers=2, loss="mse"), _floats(past_values=(16, 2)), MSELoss("prediction_outputs"), ("fc1", "fc2")),
        Case("decision_transformer", "other", _transformers("DecisionTransformerModel", "DecisionTransformerConfig",
            state_dim=5, act_dim=4, hidden_size=20, max_ep_len=16, n_layer=2, n_head=4, n_positions=32, n_inner=28),
            _trajectory, MSELoss("action_preds"), ("c_attn", "c_fc")),
        Case("timesfm", "other", _transformers("TimesFmModelForPrediction", "TimesFmConfig", patch_length=4,
            context_length=16, horizon_length=4, hidden_size=20, intermediate_size=28, head_dim=6, num_hidden_layers=2,
            num_attention_heads=4), _floats(past_values=(16,)), MSELoss("mean_predictions"),
            ("q_proj", "v_proj", "down_proj")),
    ]
