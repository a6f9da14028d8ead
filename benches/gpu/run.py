#!/usr/bin/env python3
"""Softserve on a GPU: conformance, decode and prefill against the floor and transformers, long and many learned prompts, a thousand of
them resident, swaps under load, and tuning. Called by run.sh; writes JSON and prints a table."""

import argparse
import concurrent.futures
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
BATCHES = (1, 8, 32, 128)
PREFILL = (512, 4096)


def run_json(command, path, limit):
    log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
    if log.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {log.stdout[-2000:]}")
    return json.loads(pathlib.Path(path).read_text())


def weight_bytes(config):
    """Bytes of the matrices that every decoded token reads, in bf16: all but the embedding table."""
    c = json.loads(config.read_text())
    hidden, inner, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    return 2 * (c["num_hidden_layers"] * layer + c["vocab_size"] * hidden)


# Another one to try the script without a GPU.
DEVICE = os.environ.get("SOFTSERVE_BENCH_DEVICE", "cuda")


def bench(program, config, loads, *serve):
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/bench.json"
        command = [program, "bench", "--random-weights", config, "--device", DEVICE, "--in-turn", "--json", out]
        for load in loads:
            command += ["--load", ",".join(f"{key}={value}" for key, value in load.items())]
        found = run_json([*command, "--", *serve], out, 240)
    return {result["name"]: result["median"] for result in found["results"]}


def speed(program, config, peer):
    load = lambda name, **more: {"name": name, "tasks": 1, "virtual-tokens": 100, "input-tokens": 128, "output-tokens": 64, **more}
    loads = [load(f"b{b}", concurrency=b, requests=2 * b) for b in BATCHES]
    loads += [load(f"p{n}", concurrency=1, requests=6, **{"input-tokens": n, "output-tokens": 2}) for n in PREFILL]
    # Each twice, in turn, so that a slow minute hits all; the better counts.
    for turn in (1, 2):
        loads += [load(f"v{v}-{turn}", concurrency=32, requests=64, **{"virtual-tokens": v}) for v in (1, 100)]
        loads += [load(f"t{n}-{turn}", concurrency=64, requests=128, tasks=n, **{"virtual-tokens": 20}) for n in (1, 64)]
    found = bench(program, config, loads, "--max-batch", "128", "--max-step-tokens", "8192")
    floor = weight_bytes(config) / peer["bandwidth_bytes_per_second"]
    result = {"floor_seconds_per_step": floor, "decode": [], "prefill": []}
    for b, theirs in zip(BATCHES, peer["decode"]):
        step = found[f"b{b}"]["inter_token_latency"]["p50"] / 1e3
        result["decode"].append({
            "batch": b, "seconds_per_step": step, "share_of_floor": floor / step, "tokens_per_second": b / step,
            "times_transformers": theirs["seconds_per_step"] / step,
            "end_to_end_tokens_per_second": found[f"b{b}"]["generated_tokens_per_second"],
        })
    for n, theirs in zip(PREFILL, peer["prefill"]):
        took = found[f"p{n}"]["time_to_first_token"]["p50"] / 1e3
        least = weight_bytes(config) * n / peer["matmul_flop_per_second"]
        result["prefill"].append({
            "tokens": n, "seconds": took, "share_of_floor": least / took, "times_transformers": theirs["seconds"] / took
        })
    best = lambda name: min(found[f"{name}-{turn}"]["inter_token_latency"]["p50"] for turn in (1, 2))
    result["virtual_tokens_100_over_1"] = best("v100") / best("v1")
    result["tasks_64_over_1"] = best("t64") / best("t1")
    return result


def call(url, body=None, kind="application/json", method=None):
    request = urllib.request.Request(url, data=body, method=method, headers={"content-type": kind} if body else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def prompt(rows, width, seed):
    """A learned prompt as one safetensors file, in bf16."""
    values = (os.urandom(64) * (rows * width * 2 // 64 + 1))[: rows * width * 2]
    # Small numbers: the exponent's bits are fixed.
    values = bytearray(values)
    values[1::2] = bytes((b & 0x80) | 0x3C for b in values[1::2])
    struct.pack_into("<H", values, 0, 0x3C00 | seed % 0x80)
    header = json.dumps({"prompt_embeddings": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(values)


def gpu_bytes():
    text = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True).stdout
    return int(text.split()[0]) << 20


def registry(program, config):
    """A thousand prompts resident, and swaps under load."""
    width, rows = json.loads(config.read_text())["hidden_size"], 20
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = open(f"{folder}/log", "w")
        command = [program, "serve", "--random-weights", config, "--device", DEVICE, "--prompts", f"{folder}/prompts"]
        server = subprocess.Popen([*command, "--listen", f"127.0.0.1:{port}", "--kv-cache", "4GiB"], stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    if call(url + "/health/ready")[0] == 200:
                        break
                except OSError:
                    pass
                if server.poll() is not None:
                    raise RuntimeError(pathlib.Path(log.name).read_text()[-2000:])
                time.sleep(0.1)
            before = gpu_bytes()
            upload = lambda task, seed: call(f"{url}/v1/admin/tasks/{task}/versions", prompt(rows, width, seed), "application/octet-stream", "POST")
            began = time.time()
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda i: upload(f"t{i}", i), range(int(os.environ.get("SOFTSERVE_BENCH_PROMPTS", "1000")))))
            uploading = time.time() - began
            refused = [answer for answer in answers if answer[0] >= 300]
            ask = lambda i: call(f"{url}/v1/tasks/t{i}/generate", json.dumps({"input": "w1 w2 w3", "max_tokens": 8, "ignore_eos": True}).encode())
            with concurrent.futures.ThreadPoolExecutor(32) as pool:
                asked = [status for status, _ in pool.map(ask, range(int(os.environ.get("SOFTSERVE_BENCH_PROMPTS", "1000"))))]
            after = gpu_bytes()
            # Swaps of one prompt under load: every request has to be answered.
            stop, statuses = threading.Event(), []

            def worker():
                while not stop.is_set():
                    statuses.append(ask(0)[0])

            workers = [threading.Thread(target=worker) for _ in range(16)]
            for thread in workers:
                thread.start()
            swaps = []
            for i in range(20):
                swaps.append(upload("t0", 5000 + i)[0])
                time.sleep(0.1)
            stop.set()
            for thread in workers:
                thread.join()
            return {
                "prompts": len(answers) - len(refused), "first_refusal": refused[0][1].decode(errors="replace")[:300] if refused else None,
                "bytes_of_one": rows * width * 2, "device_bytes_for_all": after - before, "uploads_per_second": len(answers) / uploading,
                "answers_of_all": asked.count(200), "swaps": len(swaps), "failed_swaps": sum(s >= 300 for s in swaps),
                "requests_during_swaps": len(statuses), "failed_requests_during_swaps": sum(s != 200 for s in statuses),
            }
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def tuning(program, config):
    """Steps a second of `softserve tune`, eight examples a step."""
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "train.jsonl")
        lines = [{"input": " ".join(f"w{(i * 31 + j * 7) % 1000}" for j in range(60)), "output": f"w{i % 50} w{i % 7}"} for i in range(64)]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = {}
        for kind in ("prompt", "p-tuning", "prefix"):
            times = {}
            # What comes before and after the steps is the same for both.
            for steps in (10, 50):
                command = [program, "tune", "--task", f"bench-{kind}", "--data", data, "--random-weights", config, "--device", DEVICE]
                command += ["--type", kind, "--steps", steps, "--batch-size", 8, "--lr", 0.01, "--eval-every", 1000]
                command += ["--virtual-tokens", 20, "--output", f"{folder}/{kind}-{steps}", "--checkpoint", f"{folder}/{kind}-{steps}-state"]
                began = time.time()
                log = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
                times[steps] = time.time() - began
                if log.returncode:
                    raise RuntimeError(log.stderr[-1500:])
            result[kind] = {"steps_per_second": 40 / (times[50] - times[10]), "seconds_for_50_steps": times[50]}
        return result


def conformance(program, limit):
    """What conformance.py found, or had found when the time was over."""
    with tempfile.TemporaryDirectory() as folder:
        found = pathlib.Path(folder, "conformance.json")
        # On a CPU, where the script itself is tried, shapes are tiny.
        size = "full" if DEVICE.startswith("cuda") else "tiny"
        command = [sys.executable, str(HERE / "conformance.py"), "--program", program, "--json", str(found), "--device", DEVICE, "--size", size]
        more = {}
        try:
            log = subprocess.run(command, capture_output=True, text=True, timeout=limit).stderr
        except subprocess.TimeoutExpired:
            log = f"it took more than {limit} s"
            more = {"unfinished": log}
        if not found.exists():
            raise RuntimeError(log[-2000:])
        return json.loads(found.read_text()) | more


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    shapes = {name: HERE / f"{name}.json" for name in ("llama-3.2-1b", "llama-3.1-8b")}
    smi = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], capture_output=True, text=True)
    results = {"machine": smi.stdout.strip(), "cpus": os.cpu_count()}

    def step(name, run):
        began = time.time()
        try:
            results[name] = run()
        except Exception as error:  # A step that fails is a result; the others go on.
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        print(f"{name}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
        pathlib.Path(args.json).write_text(json.dumps(results, indent=1))

    def peer(shape):
        log = subprocess.run([sys.executable, str(HERE / "peer.py"), "--config", str(shapes[shape])], capture_output=True, text=True, timeout=200)
        if log.returncode:
            raise RuntimeError(log.stderr[-2000:])
        return json.loads(log.stdout)

    step("transformers-8b", lambda: peer("llama-3.1-8b"))
    step("softserve-8b", lambda: speed(args.program, shapes["llama-3.1-8b"], results["transformers-8b"]))
    step("registry-8b", lambda: registry(args.program, shapes["llama-3.1-8b"]))
    step("tuning-1b", lambda: tuning(args.program, shapes["llama-3.2-1b"]))
    step("conformance", lambda: conformance(args.program, 120))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
