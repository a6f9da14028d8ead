"""A small Llama in plain PyTorch, fast on one CPU core, with the parameter names of ``LlamaForCausalLM``.

It computes what transformers' Llama computes; ``save`` writes a folder that transformers loads. It is written
out here because, compiled, it trains about twice as fast on a CPU as the library's eager model.

Two choices of initialisation make a model this small learn to look things up in its context:

* the forms of one word ("soup", " soup", "Soup") start from nearly the same vector, so copying a word
  to the start of a line is easy;
* a few heads of the first layers start by attending to the tokens one, two and three places back. They
  read one constant component of the embedding, which as part of a tied output layer changes nothing.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

CONFIG = dict(
    vocab_size=8192,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
    max_position_embeddings=512,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    hidden_act="silu",
)
SHAPES = {
    "self_attn.q_proj": ("h", "h"),
    "self_attn.k_proj": ("h", "h"),
    "self_attn.v_proj": ("h", "h"),
    "self_attn.o_proj": ("h", "h"),
    "mlp.gate_proj": ("i", "h"),
    "mlp.up_proj": ("i", "h"),
    "mlp.down_proj": ("h", "i"),
}
HEAD = 32  # width of one attention head
BACK = (1, 2, 3)  # the first heads of the first layer start by looking this many tokens back
LOOK, MATCH, COPY = 2.0, 2.0, 0.12  # strength of the heads that start as induction heads


class Block(nn.Module):
    def __init__(self, h, inner, layers):
        super().__init__()
        size = {"h": h, "i": inner}
        for name, (out, into) in SHAPES.items():
            std = 0.5 / math.sqrt(size[into])
            if name in ("self_attn.o_proj", "mlp.down_proj"):
                std /= math.sqrt(2 * layers)
            self.register_parameter(name.split(".")[1], nn.Parameter(torch.randn(size[out], size[into]) * std))
        self.input_layernorm = nn.Parameter(torch.ones(h))
        self.post_attention_layernorm = nn.Parameter(torch.ones(h))


def norm(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])).to(x.dtype) * weight.to(
        x.dtype
    )


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def run_block(x, w, cos, sin, mask):
    """One layer in bfloat16; ``w`` maps names to float32 parameters."""
    batch, length, h = x.shape

    def b(name):
        return w[name].to(x.dtype)

    def heads(y):
        return y.view(batch, length, h // HEAD, HEAD).transpose(1, 2)

    y = norm(x, w["input_layernorm"])
    q, k, v = (heads(F.linear(y, b(n))) for n in ("q_proj", "k_proj", "v_proj"))
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2) * HEAD**-0.5 + mask
    attended = torch.softmax(scores.float(), -1).to(x.dtype) @ v
    x = x + F.linear(attended.transpose(1, 2).reshape(batch, length, h), b("o_proj"))
    y = norm(x, w["post_attention_layernorm"])
    return x + F.linear(F.silu(F.linear(y, b("gate_proj"))) * F.linear(y, b("up_proj")), b("down_proj"))


class Network(nn.Module):
    def __init__(self, compiled=True):
        super().__init__()
        h, layers = CONFIG["hidden_size"], CONFIG["num_hidden_layers"]
        self.embed = nn.Parameter(torch.randn(CONFIG["vocab_size"], h) * 0.06)
        self.norm = nn.Parameter(torch.ones(h))
        self.layers = nn.ModuleList(Block(h, CONFIG["intermediate_size"], layers) for _ in range(layers))
        self.block = torch.compile(run_block) if compiled else run_block

    def hidden(self, ids=None, rows=None, dtype=torch.bfloat16):
        """Final hidden states of token ids, or of embedding rows (soft prompts)."""
        x = (F.embedding(ids, self.embed) if rows is None else rows).to(dtype)
        length = x.shape[1]
        cos, sin = rope(length)
        mask = torch.full((length, length), -1e4).triu(1)
        for layer in self.layers:
            x = self.block(x, dict(layer.named_parameters()), cos.to(dtype), sin.to(dtype), mask.to(dtype))
        return norm(x, self.norm)

    def logits(self, hidden):
        return F.linear(hidden, self.embed.to(hidden.dtype)).float()

    def matrices(self):
        return [p for layer in self.layers for p in layer.parameters() if p.ndim == 2]

    def vectors(self):
        return [self.embed, self.norm] + [p for layer in self.layers for p in layer.parameters() if p.ndim == 1]


def rope(length):
    inverse = 1 / CONFIG["rope_theta"] ** (torch.arange(0, HEAD, 2) / HEAD)
    angles = torch.outer(torch.arange(length).float(), inverse)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


@torch.no_grad()
def initialise(net, tokenizer):
    """Ties the forms of a word and points some heads backwards; see the top of this file."""
    first = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = token.lstrip("Ġ").lower()
        if len(word) > 1 and index > 2:
            if word in first:
                net.embed[index] = net.embed[first[word]] + 0.4 * net.embed[index]
            first.setdefault(word, index)
    net.embed[:, 0] = 0.3
    inverse = 1 / CONFIG["rope_theta"] ** (torch.arange(0, HEAD, 2) / HEAD)
    fast = (torch.arange(HEAD // 2) < 5).float()  # rotary pairs that tell neighbours apart
    slow = torch.cat((1 - fast, 1 - fast))  # and those that hardly turn within a row, where contents can be compared
    h = net.embed.shape[1]
    basis = torch.zeros(len(BACK) + 1, HEAD, h)
    basis[..., 1:] = torch.linalg.qr(torch.randn(h - 1, h - 1))[0][: HEAD * (len(BACK) + 1)].view(-1, HEAD, h - 1)
    word = basis[0]  # the projection of a token that heads compare and copy
    for head, back in enumerate(BACK):
        rows = slice(head * HEAD, (head + 1) * HEAD)
        look, match = net.layers[0], net.layers[2]
        look.q_proj[rows] = look.k_proj[rows] = 0
        look.q_proj[rows, 0] = LOOK * torch.cat((fast, 0 * fast))
        look.k_proj[rows, 0] = LOOK * torch.cat((fast * (inverse * back).cos(), fast * (inverse * back).sin()))
        look.v_proj[rows] = word
        look.o_proj[:, rows] = 0.12 * basis[head + 1].T
        if head < 2:
            match.q_proj[rows] = MATCH * slow[:, None] * word
            match.k_proj[rows] = MATCH * slow[:, None] * basis[head + 1]
            match.v_proj[rows] = word
            match.o_proj[:, rows] = COPY * word.T


def state(net, dtype=torch.float16):
    """The parameters under the names that transformers uses."""
    out = {"model.embed_tokens.weight": net.embed, "model.norm.weight": net.norm}
    for i, layer in enumerate(net.layers):
        for name in SHAPES:
            out[f"model.layers.{i}.{name}.weight"] = getattr(layer, name.split(".")[1])
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"model.layers.{i}.{name}.weight"] = getattr(layer, name)
    return {k: v.detach().to(dtype).contiguous() for k, v in out.items()}


def save(net, folder):
    """config.json, generation_config.json and model.safetensors (float16)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(
        CONFIG,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        head_dim=HEAD,
        initializer_range=0.02,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype="float16",
        use_cache=True,
        rope_scaling=None,
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}, indent=2) + "\n"
    )
    save_file(state(net), str(folder / "model.safetensors"), metadata={"format": "pt"})
