#!/usr/bin/env python3
"""Softserve's greedy tokens and log-probabilities beside transformers', on the same random weights, in f32 and bf16, behind
a learned prompt, one request at a time and all at once. Writes JSON.

transformers is asked in f32 (of bf16 weights: with their rounded values) what it says of the very tokens that softserve
chose, so that one early difference does not make all that follows another text. In bf16 softserve may be twice as far from
that as transformers in bf16 is. Tried without a GPU: --size tiny --device cpu."""

import argparse
import concurrent.futures
import contextlib
import json
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from run import call

# Families that differ in their norms: before a branch; also of queries and keys; also after a branch; layer norms beside
# each other.
FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt_neox")
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 300},
    "full": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 8, "head_dim": 128, "vocab_size": 16384},
}
VIRTUAL_TOKENS, LIKELIEST = 20, 10
# How far log-probabilities in f32 may be apart; in bf16 the least that counts as far.
TOLERANCE = {"f32": 1e-3, "bf16": 2e-2}


def config_of(family, size):
    # Tokens that end an answer are ignored; w0 stands for what is not a word.
    more = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
            # Wide enough that attention and answers are far from uniform.
            "initializer_range": 0.08}
    if family != "gpt_neox":
        more["num_key_value_heads"] = SIZES[size]["num_attention_heads"] // 2
    if family == "gemma3_text":
        more |= {"query_pre_attn_scalar": SIZES[size]["head_dim"], "sliding_window": 64, "tie_word_embeddings": True}
    return AutoConfig.for_model(family, **SIZES[size] | more)


def random_model(family, size, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, size), dtype=torch.float32, attn_implementation="eager").eval()
    # Norms and biases that do something.
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.2 * torch.randn_like(weight)
    return model


def save(model, folder, dtype):
    """The model with a tokenizer whose word `w7` is token 7."""
    model.to(dtype).save_pretrained(folder)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None,
                 "decoder": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    pathlib.Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "unk_token": "w0", "model_max_length": 2048}
    pathlib.Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))


@contextlib.contextmanager
def serving(program, model, device, dtype, folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", pathlib.Path(folder, "log")
    command = [program, "serve", "--model", str(model), "--device", device, "--dtype", dtype, "--prompts", f"{folder}/prompts"]
    with open(log, "w") as out:
        server = subprocess.Popen([*command, "--listen", f"127.0.0.1:{port}", "--kv-cache", "256MiB"], stdout=out, stderr=out)
    try:
        for _ in range(600):
            try:
                if call(url + "/health/ready")[0] == 200:
                    break
            except OSError:
                pass
            if server.poll() is not None:
                raise RuntimeError(log.read_text()[-2000:])
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def answer(url, ids, new):
    body = {"input": " ".join(f"w{i}" for i in ids), "max_tokens": new, "ignore_eos": True, "temperature": 0, "logprobs": LIKELIEST}
    status, text = call(f"{url}/v1/tasks/conformance/generate", json.dumps(body).encode())
    if status != 200:
        raise RuntimeError(f"{status}: {text[:500]}")
    found = json.loads(text)
    if found["usage"]["prompt_tokens"] != len(ids):
        raise RuntimeError(f"{len(ids)} words became {found['usage']['prompt_tokens']} tokens")
    return found["tokens"]


def log_probabilities(model, rows, ids, tokens):
    """Of every next token after the prompt's rows and `ids`, and after each of `tokens` but the last."""
    device = model.device
    words = model.get_input_embeddings()(torch.tensor([ids + tokens[:-1]], device=device))
    with torch.inference_mode():
        embeddings = torch.cat([rows[None].to(device, words.dtype), words], dim=1)
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, -len(tokens) :]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def compare(answers, inputs, rows, exact, rounded):
    """The largest differences from the model in f32, over all tokens of all answers."""
    result = {"tokens": 0, "equal_tokens": 0, "error": 0.0, "chosen_below_best": 0.0, "error_of_transformers": 0.0}
    for tokens, ids in zip(answers, inputs):
        chosen = [token["id"] for token in tokens]
        expected = log_probabilities(exact, rows, ids, chosen)
        other = log_probabilities(rounded, rows, ids, chosen) if rounded else None
        for i, token in enumerate(tokens):
            reported = {t["id"]: t["logprob"] for t in [token, *token["top_logprobs"]]}
            where, found = torch.tensor(list(reported)), torch.tensor(list(reported.values()))
            result["tokens"] += 1
            result["equal_tokens"] += int(expected[i].argmax()) == token["id"]
            result["error"] = max(result["error"], float((expected[i][where] - found).abs().max()))
            result["chosen_below_best"] = max(result["chosen_below_best"], float(expected[i].max() - expected[i][token["id"]]))
            if other is not None:
                result["error_of_transformers"] = max(result["error_of_transformers"], float((expected[i][where] - other[i][where]).abs().max()))
    return result


def judged(result, dtype):
    allowed = max(TOLERANCE[dtype], 2 * result["error_of_transformers"])
    # The chosen token may be another only where two are as good as equally likely.
    result["allowed"], result["passed"] = allowed, result["error"] <= allowed and result["chosen_below_best"] <= 2 * allowed
    return result


def conformance(family, args):
    lengths = (1, 3, 20, 33, 60, 100) if args.size == "tiny" else (1, 5, 31, 100, 257, 600)
    result = {}
    for dtype, torch_dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        draw = random.Random(7)
        exact = random_model(family, args.size, 7)
        inputs = [[draw.randrange(3, exact.config.vocab_size) for _ in range(length)] for length in lengths]
        embeddings = exact.get_input_embeddings()(torch.arange(3, 3 + VIRTUAL_TOKENS))
        rows = (embeddings + 0.5 * embeddings.std() * torch.randn_like(embeddings)).detach().contiguous()
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder, "model")
            save(exact, model, torch_dtype)
            save_file({"prompt_embeddings": rows}, f"{folder}/prompt.safetensors")
            rounded = None
            if dtype == "bf16":
                rounded = AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype, attn_implementation="eager").eval().to(args.torch_device)
            exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval().to(args.torch_device)
            with serving(args.program, model, args.device, dtype, folder) as url:
                body = pathlib.Path(folder, "prompt.safetensors").read_bytes()
                status, text = call(f"{url}/v1/admin/tasks/conformance/versions", body, "application/octet-stream", "POST")
                if status >= 300:
                    raise RuntimeError(f"{status}: {text[:500]}")
                alone = [answer(url, ids, args.tokens) for ids in inputs]
                with concurrent.futures.ThreadPoolExecutor(2 * len(inputs)) as pool:
                    together = list(pool.map(lambda ids: answer(url, ids, args.tokens), 2 * inputs))
        result[dtype] = {
            "one_request": judged(compare(alone, inputs, rows, exact, rounded), dtype),
            "all_requests": judged(compare(together, 2 * inputs, rows, exact, rounded), dtype),
        }
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--device", default="cuda", help="softserve's")
    parser.add_argument("--torch-device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    results = {"passed": False}
    for family in args.families.split(","):
        try:
            results[family] = conformance(family, args)
        except Exception as error:  # A family that fails is a result; the others go on.
            results[family] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        # What is known so far, for who does not wait to the end.
        pathlib.Path(args.json).write_text(json.dumps(results, indent=1))
    families = [results[family] for family in args.families.split(",")]
    parts = [part for found in families if "failed" not in found for dtype in found.values() for part in dtype.values()]
    results["passed"] = all(part["passed"] for part in parts) and not any("failed" in found for found in families)
    pathlib.Path(args.json).write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    sys.exit(0 if results["passed"] else 1)


if __name__ == "__main__":
    main()
