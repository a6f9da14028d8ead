#!/usr/bin/env python3
"""Make tests/fixtures/prompt-types: a prompt of each PEFT type and what PEFT answers with it.

    pip install -r tests/peft/requirements.txt
    python3 tests/peft/make_prompt_types.py       # after make_fixtures.py: it reads those models

What make_fixtures.py has not: key-values prompts (prefix tuning with and without projection,
cartridge), multitask prompts, CPT, and an adapter that is not called "default", which PEFT saves one
folder down. Some files are rewritten in another float format, as hand casts and DeepSpeed leave
them. The reference is one unpadded request in f32: PEFT's own generate(). A case whose two best
logits are ever closer than MARGIN is left out, since rounding may swap them.
"""
import json
import pathlib
import shutil

import torch
from peft import (
    CPTConfig, CartridgeConfig, MultitaskPromptTuningConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig,
    TaskType, get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
OUT = FIXTURES / "prompt-types"
MODELS = ["llama-scaled", "llama-tied", "qwen2"]
NEW_TOKENS = 12
MARGIN = 5e-3
TEXT = "the cat sat on the mat and the dog ran after the ball; many prompts, one frozen model. "
INPUTS = ["the cat", "a", "Zürich, 25 °C: the dog ran after naïve prompts!", TEXT * 3]


def adapters():
    """Folder, adapter name, configuration, float format of the file, tasks to ask."""
    causal = dict(task_type=TaskType.CAUSAL_LM)
    yield "prefix7", "default", PrefixTuningConfig(num_virtual_tokens=7, **causal), None, [None]
    yield "prefix33", "default", PrefixTuningConfig(
        num_virtual_tokens=33, prefix_projection=True, encoder_hidden_size=16, **causal), torch.bfloat16, [None]
    yield "cartridge40", "default", CartridgeConfig(
        num_virtual_tokens=40, num_frozen_tokens=2, **causal), torch.float64, [None]
    yield "multitask9", "default", MultitaskPromptTuningConfig(
        num_virtual_tokens=9, num_tasks=3, num_ranks=2, **causal), torch.float16, [0, 2]
    yield "cpt6", "default", CPTConfig(
        cpt_token_ids=[5, 9, 17, 40, 77, 100], cpt_mask=[1] * 6, cpt_tokens_type_mask=[1, 2, 3, 4, 1, 2],
        **causal), None, [None]
    yield "named", "french", PromptTuningConfig(num_virtual_tokens=8, **causal), None, [None]


@torch.no_grad()
def answer(model, tok, text, task):
    """PEFT's greedy tokens, the first step's logits, and the smallest top-2 gap on the way."""
    ids = tok(text, return_tensors="pt").input_ids
    tasks = {} if task is None else dict(task_ids=torch.tensor([task]))
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=0,
                         return_dict_in_generate=True, output_logits=True, **tasks)
    logits = torch.stack(out.logits)[:, 0]
    top = logits.topk(2, dim=-1).values
    return ids[0].tolist(), out.sequences[0, ids.shape[1]:].tolist(), logits[0], (top[:, 0] - top[:, 1]).min().item()


@torch.no_grad()
def make(name, seed):
    tok = PreTrainedTokenizerFast(tokenizer_file=str(FIXTURES / name / "tokenizer.json"))
    torch.manual_seed(seed)
    cases = []
    for folder, adapter, config, dtype, tasks in adapters():
        load = lambda: AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32).eval()
        tuned = get_peft_model(load(), config, adapter_name=adapter)
        for p in tuned.prompt_encoder.parameters():
            p.data = torch.randn_like(p)
        out = OUT / name / folder
        tuned.save_pretrained(out)
        saved = out if adapter == "default" else out / adapter
        file = saved / "adapter_model.safetensors"
        if dtype is not None:
            save_file({k: v.to(dtype).contiguous() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
        # The path of this machine says nothing.
        config_file = saved / "adapter_config.json"
        config_json = json.loads(config_file.read_text())
        config_json["base_model_name_or_path"] = name
        config_file.write_text(json.dumps(config_json, indent=2, sort_keys=True))
        for card in out.rglob("README.md"):
            card.unlink()
        model = PeftModel.from_pretrained(load(), saved).eval()
        for task in tasks:
            for text in INPUTS:
                ids, greedy, logits, margin = answer(model, tok, text, task)
                if margin < MARGIN:
                    print(f"{name}/{folder}: left out, margin {margin:.4f}")
                    continue
                top = logits.topk(5)
                cases.append(dict(prompt=folder, task_id=task, text=text, input_ids=ids, greedy_ids=greedy,
                                  top=[[i, round(v, 5)] for i, v in zip(top.indices.tolist(), top.values.tolist())]))
    (OUT / name / "expected.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")
    print(f"{name}: {len(cases)} cases")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, name in enumerate(MODELS):
        make(name, seed)


if __name__ == "__main__":
    main()
