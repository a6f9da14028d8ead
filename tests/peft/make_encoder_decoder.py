#!/usr/bin/env python3
"""Make tests/fixtures/encoder-decoder: tiny T5 and mT5 models, prompts that PEFT saved, what PEFT answers.

    pip install -r tests/peft/requirements.txt
    python3 tests/peft/make_encoder_decoder.py

The reference is one unpadded request in f32: PEFT's own generate(). A case whose two best logits are ever
closer than MARGIN is left out, since rounding may swap them. A case whose prompt is null is the bare model.
"""
import itertools
import json
import shutil

import torch
from peft import (
    CartridgeConfig, MultitaskPromptTuningConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig,
    PromptTuningConfig, TaskType, get_peft_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSeq2SeqLM, MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast, T5Config,
    T5ForConditionalGeneration,
)

from families import edit
from make_fixtures import INPUTS, MARGIN, OUT, TEXT, write_cases

NEW_TOKENS = 12
SHAPE = dict(vocab_size=320, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, pad_token_id=0, eos_token_id=1,
             decoder_start_token_id=0)


def tokenizer(path):
    """Unigram, with the end of the text appended, as T5's own. One that is there stays: its training does not
    give the same pieces twice."""
    if path.exists():
        tok = Tokenizer.from_file(str(path))
    else:
        tok = Tokenizer(models.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace()
        tok.decoder = decoders.Metaspace()
        tok.train_from_iterator([TEXT * 4] + INPUTS, trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
        tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def version_1_1(config):
    """As transformers v4 wrote T5 1.1 and Flan-T5."""
    config["tie_word_embeddings"] = False
    config["n_positions"] = 512
    config.pop("scale_decoder_outputs", None)
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"


def build():
    yield "t5", None, T5ForConditionalGeneration(T5Config(**SHAPE))
    yield "flan-t5", version_1_1, T5ForConditionalGeneration(T5Config(
        **{**SHAPE, "num_layers": 3}, num_decoder_layers=2, feed_forward_proj="gated-gelu"))
    # Heads that are together wider than the hidden size; those of mT5-small are narrower.
    yield "mt5", None, MT5ForConditionalGeneration(MT5Config(
        **{**SHAPE, "d_kv": 12}, relative_attention_num_buckets=8,
        relative_attention_max_distance=20))


def adapters(name):
    common = dict(task_type=TaskType.SEQ_2_SEQ_LM)
    yield "prompt7", [None], PromptTuningConfig(num_virtual_tokens=7, **common)
    yield "prompt33-one", [None], PromptTuningConfig(num_virtual_tokens=33, num_transformer_submodules=1, **common)
    yield "ptuning5", [None], PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **common)
    yield "multitask5", [0, 2], MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=3, num_ranks=2, **common)
    # For keys and values PEFT takes the hidden size for the width of all heads unless it is told better.
    width = dict(token_dim=48) if name == "mt5" else {}
    yield "prefix6", [None], PrefixTuningConfig(num_virtual_tokens=6, **width, **common)
    yield "prefix35", [None], PrefixTuningConfig(num_virtual_tokens=35, **width, **common)
    yield "cartridge4", [None], CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1, **width, **common)


@torch.no_grad()
def cases_of(label, model, tok, **named):
    more = {} if named["task_id"] is None else dict(task_ids=torch.tensor([named["task_id"]]))
    for text in [INPUTS[0], TEXT, INPUTS[1], TEXT * 2, TEXT * 4]:
        ids = tok(text, return_tensors="pt").input_ids
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=0,
                             return_dict_in_generate=True, output_logits=True, **more)
        logits = torch.stack(out.logits)[:, 0]
        top = logits.topk(2, dim=-1).values
        margin = (top[:, 0] - top[:, 1]).min().item()
        if margin < MARGIN:
            print(f"{label}: left out, margin {margin:.4f}")
            continue
        best = logits[0].topk(5)
        yield dict(**named, text=text, input_ids=ids[0].tolist(), greedy_ids=out.sequences[0, 1:].tolist(),
                   top=[[i, round(v, 5)] for i, v in zip(best.indices.tolist(), best.values.tolist())])


def main():
    for seed, (name, change, model) in enumerate(build()):
        torch.manual_seed(200 + seed)
        for path, p in model.named_parameters():
            p.data = torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.3) + (1.0 if p.dim() == 1 else 0.0)
        if change:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
        folder = OUT / "encoder-decoder" / name
        tok = tokenizer(folder / "tokenizer.json")
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
        if change:
            edit(folder, change)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
        # What adapters say of their model; not the path on this machine.
        model.name_or_path = name

        def three_of(label, model, **named):
            return list(itertools.islice(cases_of(label, model, tok, **named), 3))

        cases = three_of(name, model, prompt=None, peft_type=None, task_id=None)
        for adapter, tasks, config in adapters(name):
            tuned = get_peft_model(model, config)
            for p in tuned.prompt_encoder.parameters():
                p.data = torch.randn_like(p) * 0.5
            tuned.save_pretrained(folder / "prompts" / adapter)
            loaded = PeftModel.from_pretrained(tuned.get_base_model(), folder / "prompts" / adapter).eval()
            for task in tasks:
                cases += three_of(f"{name}/{adapter}", loaded, prompt=adapter,
                                  peft_type=str(config.peft_type.value), task_id=task)
            model = loaded.get_base_model()
        write_cases(folder, cases)


if __name__ == "__main__":
    main()
