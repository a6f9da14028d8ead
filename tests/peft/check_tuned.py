"""Holds a prompt that `softserve tune` wrote against PEFT.

    pip install -r requirements.txt
    softserve tune --task demo --data train.jsonl --model MODEL_DIR --prompts out
    softserve eval --prompt out/demo --data test.jsonl --model MODEL_DIR --show 1000000 > shown.txt
    python check_tuned.py --model MODEL_DIR --prompt out/demo --data test.jsonl --shown shown.txt --train train.jsonl

PEFT loads the folder with `PeftModel.from_pretrained`; each input is rendered by the template of
`task.json`, tokenized by the model's own tokenizer.json and continued greedily, unpadded and alone.
The texts must be those that softserve showed. With `--train`, PEFT's own training loss on the data must be the one
that softserve wrote into `task.json`, for a run without held-out examples.
"""

import argparse
import json
import pathlib
import re
import sys

import jinja2
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM


# What Rust trims; Python's own strip takes some control characters too.
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def unescaped(quoted):
    """The text of a string as Rust's `{:?}` quotes it."""
    names = {"0": "\0", "t": "\t", "r": "\r", "n": "\n"}
    def one(found):
        return chr(int(found[2], 16)) if found[2] else names.get(found[1], found[1])
    return re.sub(r"\\(u\{([0-9a-f]+)\}|.)", one, quoted[1:-1])


def shown_outputs(path):
    """The "tuned prompt" lines of `softserve eval --show`, by line of the data."""
    outputs, line = {}, None
    for text in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"line (\d+), expected ", text):
            line = int(found[1])
        elif found := re.match(r"  tuned prompt\s+(\".*\")$", text):
            outputs[line] = unescaped(found[1])
    return outputs


@torch.no_grad()
def training_loss(model, tokenizer, encode, task, lines, eos, has_encoder):
    """The mean loss of an answer token, by PEFT's forward with labels, unpadded and alone."""
    total, tokens = 0.0, 0
    for line in map(json.loads, lines):
        words = task["labels"][line["label"]][0] if "label" in line else line["output"]
        ids = encode(line["input"])
        answer = tokenizer.encode(words, add_special_tokens=False).ids + [eos]
        before = [] if has_encoder else ids
        labels = torch.tensor([[-100] * len(before) + answer])
        inputs = torch.tensor([ids if has_encoder else ids + answer])
        loss = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=labels).loss
        total, tokens = total + loss.item() * len(answer), tokens + len(answer)
    return total / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompt", "data", "shown"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--train", type=pathlib.Path)
    args = parser.parse_args()

    has_encoder = AutoConfig.from_pretrained(args.model).is_encoder_decoder
    of_kind = AutoModelForSeq2SeqLM if has_encoder else AutoModelForCausalLM
    base = of_kind.from_pretrained(args.model, dtype=torch.float32).eval()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = PeftModel.from_pretrained(base, args.prompt).eval()
    after = base.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items()), "the prompt changed the model"
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    task = json.loads((args.prompt / "task.json").read_text(encoding="utf-8"))
    template = jinja2.Environment(keep_trailing_newline=True).from_string(task["template"])
    limit = task["defaults"]["max_tokens"]
    eos = base.generation_config.eos_token_id
    stops = set(eos if isinstance(eos, list) else [eos])

    def encode(given):
        return tokenizer.encode(template.render(**(given if isinstance(given, dict) else {"input": given}))).ids

    shown, wrong, compared = shown_outputs(args.shown), [], 0
    for number, text in enumerate(args.data.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip() or number not in shown:
            continue
        ids = encode(json.loads(text)["input"])
        with torch.no_grad():
            out = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                 max_new_tokens=limit, do_sample=False)
        # After the input, or after the decoder's start token.
        new = [i for i in out[0, 1 if has_encoder else len(ids):].tolist() if i not in stops]
        answer = tokenizer.decode(new).strip(SPACE)
        compared += 1
        if answer != shown[number]:
            wrong.append(f"line {number}: PEFT {answer!r}, softserve {shown[number]!r}")
    print("\n".join(wrong[:20]))
    print(f"{compared - len(wrong)} of {compared} answers are PEFT's; {len(shown)} were shown")
    if args.train:
        lines = [line for line in args.train.read_text(encoding="utf-8").splitlines() if line.strip()]
        first = eos[0] if isinstance(eos, list) else eos
        found = training_loss(model, tokenizer, encode, task, lines, first, has_encoder)
        written = task["metrics"]["train_loss"]
        print(f"the training loss is {found:.5f} in PEFT and {written} in task.json")
        if abs(found - written) > 1e-4 + 1e-3 * written:
            sys.exit("the losses differ")
    sys.exit(0 if compared and not wrong else 1)


if __name__ == "__main__":
    main()
