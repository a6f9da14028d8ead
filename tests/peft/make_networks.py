#!/usr/bin/env python3
"""Make tests/fixtures/foreign/computed: checkpoints that hold more than a prompt's rows, for the model llama-tied.

    pip install -r tests/peft/requirements.txt numpy
    python3 tests/peft/make_networks.py           # rewrites tests/fixtures/foreign/computed

The networks are PEFT's own classes with random weights, saved as a training run saves them; NAME.npy is what PEFT
computes with them. Cartridges and prefix tables are laid out as HazyResearch's `cartridges`, torchtitan, P-tuning v2
and ChatGLM do, after their sources.
"""
import base64
import json
import pathlib
import pickle
import shutil

import numpy as np
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig
from peft.tuners.p_tuning import PromptEncoder
from peft.tuners.prefix_tuning import PrefixEncoder
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "foreign" / "computed"
# As llama-tied has them: layers, heads of keys and values, their width, and the hidden size.
LAYERS, HEADS, HEAD_DIM, HIDDEN = 2, 2, 8, 32
TOKENS = 5


def encoder(kind, hidden):
    config = PromptEncoderConfig(
        num_virtual_tokens=TOKENS, token_dim=HIDDEN, num_transformer_submodules=1, encoder_reparameterization_type=kind,
        encoder_hidden_size=hidden, encoder_num_layers=2, encoder_dropout=0.0, num_layers=LAYERS, num_attention_heads=4)
    return PromptEncoder(config)


def computed(network):
    with torch.no_grad():
        return network(torch.arange(TOKENS)[None])[0].numpy()


def under(prefix, network):
    return {prefix + name: value.clone() for name, value in network.state_dict().items()}


def p_tuning():
    mlp = encoder("MLP", 24)
    torch.save(mlp.state_dict(), OUT / "mlp.pt")
    np.save(OUT / "mlp.npy", computed(mlp))
    # As a trainer saves it: beside an optimiser and counters, under the names of the whole model.
    state = {"epoch": 3, "state_dict": under("model.prompt_encoder.default.", mlp),
             "optimizer": {"state": {0: {"step": torch.tensor(9.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}}
    torch.save(state, OUT / "mlp-trainer.pt")
    save_file(under("prompt_encoder.default.", mlp), OUT / "mlp.safetensors")
    lstm = encoder("LSTM", 12)
    torch.save(under("prompt_encoder.", lstm), OUT / "lstm.pt")
    np.save(OUT / "lstm.npy", computed(lstm))
    # A network that nobody knows: one more layer.
    unknown = under("", mlp) | {"mlp_head.6.weight": torch.zeros(HIDDEN, HIDDEN), "mlp_head.6.bias": torch.zeros(HIDDEN)}
    torch.save(unknown, OUT / "unknown.pt")
    # Residual prompt tuning: the prompt is the table plus what a network makes of it.
    residual = {"prompt": torch.randn(TOKENS, HIDDEN), "mlp.module.0.weight": torch.randn(8, HIDDEN),
                "mlp.module.2.weight": torch.randn(HIDDEN, 8), "mlp.module.3.weight": torch.ones(HIDDEN)}
    torch.save(residual, OUT / "residual.pt")


def prefix():
    config = PrefixTuningConfig(
        num_virtual_tokens=TOKENS, token_dim=HEADS * HEAD_DIM, num_layers=LAYERS, num_attention_heads=HEADS,
        encoder_hidden_size=20, prefix_projection=True)
    network = PrefixEncoder(config)
    table = computed(network)
    np.save(OUT / "prefix.npy", table)
    torch.save(under("", network), OUT / "projection.pt")
    renamed = {name.replace("transform", "trans"): value for name, value in under("prefix_encoder.", network).items()}
    save_file(renamed, OUT / "projection-v2.safetensors")
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.from_numpy(table)}, OUT / "table.pt")
    return torch.from_numpy(table)


def cartridges(table):
    # [tokens, layers, keys or values, heads, dim] of PEFT, to [heads, tokens, dim] for each layer.
    parts = table.view(TOKENS, LAYERS, 2, HEADS, HEAD_DIM).permute(1, 2, 3, 0, 4).contiguous()

    def lists(frozen):
        state = {}
        for i, kind in enumerate(("keys", "values")):
            state[f"trainable_{kind}"] = [parts[layer, i, None, :, frozen:].clone() for layer in range(LAYERS)]
            state[f"frozen_{kind}"] = [parts[layer, i, None, :, :frozen].clone() for layer in range(LAYERS)] if frozen else []
        return state

    torch.save(lists(2), OUT / "cartridge.pt")
    torch.save(lists(0), OUT / "cartridge-all.pt")
    save_file({f"layers.{layer}.attention.prefix.{kind}": parts[layer, i].clone()
               for layer in range(LAYERS) for i, kind in enumerate(("keys", "values"))}, OUT / "titan.safetensors")
    broken = lists(0)
    broken["trainable_values"].pop()
    torch.save(broken, OUT / "cartridge-broken.pt")


def bare():
    rows = torch.randn(TOKENS, HIDDEN)
    np.save(OUT / "rows.npy", rows.numpy())
    torch.save([row.clone() for row in rows], OUT / "list.pt")
    torch.save({"prompts": tuple(row[None].clone() for row in rows)}, OUT / "tuple.pt")
    pickled = pickle.dumps(rows, protocol=4)
    (OUT / "rows.pkl").write_bytes(pickled)
    document = {"metadata": {"name": "Cats", "uuid": "0", "description": "Of cats.", "epoch": 1.0},
                "tensor": base64.b64encode(pickle.dumps(rows[None])).decode()}
    (OUT / "mkultra.json").write_text(json.dumps(document))
    (OUT / "tgis").mkdir()
    torch.save(rows, OUT / "tgis" / "encoder.pt")
    torch.save(rows + 1, OUT / "tgis" / "decoder.pt")
    (OUT / "alone").mkdir()
    torch.save({"prompt_embeddings": rows}, OUT / "alone" / "adapter_model.bin")


def main():
    torch.manual_seed(11)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    p_tuning()
    cartridges(prefix())
    bare()


if __name__ == "__main__":
    main()
