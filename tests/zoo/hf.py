"""Models of transformers with small configurations and random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from shardwise.job import Job
from tests.zoo.data import (
    BOS,
    EOS,
    PAD,
    CausalTokens,
    Images,
    ImageTexts,
    MaskedTokens,
    MelTexts,
    Seq2SeqTokens,
    Waveforms,
)

VOCAB = 128
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
CACHELESS: dict[str, Any] = {**TOKENS, "use_cache": False}
BERT: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA: dict[str, Any] = {
    **CACHELESS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CLASSES: dict[str, Any] = {"num_labels": 8, "problem_type": "single_label_classification"}
VIT: dict[str, Any] = {
    **CLASSES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def _job(name: str, architecture: str, data: Dataset[Any], config: dict[str, Any]) -> Job:
    def model() -> nn.Module:
        import transformers

        built = getattr(transformers, architecture)
        return built(built.config_class(**config))  # type: ignore[no-any-return]

    return Job(model=model, data=data, global_batch=8, name=name)


def _gpt2(name: str, dropout: float) -> Job:
    config = {
        **CACHELESS,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 8,
        "n_positions": 32,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
    }
    return _job(name, "GPT2LMHeadModel", CausalTokens(vocab=VOCAB), config)


def gpt2() -> Job:
    """GPT-2: fused qkv in a Conv1D, learned positions, tied head."""
    return _gpt2("gpt2", 0.0)


def gpt2_dropout() -> Job:
    """GPT-2 with its usual dropout."""
    return _gpt2("gpt2_dropout", 0.1)


def llama() -> Job:
    """Llama: 8 query heads over 4 key-value heads, 4 layers."""
    config = {
        **LLAMA,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    return _job("llama", "LlamaForCausalLM", CausalTokens(vocab=VOCAB), config)


def qwen3() -> Job:
    """Qwen3: norms of queries and keys, heads wider in all than the hidden size."""
    return _job("qwen3", "Qwen3ForCausalLM", CausalTokens(vocab=VOCAB), {**LLAMA, "head_dim": 16})


def gemma() -> Job:
    """Gemma: scaled embeddings, tied head."""
    return _job("gemma", "GemmaForCausalLM", CausalTokens(vocab=VOCAB), {**LLAMA, "head_dim": 8})


def phi() -> Job:
    """Phi: attention and MLP in parallel, partial rotary."""
    config = {**LLAMA, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}
    return _job("phi", "PhiForCausalLM", CausalTokens(vocab=VOCAB), config)


def opt() -> Job:
    """OPT on padded text: positions from the attention mask."""
    config = {
        **CACHELESS,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
    }
    return _job("opt", "OPTForCausalLM", CausalTokens(vocab=VOCAB, padded=True), config)


def bloom() -> Job:
    """BLOOM on padded text: ALiBi, qkv fused head by head."""
    config = {**CACHELESS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    return _job("bloom", "BloomForCausalLM", CausalTokens(vocab=VOCAB, padded=True), config)


def gpt_neox() -> Job:
    """GPT-NeoX: parallel residual, qkv fused head by head, partial rotary."""
    config = {
        **CACHELESS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 32,
    }
    return _job("gpt_neox", "GPTNeoXForCausalLM", CausalTokens(vocab=VOCAB), config)


def falcon() -> Job:
    """Falcon's new decoder: 4 query heads over 2 key-value heads in one fused weight."""
    config = {
        **CACHELESS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "max_position_embeddings": 32,
    }
    return _job("falcon", "FalconForCausalLM", CausalTokens(vocab=VOCAB), config)


def mixtral() -> Job:
    """Mixtral: 4 experts, 2 of them per token; `grouped_mm`, the default, has no float64."""
    config = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
    return _job("mixtral", "MixtralForCausalLM", CausalTokens(vocab=VOCAB), config)


def mamba() -> Job:
    """Mamba: a selective state space in place of attention."""
    config = {**CACHELESS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}
    return _job("mamba", "MambaForCausalLM", CausalTokens(vocab=VOCAB), config)


def bert() -> Job:
    """BERT, masked LM on padded text."""
    return _job("bert", "BertForMaskedLM", MaskedTokens(vocab=VOCAB), BERT)


def bert_dropout() -> Job:
    """BERT with its usual dropout."""
    config = {**BERT, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return _job("bert_dropout", "BertForMaskedLM", MaskedTokens(vocab=VOCAB), config)


def roberta() -> Job:
    """RoBERTa, masked LM: positions from a cumulative sum over the tokens that are not padding."""
    config = {**BERT, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    return _job("roberta", "RobertaForMaskedLM", MaskedTokens(vocab=VOCAB), config)


def deberta_v2() -> Job:
    """DeBERTa-v2, masked LM: disentangled attention over relative positions."""
    config = {
        **BERT,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    }
    return _job("deberta_v2", "DebertaV2ForMaskedLM", MaskedTokens(vocab=VOCAB), config)


def distilbert() -> Job:
    """DistilBERT, masked LM."""
    config = {
        **TOKENS,
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 32,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return _job("distilbert", "DistilBertForMaskedLM", MaskedTokens(vocab=VOCAB), config)


def electra() -> Job:
    """ELECTRA's generator, masked LM: embeddings narrower than the layers."""
    return _job("electra", "ElectraForMaskedLM", MaskedTokens(vocab=VOCAB), {**BERT, "embedding_size": 16})


def t5() -> Job:
    """T5: encoder and decoder with one shared bias of relative positions each."""
    config = {
        **CACHELESS,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "dropout_rate": 0.0,
        "decoder_start_token_id": PAD,
    }
    return _job("t5", "T5ForConditionalGeneration", Seq2SeqTokens(vocab=VOCAB), config)


def bart() -> Job:
    """BART: encoder and decoder with learned positions."""
    config = {
        **CACHELESS,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 32,
        "dropout": 0.0,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": EOS,
    }
    return _job("bart", "BartForConditionalGeneration", Seq2SeqTokens(vocab=VOCAB), config)


def vit() -> Job:
    """ViT, image classification."""
    return _job("vit", "ViTForImageClassification", Images(), VIT)


def deit() -> Job:
    """DeiT, image classification: a distillation token next to the class token."""
    return _job("deit", "DeiTForImageClassification", Images(), VIT)


def swin() -> Job:
    """Swin, image classification: shifted windows, which fold the windows into the batch."""
    config = {
        **CLASSES,
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [4, 8],
        "window_size": 4,
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.0,
    }
    return _job("swin", "SwinForImageClassification", Images(), config)


def convnext() -> Job:
    """ConvNeXt, image classification: depthwise convolutions, scaled residuals."""
    config = {
        **CLASSES,
        "image_size": 32,
        "patch_size": 4,
        "num_stages": 2,
        "hidden_sizes": [32, 64],
        "depths": [2, 2],
        "layer_scale_init_value": 0.1,
    }
    return _job("convnext", "ConvNextForImageClassification", Images(), config)


def resnet() -> Job:
    """ResNet, image classification: bottleneck blocks with batch norm."""
    config = {**CLASSES, "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "bottleneck"}
    return _job("resnet", "ResNetForImageClassification", Images(), config)


def clip() -> Job:
    """CLIP and its own contrastive loss, which couples all samples and fixes the batch when captured."""
    return _clip("clip", return_loss=True)


def clip_any_batch() -> Job:
    """CLIP with the same loss written so that it captures for any batch."""
    return _clip("clip_any_batch", return_loss=False).with_(loss=contrastive_loss)


def contrastive_loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the cross-entropies of texts against images and of images against texts."""
    logits = output.logits_per_text
    pairs = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2


def _clip(name: str, *, return_loss: bool) -> Job:
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = {
        "text_config": {**tower, **TOKENS, "max_position_embeddings": 16},
        "vision_config": {**tower, "image_size": 32, "patch_size": 8},
        "projection_dim": 32,
    }

    def model() -> nn.Module:
        from transformers import CLIPConfig, CLIPModel

        class Clip(nn.Module):
            """CLIP, asked for its loss or not."""

            def __init__(self) -> None:
                super().__init__()
                self.clip = CLIPModel(CLIPConfig(**config))

            def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Any:
                return self.clip(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    pixel_values=pixel_values,
                    return_loss=return_loss,
                )

        return Clip()

    return Job(model=model, data=ImageTexts(vocab=VOCAB), global_batch=8, name=name)


def whisper() -> Job:
    """Whisper: convolutions over mel features, then an encoder and a decoder."""
    config = {
        **CACHELESS,
        "num_mel_bins": 16,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_source_positions": 16,
        "max_target_positions": 32,
        "decoder_start_token_id": BOS,
        "begin_suppress_tokens": None,
    }
    return _job("whisper", "WhisperForConditionalGeneration", MelTexts(vocab=VOCAB), config)


def wav2vec2() -> Job:
    """wav2vec 2.0, sequence classification: convolutions over the waveform, a weight-normed positional one."""
    config = {
        **CLASSES,
        **TOKENS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "conv_dim": [32, 32, 32],
        "conv_stride": [5, 4, 2],
        "conv_kernel": [10, 4, 2],
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "classifier_proj_size": 32,
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }
    return _job("wav2vec2", "Wav2Vec2ForSequenceClassification", Waveforms(), config)


MODELS: tuple[Callable[[], Job], ...] = (
    gpt2,
    gpt2_dropout,
    llama,
    qwen3,
    gemma,
    phi,
    opt,
    bloom,
    gpt_neox,
    falcon,
    mixtral,
    mamba,
    bert,
    bert_dropout,
    roberta,
    deberta_v2,
    distilbert,
    electra,
    t5,
    bart,
    vit,
    deit,
    swin,
    convnext,
    resnet,
    clip,
    clip_any_batch,
    whisper,
    wav2vec2,
)
