"""The model, the prompts and the requests that every system is given."""

import dataclasses
import json
import pathlib
import random
import subprocess

import torch
from safetensors.torch import save_file


@dataclasses.dataclass
class Request:
    task: int
    ids: list[int]

    def text(self):
        """The same ids for a tokenizer that has the word w17 for the id 17."""
        return " ".join(f"w{i}" for i in self.ids)


@dataclasses.dataclass
class Setting:
    """A model folder, the folders of its prompts, and how many requests of which lengths there are."""

    model: pathlib.Path
    prompts: list[pathlib.Path]
    config: dict
    requests: int
    input_tokens: tuple[int, int]
    output_tokens: int
    virtual_tokens: int
    threads: int
    seed: int

    def batch(self, round_):
        """The requests of a round. Other rounds have other ids: no system has seen them before."""
        rng = random.Random(self.seed * 1000 + round_)
        return [self._one(rng, i % len(self.prompts), rng.randint(*self.input_tokens)) for i in range(self.requests)]

    def single(self, round_, length):
        """One request, with a text that is in no other round."""
        rng = random.Random(f"{self.seed} {round_} {length}")
        return self._one(rng, 0, length)

    def _one(self, rng, task, length):
        return Request(task, [rng.randrange(self.config["vocab_size"]) for _ in range(length)])


def make_model(softserve, shape, folder):
    """Random weights of a shape, written by softserve as a Hugging Face folder."""
    command = [softserve, "bench", "--random-weights", shape, "--save-model", folder]
    if subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL).returncode:
        raise SystemExit("there is no model to measure; the reason is above")


def make_prompts(folder, model, config, tasks, virtual_tokens, seed):
    """PEFT directories, as prompt tuning saves them."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for task in range(tasks):
        path = folder / f"task-{task}"
        path.mkdir(parents=True)
        rows = 0.02 * torch.randn(virtual_tokens, config["hidden_size"], generator=generator)
        save_file({"prompt_embeddings": rows}, path / "adapter_model.safetensors")
        adapter = {
            "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model),
            "num_virtual_tokens": virtual_tokens, "token_dim": config["hidden_size"], "inference_mode": True,
            "num_transformer_submodules": 1, "num_attention_heads": config["num_attention_heads"],
            "num_layers": config["num_hidden_layers"], "prompt_tuning_init": "RANDOM",
        }
        (path / "adapter_config.json").write_text(json.dumps(adapter, indent=2))
        out.append(path)
    return out


def matrices(config):
    """The (outputs, inputs) of the matrices of one layer."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    q, kv = heads * head, (config.get("num_key_value_heads") or heads) * head
    return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)]


def layer_values(config):
    """Values in the matrices of all layers."""
    return config["num_hidden_layers"] * sum(outer * inner for outer, inner in matrices(config))


def head_values(config):
    """Values in the matrix that makes logits."""
    return config["vocab_size"] * config["hidden_size"]
