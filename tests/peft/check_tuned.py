"""Holds a prompt that `softserve tune` wrote against PEFT.

    pip install -r requirements.txt
    softserve tune --task demo --data train.jsonl --model MODEL_DIR --prompts out
    softserve eval --prompt out/demo --data test.jsonl --model MODEL_DIR --show 1000000 > shown.txt
    python check_tuned.py --model MODEL_DIR --prompt out/demo --data test.jsonl --shown shown.txt

PEFT loads the folder with `PeftModel.from_pretrained`; each input is rendered by the template of
`task.json`, tokenized by the model's own tokenizer.json and continued greedily, unpadded and alone.
The texts must be those that softserve showed.
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


def shown_outputs(path):
    """The "tuned prompt" lines of `softserve eval --show`, by line of the data."""
    outputs, line = {}, None
    for text in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"line (\d+), expected ", text):
            line = int(found[1])
        elif found := re.match(r"  tuned prompt\s+(\".*\")$", text):
            # Rust's escapes: \u{301} for what does not print, \' never in a string.
            outputs[line] = json.loads(re.sub(r"\\u\{([0-9a-f]+)\}", lambda m: "\\u%04x" % int(m[1], 16), found[1]))
    return outputs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompt", "data", "shown"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
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

    shown, wrong, compared = shown_outputs(args.shown), [], 0
    for number, text in enumerate(args.data.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip() or number not in shown:
            continue
        given = json.loads(text)["input"]
        ids = tokenizer.encode(template.render(**(given if isinstance(given, dict) else {"input": given}))).ids
        with torch.no_grad():
            out = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                 max_new_tokens=limit, do_sample=False)
        # After the input, or after the decoder's start token.
        new = [i for i in out[0, 1 if has_encoder else len(ids):].tolist() if i not in stops]
        answer = tokenizer.decode(new).strip()
        compared += 1
        if answer != shown[number]:
            wrong.append(f"line {number}: PEFT {answer!r}, softserve {shown[number]!r}")
    print("\n".join(wrong[:20]))
    print(f"{compared - len(wrong)} of {compared} answers are PEFT's; {len(shown)} were shown")
    sys.exit(0 if compared and not wrong else 1)


if __name__ == "__main__":
    main()
