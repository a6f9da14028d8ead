"""Label probabilities by PyTorch, transformers and PEFT, to hold `/classify` to.

    python check_labels.py --model MODEL_DIR --prompt PEFT_DIR < request.json > probabilities.json

The request has `inputs`, `labels` (each with its words) and `ends`, texts that end an answer beside the end-of-sequence
tokens. For each input and label the answer has the probability of all of the label's words, each followed by any end:
one unpadded forward pass for each word and end. The tokens are those of the model's own tokenizer.json.
"""

import argparse
import json
import pathlib
import sys

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


@torch.no_grad()
def log_probability(model, ids, continuation):
    inputs = torch.tensor([ids + continuation])
    logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0].double()
    rows = logits[-len(continuation) - 1 : -1].log_softmax(-1)
    return sum(row[token].item() for row, token in zip(rows, continuation))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--prompt", type=pathlib.Path, required=True)
    args = parser.parse_args()
    request = json.load(sys.stdin)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), args.prompt)
    model.eval()
    tokens = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    eos = model.generation_config.eos_token_id
    ends = [[token] for token in (eos if isinstance(eos, list) else [eos])] + [tokens(end) for end in request["ends"]]
    answers = []
    for text in request["inputs"]:
        ids = tokenizer.encode(text).ids
        mass = lambda words: sum(
            torch.tensor(log_probability(model, ids, tokens(word) + end)).exp().item() for word in words for end in ends
        )
        answers.append({label: mass(words) for label, words in request["labels"].items()})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
