#!/usr/bin/env python3
"""Times softserve and its peers on the same model and the same requests, in one run. See README.md."""

import argparse
import importlib.util
import json
import pathlib
import platform
import shutil
import statistics
import tempfile
import time

import torch

import llama_cpp
import machine
from workload import Setting, head_values, layer_values, make_model, make_prompts
from server import Server
from torch_peers import DTYPES, Torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
PREFILL, DECODE = 512, 64
# A text of 16 tokens, and two tokens that tell how long one takes.
LEAST_ROOM = 18
# What is counted of a config.json.
NEEDED = ["hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "vocab_size"]
# Threads of PyTorch spin for a while after their work; nobody else is to pay for that.
REST = 0.3


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of 1 or more")
    return int(text)


def program(text):
    found = shutil.which(text)
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a program; build it first or say where it is")
    return pathlib.Path(found).resolve()


def writable(text):
    path = pathlib.Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a file in a folder that is there")
    return path


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--softserve", type=program, default=str(ROOT / "target/release/softserve"), metavar="PROGRAM", help="what is measured")
    add("--shape", default="smollm2-135m", help="smollm2-135m, qwen2.5-0.5b or a config.json of such a model")
    add("--threads", type=count, default=2, metavar="N", help="of each system")
    add("--repeat", type=count, default=3, metavar="N", help="rounds, of which medians are taken")
    add("--tasks", type=count, default=8, metavar="N", help="each with a learned prompt of its own")
    add("--requests", type=count, default=32, metavar="N", help="at once, spread over the tasks")
    add("--input-tokens", type=count, nargs=2, default=(16, 64), metavar=("LEAST", "MOST"), help="of a request")
    add("--output-tokens", type=count, default=32, metavar="N", help="of every answer")
    add("--virtual-tokens", type=count, default=20, metavar="N", help="of every learned prompt")
    add("--dtypes", nargs="+", choices=sorted(DTYPES), default=["f32", "bf16"], help="number formats")
    add("--seed", type=int, default=0, metavar="N", help="the same seed makes the same requests")
    add("--llama-batched-bench", type=program, metavar="PROGRAM",
        help="llama.cpp's llama-batched-bench, to time it too; needs the package gguf")
    add("--json", type=writable, metavar="FILE", help="where every figure goes")
    add("serve_options", nargs="*", default=[], metavar="-- OPTION",
        help="for softserve serve, such as -- --kv-cache=1GiB")
    args = parser.parse_args()
    args.dtypes = list(dict.fromkeys(args.dtypes))
    least, most = args.input_tokens
    if least > most:
        parser.error(f"--input-tokens: found {least} {most}, expected the lower number first")
    if args.llama_batched_bench and not importlib.util.find_spec("gguf"):
        parser.error("--llama-batched-bench: there is no package gguf; install it with pip install gguf")
    return args


def check(args, config):
    """Ends the program if the shape is not one that all systems can be given."""
    missing = [key for key in NEEDED if key not in config]
    if missing:
        raise SystemExit(f"--shape {args.shape}: it has no {', '.join(missing)}; expected a shape like Llama's or Qwen2's")
    context = config["max_position_embeddings"]
    longest = args.virtual_tokens + max(args.input_tokens[1] + args.output_tokens, LEAST_ROOM)
    if longest > context:
        raise SystemExit(f"--shape {args.shape}: it has {context} positions, the longest request would take {longest}; "
                         "ask for fewer --virtual-tokens, --input-tokens or --output-tokens")


def main():
    args = parse()
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        folder = pathlib.Path(folder)
        model = folder / "model"
        make_model(args.softserve, args.shape, model)
        config = json.loads((model / "config.json").read_text())
        check(args, config)
        prompts = make_prompts(folder / "adapters", model, config, args.tasks, args.virtual_tokens, args.seed)
        setting = Setting(model, prompts, config, args.requests, tuple(args.input_tokens), args.output_tokens,
                          args.virtual_tokens, args.threads, args.seed)
        torch.set_num_threads(args.threads)
        servers = {}
        try:
            for dtype in args.dtypes:
                servers[dtype] = Server(args.softserve, setting, dtype, folder, args.serve_options)
                servers[dtype].__exit__()
            result = measure(args, setting, servers)
        finally:
            for server in servers.values():
                server.close()
        result["llama_cpp"] = llama_cpp.run(args.llama_batched_bench, setting, folder)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(args, setting, servers):
    """Rounds in which each system has its turn, so that a slow minute of the machine hits all of them."""
    systems = ["peft", "by_hand", "softserve"]
    rates = {d: {s: [] for s in systems} for d in args.dtypes}
    first = {d: {"peft": [], "softserve": []} for d in args.dtypes}
    single = {d: {"prefill": [], "decode": []} for d in args.dtypes}
    best = {"bandwidth": [], "matmul": {d: [] for d in args.dtypes}}
    same = {d: [0, 0] for d in args.dtypes}
    peers = {dtype: Torch(setting, dtype) for dtype in args.dtypes}
    tokens = setting.requests * setting.output_tokens
    warm_up(setting, peers, servers)
    for round_ in range(1, args.repeat + 1):
        best["bandwidth"].append(turn(machine.bandwidth))
        for dtype in args.dtypes:
            say(f"round {round_} of {args.repeat}, {dtype}")
            requests = setting.batch(round_)
            best["matmul"][dtype].append(turn(machine.matmul_flops, setting.config, DTYPES[dtype]))
            alone, wanted = turn(peers[dtype].one_after_another, requests)
            hand, _ = turn(peers[dtype].by_hand, requests)
            with servers[dtype] as server:
                ours, found = turn(server.together, requests)
            for system, seconds in zip(systems, (alone, hand, ours)):
                rates[dtype][system].append(tokens / seconds)
            same[dtype][0] += sum(a == b for a, b in zip(wanted, found, strict=True))
            same[dtype][1] += len(requests)
            request = setting.single(round_, sum(setting.input_tokens) // 2)
            first[dtype]["peft"].append(turn(peers[dtype].first_token, request)[0])
            with servers[dtype] as server:
                first[dtype]["softserve"].append(turn(server.stream, request, 1)[0])
                long = setting.single(round_, min(PREFILL, room(setting) - 1))
                single[dtype]["prefill"].append(turn(server.stream, long, 1)[0])
                times = turn(server.stream, setting.single(round_, 16), min(DECODE, room(setting) - 16))
                single[dtype]["decode"].append((times[-1] - times[0]) / (len(times) - 1))
    return summary(args, setting, servers, rates, first, single, best, same)


def room(setting):
    return setting.config["max_position_embeddings"] - setting.virtual_tokens


def warm_up(setting, peers, servers):
    """One small request of every task to every system."""
    requests = [r for r in setting.batch(0)][:len(setting.prompts)]
    for dtype, peer in peers.items():
        say(f"warming up, {dtype}")
        peer.one_after_another(requests[:2])
        peer.by_hand(requests)
        with servers[dtype] as server:
            server.together(requests)


def turn(run, *args):
    time.sleep(REST)
    return run(*args)


def say(text):
    print(text, flush=True)


def summary(args, setting, servers, rates, first, single, best, same):
    median = statistics.median
    config = setting.config
    out = {
        "shape": args.shape, "threads": args.threads, "repeat": args.repeat, "tasks": args.tasks,
        "requests": args.requests, "input_tokens": args.input_tokens, "output_tokens": args.output_tokens,
        "virtual_tokens": args.virtual_tokens, "seed": args.seed,
        "machine": {"processor": processor(), "torch": torch.__version__, "python": platform.python_version(),
                    "bandwidth": median(best["bandwidth"])},
        "rounds": {"tokens_per_second": rates, "first_token": first, "single": single, "machine": best},
        "dtypes": {},
    }
    for dtype in args.dtypes:
        medians = {system: median(values) for system, values in rates[dtype].items()}
        prefill, decode = median(single[dtype]["prefill"]), median(single[dtype]["decode"])
        length = min(PREFILL, room(setting) - 1)
        bytes_ = (layer_values(config) + head_values(config)) * DTYPES[dtype].itemsize
        flops = 2 * (length * layer_values(config) + head_values(config)) / prefill
        out["dtypes"][dtype] = {
            "tokens_per_second": medians,
            "first_token_seconds": {system: median(values) for system, values in first[dtype].items()},
            "same_answers_as_peft": same[dtype],
            "prefill": {"tokens": length, "tokens_per_second": length / prefill, "flops": flops,
                        "torch_matmul_flops": median(best["matmul"][dtype])},
            "decode": {"tokens_per_second": 1 / decode, "bytes_per_second": bytes_ / decode},
            "peak_memory_bytes": servers[dtype].memory(),
        }
    return out


def processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(result):
    """The figures for people."""
    least, most = result["input_tokens"]
    memory = result["machine"]["bandwidth"]
    lines = [
        "",
        f"{result['shape']}, random weights; {result['machine']['processor']}, {result['threads']} threads",
        f"{result['requests']} requests of {result['tasks']} tasks at once, {result['virtual_tokens']} virtual, "
        f"{least}-{most} input and {result['output_tokens']} output tokens; medians of {result['repeat']}",
    ]
    row = lambda name, value, note="": lines.append(f"  {name:<44}{value:>10}  {note}".rstrip())
    llama = (result["llama_cpp"] or {}).get(str(result["requests"]))
    for dtype, of in result["dtypes"].items():
        rate, first = of["tokens_per_second"], of["first_token_seconds"]
        ratio = lambda system: f"softserve is {rate['softserve'] / rate[system]:.2f} x"
        lines += ["", f"{dtype}: generated tokens a second over the whole load"]
        row("PEFT, one request after another", f"{rate['peft']:.1f}", ratio("peft"))
        row("by hand, one left-padded batch", f"{rate['by_hand']:.1f}", ratio("by_hand"))
        if llama:
            there = llama["tokens_per_second"]
            row("llama.cpp, bf16", f"{there:.1f}", f"softserve is {rate['softserve'] / there:.2f} x")
        row("softserve, over HTTP", f"{rate['softserve']:.1f}")
        lines.append(f"{dtype}: one request")
        row("time to first token, PEFT", f"{1e3 * first['peft']:.1f} ms")
        row("time to first token, softserve", f"{1e3 * first['softserve']:.1f} ms",
            f"{first['softserve'] / first['peft']:.2f} of PEFT's")
        prefill, decode = of["prefill"], of["decode"]
        row(f"prefill of {prefill['tokens']} tokens", f"{prefill['tokens_per_second']:.0f}/s",
            f"{prefill['flops'] / 1e9:.0f} GFLOP/s, {prefill['flops'] / prefill['torch_matmul_flops']:.0%} of PyTorch's "
            f"matmul ({prefill['torch_matmul_flops'] / 1e9:.0f})")
        row("decode", f"{decode['tokens_per_second']:.1f}/s",
            f"{decode['bytes_per_second'] / 1e9:.1f} GB/s of weights, {decode['bytes_per_second'] / memory:.0%} of memory's "
            f"{memory / 1e9:.1f}")
        right, all_ = of["same_answers_as_peft"]
        row("answers with the very tokens of PEFT's", f"{right}/{all_}")
    if not llama:
        lines += ["", "llama.cpp: skipped; it is timed with --llama-batched-bench"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
