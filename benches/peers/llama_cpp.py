"""llama.cpp on the same weights and a load of the same lengths, if its batched benchmark is at hand."""

import json
import subprocess

import torch
from safetensors.torch import load_file

# Hugging Face's names of a layer's parts, and GGUF's.
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def run(program, setting, folder):
    """Prefill, decode and whole-load tokens a second, by requests at once, in bf16; None without the program."""
    if not program:
        return None
    gguf = folder / "model.gguf"
    write_gguf(setting, gguf)
    prompt = setting.virtual_tokens + sum(setting.input_tokens) // 2
    command = [
        program, "-m", gguf, "-t", setting.threads, "-tb", setting.threads, "-npp", prompt, "-ntg", setting.output_tokens,
        "-npl", f"1,{setting.requests}", "-c", 2 * setting.requests * (prompt + setting.output_tokens),
        "--output-format", "jsonl",
    ]
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    out = {}
    for row in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")):
        out[str(row["pl"])] = {
            "prefill": row["speed_pp"], "decode": row["speed_tg"],
            "tokens_per_second": row["pl"] * row["tg"] / (row["t_pp"] + row["t_tg"]),
        }
    return out


def write_gguf(setting, path):
    """The model in bf16, without a tokenizer. Good for timing only: llama.cpp turns the pairs of rope otherwise."""
    from gguf import GGMLQuantizationType, GGUFWriter

    config = setting.config
    heads = config["num_attention_heads"]
    writer = GGUFWriter(path, config["model_type"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(setting.model / "model.safetensors").items():
        if tensor.dim() == 1:
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
        else:
            data = tensor.view(torch.uint8).numpy()
            writer.add_tensor(gguf_name(name), data, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if stem in OTHERS:
        return f"{OTHERS[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{kind}"
