#!/usr/bin/env python3
"""What the GPU can do, and what transformers does with it: memory bandwidth, bf16 matrix products, and `generate` on random
weights of a config.json's shape. Prints JSON."""

import argparse
import json
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def seconds(run, repeat=5):
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def machine():
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source), 10)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = seconds(lambda: a @ b, 10)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        # Bytes read and written.
        "bandwidth_bytes_per_second": 2 * source.numel() / copied,
        "matmul_flop_per_second": 2 * 8192**3 / multiplied,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--prefill", default="512,4096")
    args = parser.parse_args()
    result = machine()
    torch.manual_seed(0)
    started = time.time()
    with torch.device("cuda"):
        config = AutoConfig.from_pretrained(args.config)
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    result["load_seconds"] = time.time() - started
    result["decode"], result["prefill"] = [], []
    vocab = config.vocab_size

    def generate(ids, new):
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )

    with torch.inference_mode():
        for batch in map(int, args.batches.split(",")):
            ids = torch.randint(5, vocab, (batch, args.input_tokens), device="cuda")
            times = {}
            for new in (2, 2 + args.output_tokens):
                generate(ids, new)
                torch.cuda.synchronize()
                runs = []
                for _ in range(2):
                    began = time.perf_counter()
                    generate(ids, new)
                    torch.cuda.synchronize()
                    runs.append(time.perf_counter() - began)
                times[new] = min(runs)
            step = (times[2 + args.output_tokens] - times[2]) / args.output_tokens
            result["decode"].append({"batch": batch, "seconds_per_step": step, "tokens_per_second": batch / step})
        for rows in map(int, args.prefill.split(",")):
            ids = torch.randint(5, vocab, (1, rows), device="cuda")
            took = seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), 5)
            result["prefill"].append({"tokens": rows, "seconds": took})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
