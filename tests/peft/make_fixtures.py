#!/usr/bin/env python3
"""Make tests/fixtures: tiny random models, prompts that PEFT saved, and what PEFT answers.

    pip install -r tests/peft/requirements.txt
    python3 tests/peft/make_fixtures.py            # rewrites tests/fixtures
    python3 tests/peft/make_fixtures.py gemma2 opt # these only

Each model stands for options that change what is computed: rope scaling, biases, a head
size that is not hidden/heads, tied embeddings, shards, and config.json as transformers v4
and v5 write it. Those of families.py go to tests/fixtures/families, with adapters of every
type and the answers of the bare model (a case whose prompt is null). The reference is one unpadded request in f32: PEFT's own generate(). A case
whose two best logits are ever closer than MARGIN is left out, since rounding may swap them.
"""
import itertools
import json
import pathlib
import shutil
import sys

import torch
from peft import (
    CartridgeConfig, CPTConfig, MultitaskPromptTuningConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig,
    PromptTuningConfig, TaskType, get_peft_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM,
)

import families

OUT = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
NEW_TOKENS = 12
MARGIN = 5e-3
TEXT = "the cat sat on the mat and the dog ran after the ball; many prompts, one frozen model. "
INPUTS = ["the cat", "Zürich, 25 °C: the dog ran after naïve prompts!", TEXT * 3]
SHAPE = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)


def tokenizer(bos):
    tok = Tokenizer(models.BPE(byte_fallback=False))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator([TEXT * 4], trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def build():
    yield "llama-scaled", True, LlamaForCausalLM(LlamaConfig(
        **SHAPE, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=64)))
    yield "llama-tied", True, LlamaForCausalLM(LlamaConfig(
        **SHAPE, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)))
    yield "qwen2", False, Qwen2ForCausalLM(Qwen2Config(
        **SHAPE, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)))


def as_v4(path):
    """Rewrite config.json the way transformers v4 wrote it."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"
    path.write_text(json.dumps(config, indent=2) + "\n")


def adapters():
    common = dict(task_type=TaskType.CAUSAL_LM)
    yield "prompt7", PromptTuningConfig(num_virtual_tokens=7, **common)
    yield "prompt33", PromptTuningConfig(num_virtual_tokens=33, **common)
    yield "ptuning5", PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **common)


def all_adapters():
    """One of each type, with the tasks that it is asked for."""
    common = dict(task_type=TaskType.CAUSAL_LM)
    yield "prompt7", [None], PromptTuningConfig(num_virtual_tokens=7, **common)
    yield "ptuning5", [None], PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **common)
    yield "cpt4", [None], CPTConfig(cpt_token_ids=[70, 80, 90, 100], cpt_mask=[1] * 4,
                                    cpt_tokens_type_mask=[1, 2, 2, 3], **common)
    yield "multitask5", [0, 2], MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=3, num_ranks=2, **common)
    yield "prefix6", [None], PrefixTuningConfig(num_virtual_tokens=6, **common)
    yield "cartridge4", [None], CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1, **common)


@torch.no_grad()
def answer(model, tok, text, n, **more):
    """The greedy tokens, the first step's logits, and the smallest top-2 gap on the way."""
    ids = tok(text, return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n,
                         min_new_tokens=n, eos_token_id=-1, pad_token_id=0,
                         return_dict_in_generate=True, output_logits=True, **more)
    logits = torch.stack(out.logits)[:, 0]
    top = logits.topk(2, dim=-1).values
    return ids[0].tolist(), out.sequences[0, ids.shape[1]:].tolist(), logits[0], (top[:, 0] - top[:, 1]).min().item()


def cases_of(label, model, tok, inputs, **named):
    """One case for each input whose answer does not hang on rounding."""
    more = {} if named.get("task_id") is None else dict(task_ids=torch.tensor([named["task_id"]]))
    for text in inputs:
        ids, greedy, logits, margin = answer(model, tok, text, NEW_TOKENS, **more)
        if margin < MARGIN:
            print(f"{label}: left out, margin {margin:.4f}")
            continue
        top = logits.topk(5)
        yield dict(**named, text=text, input_ids=ids, greedy_ids=greedy,
                   top=[[i, round(v, 5)] for i, v in zip(top.indices.tolist(), top.values.tolist())])


def write_cases(folder, cases):
    (folder / "expected.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")
    for extra in list(folder.rglob("README.md")) + [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]:
        extra.unlink(missing_ok=True)
    print(f"{folder.name}: {len(cases)} cases")


def wanted(name):
    return len(sys.argv) < 2 or name in sys.argv[1:]


def main():
    for seed, (name, bos, model) in enumerate(build()):
        if not wanted(name):
            continue
        torch.manual_seed(seed)
        for p in model.parameters():
            # Wide enough that the answers depend on the input; norms stay near one.
            p.data = torch.randn_like(p) * 0.25 + (1.0 if p.dim() == 1 and p.shape[0] == 32 else 0.0)
        model.eval()
        tok = tokenizer(bos)
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size="100KB" if name == "llama-scaled" else "5GB")
        tok.save_pretrained(folder)
        if name != "llama-scaled":
            as_v4(folder / "config.json")
        cases = []
        for adapter, config in adapters():
            tuned = get_peft_model(model, config)
            for p in tuned.prompt_encoder.parameters():
                p.data = torch.randn_like(p) * 0.5
            tuned.save_pretrained(folder / "prompts" / adapter)
            base = tuned.unload() if hasattr(tuned, "unload") else tuned.base_model
            loaded = PeftModel.from_pretrained(base, folder / "prompts" / adapter).eval()
            kind = str(config.peft_type.value)
            cases += cases_of(f"{name}/{adapter}", loaded, tok, INPUTS, prompt=adapter, peft_type=kind, task_id=None)
            model = loaded.get_base_model()
        write_cases(folder, cases)
    for seed, (name, layout, model) in enumerate(families.build()):
        if wanted(name):
            make_family(100 + seed, name, layout, model)


def make_family(seed, name, layout, model):
    torch.manual_seed(seed)
    for path, p in model.named_parameters():
        is_norm = p.dim() == 1 and path.endswith("weight")
        centre = 1.0 if is_norm and not name.startswith("gemma") else 0.0
        p.data = torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.3) + centre
    model.eval()
    tok = tokenizer(name != "qwen3")
    folder = OUT / "families" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    if layout:
        layout(folder)

    def two_of(*args, **named):
        return list(itertools.islice(cases_of(*args, [INPUTS[0], TEXT, INPUTS[1], TEXT * 2], **named), 2))

    cases = two_of(name, model, tok, prompt=None, peft_type=None, task_id=None)
    for adapter, tasks, config in all_adapters():
        tuned = get_peft_model(model, config)
        for path, p in tuned.prompt_encoder.named_parameters():
            # CPT keeps its tokens and learns what is added to them.
            p.data = p.data + torch.randn_like(p) * 0.2 if "cpt" in adapter else torch.randn_like(p) * 0.5
        tuned.save_pretrained(folder / "prompts" / adapter)
        loaded = PeftModel.from_pretrained(tuned.get_base_model(), folder / "prompts" / adapter).eval()
        kind = str(config.peft_type.value)
        for task in tasks:
            cases += two_of(f"{name}/{adapter}", loaded, tok, prompt=adapter, peft_type=kind, task_id=task)
        model = loaded.get_base_model()
    write_cases(folder, cases)


if __name__ == "__main__":
    main()
