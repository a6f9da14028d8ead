"""Tiny models of every family, several where options change what is computed.

`build()` yields (name, layout, model). A layout changes the saved files without changing what they
mean: how config.json is written, or what tensors are called.
"""
import json

from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig,
    GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM,
    MistralConfig, MistralForCausalLM, Olmo2Config, Olmo2ForCausalLM, OPTConfig, OPTForCausalLM, Phi3Config,
    Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM,
)

TOKENS = dict(vocab_size=320, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SHAPE = dict(**TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)


def build():
    def shape(**changes):
        return {**SHAPE, **changes}

    def without(*keys, **changes):
        return {k: v for k, v in shape(**changes).items() if k not in keys}

    yield "llama3", None, LlamaForCausalLM(LlamaConfig(**shape(
        rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=64))))
    yield "llama-yarn", v4, LlamaForCausalLM(LlamaConfig(**shape(
        num_hidden_layers=1, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0,
                                                  original_max_position_embeddings=64))))
    yield "llama-dynamic", v4, LlamaForCausalLM(LlamaConfig(**shape(
        num_hidden_layers=1, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))))
    yield "mistral", v4, MistralForCausalLM(MistralConfig(**shape(sliding_window=24, head_dim=12)))
    yield "qwen2-window", None, Qwen2ForCausalLM(Qwen2Config(**shape(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=16, max_window_layers=1,
        tie_word_embeddings=True)))
    yield "qwen2-window-v4", layerless, Qwen2ForCausalLM(Qwen2Config(**shape(
        use_sliding_window=True, sliding_window=16, max_window_layers=1)))
    yield "qwen3", None, Qwen3ForCausalLM(Qwen3Config(**shape(head_dim=16, tie_word_embeddings=True)))
    yield "gemma", gemma_v4, GemmaForCausalLM(GemmaConfig(**shape(head_dim=16, num_key_value_heads=1)))
    yield "gemma2", None, Gemma2ForCausalLM(Gemma2Config(**shape(
        head_dim=16, num_hidden_layers=3, sliding_window=16, query_pre_attn_scalar=24, attn_logit_softcapping=3.0,
        final_logit_softcapping=6.0)))
    gemma3 = Gemma3ForCausalLM(Gemma3TextConfig(**shape(
        head_dim=16, num_hidden_layers=3, sliding_window=16, query_pre_attn_scalar=24, layer_types=[
            "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=1e4),
                             full_attention=dict(rope_type="linear", rope_theta=1e6, factor=4.0)))))
    yield "gemma3", None, gemma3
    yield "gemma3-vision", gemma3_vision, Gemma3ForCausalLM(Gemma3TextConfig(**shape(
        head_dim=16, num_hidden_layers=3, sliding_window=16, layer_types=[
            "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=1e4),
                             full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0)))))
    yield "phi3", None, Phi3ForCausalLM(Phi3Config(**shape(sliding_window=24)))
    yield "phi3-long", v4, Phi3ForCausalLM(Phi3Config(**shape(
        num_attention_heads=2, original_max_position_embeddings=256, rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, original_max_position_embeddings=256,
            short_factor=[1.0, 1.1, 1.2, 1.4, 1.7, 2.0], long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))))
    yield "smollm3", None, SmolLM3ForCausalLM(SmolLM3Config(**shape(no_rope_layer_interval=2, num_hidden_layers=3)))
    yield "olmo2", None, Olmo2ForCausalLM(Olmo2Config(**shape()))
    small = dict(**TOKENS, n_positions=512, n_embd=32, n_layer=2, n_head=4)
    yield "gpt2", None, GPT2LMHeadModel(GPT2Config(**small))
    yield "gpt2-scaled", no_prefix("transformer."), GPT2LMHeadModel(GPT2Config(
        **small, n_inner=48, scale_attn_by_inverse_layer_idx=True, activation_function="gelu"))
    neox = without("num_key_value_heads")
    yield "gpt-neox", neox_v4, GPTNeoXForCausalLM(GPTNeoXConfig(**neox, rope_parameters=dict(
        rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25)))
    yield "gpt-neox-sequential", None, GPTNeoXForCausalLM(GPTNeoXConfig(
        **neox, use_parallel_residual=False, hidden_act="gelu_fast", rope_parameters=dict(
            rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)))
    opt = without("num_key_value_heads", "intermediate_size")
    yield "opt", None, OPTForCausalLM(OPTConfig(**opt, ffn_dim=48))
    yield "opt-post-norm", no_prefix("model."), OPTForCausalLM(OPTConfig(
        **opt, ffn_dim=48, do_layer_norm_before=False, activation_function="gelu"))
    bloom = dict(**TOKENS, n_layer=2, n_head=6)
    yield "bloom", no_prefix("transformer."), BloomForCausalLM(BloomConfig(**bloom, hidden_size=48))


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=2) + "\n")


def rename(folder, of):
    path = folder / "model.safetensors"
    save_file({of(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def to_v4(config):
    """config.json as transformers v4 wrote it."""
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"


def v4(folder):
    def change(config):
        to_v4(config)
        scaling = config["rope_scaling"]
        if scaling and scaling["rope_type"] == "longrope":
            # As Phi-3's own files have it.
            config["rope_scaling"] = {"type": "longrope", **{k: scaling[k] for k in ("short_factor", "long_factor")}}
    edit(folder, change)


def layerless(folder):
    """Before layers had types."""
    edit(folder, lambda config: (to_v4(config), config.pop("layer_types")))


def gemma_v4(folder):
    """Defaults are left out, and the activation is called what it is not."""
    def change(config):
        to_v4(config)
        config.pop("tie_word_embeddings", None)
        config["hidden_act"] = "gelu"
    edit(folder, change)


def gemma3_vision(folder):
    """The text part of a model that reads images: a config within a config, and longer names."""
    def change(config):
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope["full_attention"].pop("rope_theta")
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["rope_scaling"] = rope["full_attention"]
        config.pop("layer_types")
        config.pop("_sliding_window_pattern", None)
        config["sliding_window_pattern"] = 2
        for key in ("tie_word_embeddings", "query_pre_attn_scalar", "architectures", "eos_token_id"):
            config.pop(key, None)
        text = dict(config)
        config.clear()
        config.update(architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", text_config=text,
                      vision_config=dict(hidden_size=8), eos_token_id=[2], torch_dtype="float32",
                      transformers_version="4.50.0")
    edit(folder, change)
    rename(folder, lambda name: "language_model." + name)


def no_prefix(prefix):
    """Names as the oldest files have them."""
    return lambda folder: rename(folder, lambda name: name.removeprefix(prefix))


def neox_v4(folder):
    def change(config):
        rope = config.pop("rope_parameters")
        config["rotary_pct"] = rope["partial_rotary_factor"]
        config["rotary_emb_base"] = rope["rope_theta"]
        config["torch_dtype"] = config.pop("dtype")
        config["transformers_version"] = "4.44.0"
    edit(folder, change)
    rename(folder, lambda name: name.replace("lm_head", "embed_out"))
