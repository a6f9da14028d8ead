"""Tunes with the program's defaults and with PEFT on the same examples of a labelled task, and compares. See README.md beside it."""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import tempfile
import time

from models import ROOT, folder_of_floats

RATES = {"prompt": [0.003, 0.01, 0.03, 0.1, 0.3], "prefix": [0.003, 0.01, 0.03, 0.1, 0.3], "p-tuning": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
         "lora": [3e-4, 1e-3, 3e-3]}
VIRTUAL_TOKENS = 32
BATCH = 16


def read(path):
    return [json.loads(line) for line in open(path) if line.strip()]


def ours(program, model, train, test, work, options):
    """The program with its defaults: accuracies by the generated and by the likeliest label, seconds, what it chose."""
    output = work / "ours"
    began = time.monotonic()
    said = subprocess.run([program, "tune", "--task", "real", "--data", train, "--model", model, "--output", output, *options],
                          check=True, capture_output=True, text=True)
    seconds = time.monotonic() - began
    report = subprocess.run([program, "eval", "--prompt", output, "--data", test, "--model", model, "--json"],
                            check=True, capture_output=True, text=True)
    metrics = json.loads(report.stdout)["columns"][0]["metrics"]
    why = next((line for line in said.stderr.splitlines() if " is chosen: " in line), "")
    return metrics["accuracy"], metrics["choice_accuracy"], seconds, why


def tf_idf(train, test):
    """TF-IDF of words, pairs of words and pieces of words, with logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    features = make_union(TfidfVectorizer(ngram_range=(1, 2)), TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5)))
    model = make_pipeline(features, LogisticRegression(C=10, max_iter=2000))
    model.fit([e["input"] for e in train], [e["label"] for e in train])
    return model.score([e["input"] for e in test], [e["label"] for e in test])


class Peer:
    """PEFT on the same template, examples, batches and answers."""

    def __init__(self, folder, train, test, threads, bf16):
        import torch
        from transformers import AutoTokenizer

        torch.set_num_threads(threads)
        self.folder, self.torch = folder, torch
        # Weights and what is learned stay in f32; products are computed in bf16 if asked.
        self.precision = lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        pair = lambda e: (ids(e["input"] + "\n"), ids(e["label"]) + [self.tokenizer.eos_token_id])
        self.train, self.test = [pair(e) for e in train], [pair(e) for e in test]

    def batch(self, examples):
        torch = self.torch
        width = max(len(text) + len(answer) for text, answer in examples)
        ids = torch.full((len(examples), width), self.tokenizer.eos_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (text, answer) in enumerate(examples):
            n = len(text) + len(answer)
            ids[row, :n], mask[row, :n] = torch.tensor(text + answer), 1
            labels[row, len(text):n] = torch.tensor(answer)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def config(self, method):
        import peft

        task = peft.TaskType.CAUSAL_LM
        return {
            "prompt": lambda: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL_TOKENS),
            "prefix": lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL_TOKENS),
            "p-tuning": lambda: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=VIRTUAL_TOKENS, encoder_hidden_size=128),
            "lora": lambda: peft.LoraConfig(task_type=task, r=16, lora_alpha=32, target_modules="all-linear"),
        }[method]()

    def accuracy(self, model):
        """The part of the labels that greedy decoding gives, token for token with the end."""
        torch, right = self.torch, 0
        model.eval()
        with torch.no_grad():
            for i in range(0, len(self.test), 32):
                batch = self.batch(self.test[i:i + 32])
                labels = batch.pop("labels")
                chosen = model(**batch).logits[:, -labels.shape[1]:][:, :-1].argmax(-1)
                right += ((chosen == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).sum().item()
        model.train()
        return right / len(self.test)

    def likeliest(self, model, labels):
        """The part of the test examples whose label, with the end of the answer, is likelier than any other."""
        torch, right, at_once = self.torch, 0, max(1, 64 // len(labels))
        model.eval()
        with torch.no_grad():
            for i in range(0, len(self.test), at_once):
                examples = self.test[i:i + at_once]
                batch = self.batch([(text, label) for text, _ in examples for label in labels])
                targets = batch.pop("labels")[:, 1:]
                logits = model(**batch).logits[:, -targets.shape[1] - 1:][:, :-1].float()
                of_tokens = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
                sums = of_tokens.masked_fill(targets == -100, 0).sum(1).view(len(examples), len(labels))
                right += sum(labels[k] == answer for k, (_, answer) in zip(sums.argmax(1).tolist(), examples))
        model.train()
        return right / len(self.test)

    def run(self, method, rate, steps, seed):
        """One run of PEFT: its accuracies by the likeliest and by the generated label, and seconds a step."""
        import peft
        from transformers import AutoModelForCausalLM

        torch = self.torch
        torch.manual_seed(seed)
        order, chosen = [], random.Random(seed)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32), self.config(method))
        learned = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
        warmup = max(1, round(0.06 * steps))
        fall = lambda step: min((step + 1) / warmup, 1) * (1 - step / steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, fall)
        times = []
        for _ in range(steps):
            while len(order) < BATCH:
                order += chosen.sample(range(len(self.train)), len(self.train))
            examples, order = [self.train[i] for i in order[:BATCH]], order[BATCH:]
            began = time.monotonic()
            with self.precision():
                loss = model(**self.batch(examples)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            times.append(time.monotonic() - began)
        labels = [list(answer) for answer in sorted({tuple(answer) for _, answer in self.train})]
        with self.precision():
            return self.likeliest(model, labels), self.accuracy(model), statistics.median(times)


class Results:
    """What was measured, a line each: printed, and kept as JSON Lines for `plot.py` if a file is named."""

    def __init__(self, path):
        self.file = path.open("a") if path else None

    def add(self, line, **record):
        print(line, flush=True)
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


def percent(accuracies):
    return ", ".join(f"{100 * accuracy:.1f} %" for accuracy in accuracies)


def compare(args, model, examples, test, work, results):
    """Everything that was asked for on so many examples: our accuracies by the likeliest label."""
    train = read(args.train)[:examples]
    count = len(train)
    print(f"{count} examples to learn from, {len(test)} to test with, {len({e['label'] for e in test})} labels", flush=True)
    few = work / "train.jsonl"
    few.write_text("".join(json.dumps(e) + "\n" for e in train))
    peers = [name for name in args.peers.split(",") if name]
    accuracies = []
    for seed in range(args.seeds if "ours" in peers else 0):
        options = ["--seed", str(seed), *args.options.split()]
        generated, likeliest, seconds, why = ours(args.program, model, few, args.test, work, options)
        accuracies.append(likeliest)
        results.add(f"softserve, seed {seed}: {100 * likeliest:.1f} % by the likeliest label, {100 * generated:.1f} % by the generated one, "
                    f"{seconds:.0f} s; {why}",
                    method="softserve", options=args.options, examples=count, seed=seed, likeliest=likeliest, generated=generated, seconds=seconds)
    if "tf-idf" in peers:
        accuracy = tf_idf(train, test)
        results.add(f"TF-IDF and logistic regression: {100 * accuracy:.1f} %", method="TF-IDF", examples=count, likeliest=accuracy)
    methods = [name for name in peers if name not in ("ours", "tf-idf")]
    peer = Peer(model, train, test, args.threads, args.bf16) if methods else None
    for method in methods:
        rates = [float(rate) for rate in args.rates.split(",")] if args.rates else RATES[method]
        for rate in rates:
            found = [peer.run(method, rate, args.steps, seed) for seed in range(args.seeds)]
            results.add(f"PEFT {method}, learning rate {rate}, {args.steps} steps: {percent(run[0] for run in found)} by the likeliest label, "
                        f"{percent(run[1] for run in found)} by the generated one; {found[0][2]:.2f} s a step",
                        method=f"PEFT {method}", rate=rate, steps=args.steps, examples=count, bf16=args.bf16,
                        likeliest=statistics.mean(run[0] for run in found), generated=statistics.mean(run[1] for run in found),
                        seconds=args.steps * found[0][2])
    return accuracies


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=pathlib.Path, required=True, help="JSON Lines with input and label")
    parser.add_argument("--test", type=pathlib.Path, required=True)
    parser.add_argument("--examples", help="only so many of the training examples; several numbers, separated by commas, one after another")
    parser.add_argument("--peers", default="ours,tf-idf,prompt,prefix,lora", help="ours, tf-idf, and of PEFT: prompt, prefix, p-tuning, lora")
    parser.add_argument("--options", default="", help="further options of `softserve tune`")
    parser.add_argument("--rates", help="only these learning rates of PEFT's methods, separated by commas")
    parser.add_argument("--steps", type=int, default=200, help="of each run of PEFT")
    parser.add_argument("--bf16", action="store_true", help="PEFT under autocast, which is faster on a processor with AMX")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--least", type=float, help="fail if our mean accuracy, 0 to 1, is below this")
    parser.add_argument("--results", type=pathlib.Path, help="a file of JSON Lines to add each result to")
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "target/release/softserve")
    parser.add_argument("--models", type=pathlib.Path, default=ROOT / "target/real-models")
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    model = folder_of_floats("smollm2-135m-q4_1", args.models)
    test, results, accuracies = read(args.test), Results(args.results), []
    sizes = [int(size) for size in args.examples.split(",")] if args.examples else [None]
    with tempfile.TemporaryDirectory() as work:
        for size in sizes:
            accuracies += compare(args, model, size, test, pathlib.Path(work), results)
    if args.least is not None and accuracies and statistics.mean(accuracies) < args.least:
        raise SystemExit(f"the accuracy is {statistics.mean(accuracies):.3f}, expected {args.least} or more")


if __name__ == "__main__":
    main()
