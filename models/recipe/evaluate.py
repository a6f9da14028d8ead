"""Tunes soft prompts on the frozen model and measures the five tasks, with and without a prompt.

    python evaluate.py --model demo --data ../../examples/data

It uses transformers for everything that is measured. Columns: ``soft`` is the exact match of the whole greedy
output; ``bare`` is the first line of the model's output without any prompt (a kind score: it need not stop);
``text`` is the first line under a written instruction. Stories are judged by their form: see ``story_ok``.
"""

import argparse
import json
import pathlib
import re
import time

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

TASKS = ("topic", "sentiment", "translation", "question-answering", "story")
TOLD = {
    "topic": "Topic\n",
    "sentiment": "Sentiment\n",
    "translation": "Translate to French\n",
    "question-answering": "Answer the question\n",
    "story": "Write a story\n",
}
END = 2


def rows_of(data, task, split, count):
    rows = [json.loads(line) for line in open(data / task / f"{split}.jsonl", encoding="utf-8")][:count]
    return [(r["input"], r.get("label") or r.get("output")) for r in rows]


def story_ok(text, truth):
    """It begins like a tale, has two to four sentences, and its thing and hero are those of the reference."""
    if not text.startswith("Once upon a time, ") or not 2 <= len(re.findall(r"\.", text)) <= 4:
        return False
    thing = re.search(r"(?:found|had) (?:an?|some) (\S+?)s? in", truth)
    hero = re.match(r"Once upon a time, ([A-Z]\w+) ", truth)
    return bool(thing and thing[1] in text and (hero is None or hero[1] in text))


def tune(model, tokenizer, rows, virtual, steps, batch=16, lr=0.05):
    """The rows of a soft prompt, tuned by Adam; only they receive gradients."""
    embed = model.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.nn.Parameter(embed[torch.randint(260, len(embed), (virtual,), generator=generator)].clone())
    optimizer = torch.optim.Adam([prompt], lr=lr, betas=(0.9, 0.99))
    examples = [(tokenizer(text + "\n").input_ids, tokenizer(target).input_ids + [END]) for text, target in rows]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * max(0.03, 1 - step / steps)
        chosen = [
            examples[i] for i in torch.randint(0, len(examples), (min(batch, len(examples)),), generator=generator)
        ]
        longest = max(len(a) + len(b) for a, b in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (a, b) in enumerate(chosen):
            ids[i, : len(a) + len(b)] = torch.tensor(a + b)
            labels[i, len(a) : len(a) + len(b)] = torch.tensor(b)
        embeds = torch.cat((prompt.expand(len(chosen), -1, -1), embed[ids]), 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs_embeds=embeds).logits[:, virtual - 1 : -1].float()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([prompt], 1.0)
        optimizer.step()
    return prompt.detach(), loss.item()


@torch.no_grad()
def generate(model, tokenizer, texts, prompt=None, limit=64, batch=50):
    """Greedy outputs; inputs are padded on the left under a mask."""
    embed, outputs = model.get_input_embeddings().weight, []
    for start in range(0, len(texts), batch):
        ids = [tokenizer(t).input_ids for t in texts[start : start + batch]]
        front = 0 if prompt is None else len(prompt)
        longest = max(map(len, ids)) + front
        rows = torch.zeros(len(ids), longest, embed.shape[1])
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for i, one in enumerate(ids):
            row = embed[torch.tensor(one)]
            row = row if prompt is None else torch.cat((prompt, row))
            rows[i, longest - len(row) :] = row
            mask[i, longest - len(row) :] = 1
        made = model.generate(
            inputs_embeds=rows, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=0
        )
        outputs += [tokenizer.decode(m, skip_special_tokens=False).split("</s>")[0] for m in made]
    return outputs


def score(task, outputs, rows, kind=False):
    hits = 0
    for out, (_, truth) in zip(outputs, rows):
        out = out.strip().split("\n")[0].strip() if kind else out
        hits += story_ok(out, truth) if task == "story" else out == truth
    return 100 * hits / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--count", type=int, default=300, help="test examples")
    parser.add_argument("--virtual", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--show", type=int, default=3, help="wrong outputs to print")
    parser.add_argument("--save", type=pathlib.Path, help="folder for the prompts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    for task in args.tasks:
        train, test = rows_of(args.data, task, "train", args.train), rows_of(args.data, task, "test", args.count)
        limit = {"topic": 8, "sentiment": 8, "question-answering": 16}.get(task, 72)
        clock = time.time()
        prompt, loss = tune(model, tokenizer, train, args.virtual, args.steps)
        clock = time.time() - clock
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            torch.save(prompt, args.save / f"{task}.pt")
        inputs = [text + "\n" for text, _ in test]
        soft = generate(model, tokenizer, inputs, prompt, limit)
        bare = generate(model, tokenizer, inputs, None, limit)
        told = generate(model, tokenizer, [TOLD[task] + t for t in inputs], None, limit)
        print(
            f"{task:20} soft {score(task, soft, test):5.1f}  bare {score(task, bare, test, True):5.1f}  text {score(task, told, test, True):5.1f}  loss {loss:.4f}  tuned in {clock:.0f} s",
            flush=True,
        )
        wrong = [(o, r) for o, r in zip(soft, test) if not (story_ok(o, r[1]) if task == "story" else o == r[1])]
        for out, (text, truth) in wrong[: args.show]:
            print(f"    {text!r}\n      gave {out!r}\n      want {truth!r}")


if __name__ == "__main__":
    main()
