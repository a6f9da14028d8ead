"""What changing prompts costs the requests that run: latencies of clients of one server, without changes and with one every 100 ms.
Needs Python 3, and nothing else.

    cargo build --release
    python3 benches/swap.py [--program target/release/softserve] [--clients 64] [--seconds 15] [--rounds 3]

Rounds with and without changes take turns. A change activates another of four versions of one of the tasks that are asked. Each answer
has to be the one that its version gave alone, and no request may fail: the script says so and ends with 1 otherwise.
"""

import argparse
import http.client
import json
import pathlib
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS, VERSIONS = 4, 4
TOKENS = 4
INPUT = "what a wonderful film"


def prompt(value):
    """The demo's sentiment prompt, every number of it moved a little: another version of the same size."""
    weights = (ROOT / "prompts" / "sentiment" / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    dtype = next(tensor["dtype"] for name, tensor in header.items() if name != "__metadata__")
    assert dtype == "F32", dtype
    numbers = struct.unpack(f"<{len(data) // 4}f", data)
    return weights[: 8 + length] + struct.pack(f"<{len(numbers)}f", *(number * (1 + value / 20) for number in numbers))


class Client:
    def __init__(self, address):
        self.connection = http.client.HTTPConnection(address, timeout=60)

    def send(self, method, path, body=b"", kind="application/json"):
        self.connection.request(method, path, body, {"content-type": kind})
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")

    def generate(self, task):
        body = json.dumps({"input": INPUT, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0})
        return self.send("POST", f"/v1/tasks/{task}/generate", body.encode())


def round_of(address, clients, seconds, versions, right, changes):
    """Latencies in ms, and what went wrong."""
    latencies, wrong, made = [], [], 0
    until = time.monotonic() + seconds

    def ask(seed):
        client, draw = Client(address), random.Random(seed)
        while time.monotonic() < until:
            task = f"swap-{draw.randrange(TASKS)}"
            began = time.perf_counter()
            status, answer = client.generate(task)
            latencies.append((time.perf_counter() - began) * 1000)
            if status != 200 or right[answer["version"]] != answer["output"]:
                wrong.append((status, answer))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    admin, draw = Client(address), random.Random(0)
    while changes and time.monotonic() < until:
        body = json.dumps({"version": draw.choice(versions)}).encode()
        status, answer = admin.send("PUT", f"/v1/admin/tasks/swap-{draw.randrange(TASKS)}/active", body)
        if status != 200:
            wrong.append((status, answer))
        made += 1
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    return sorted(latencies), wrong, made


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--program", default=str(ROOT / "target/release/softserve"))
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--seconds", type=float, default=15)
    options.add_argument("--rounds", type=int, default=3)
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as home:
        command = [options.program, "serve", f"--prompts={home}/prompts", f"--files={home}/files", "--listen=127.0.0.1:0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            address = next(found.group(1) for line in server.stdout if (found := re.search(r"listen\s+http://(\S+)", line)))
            admin, right = Client(address), {}
            for task in range(TASKS):
                for value in range(VERSIONS):
                    path = f"/v1/admin/tasks/swap-{task}/versions"
                    status, answer = admin.send("POST", path, prompt(value), "application/octet-stream")
                    assert status == 201, answer
                    right[answer["version"]] = admin.generate(f"swap-{task}")[1]["output"]
            versions, failed, ratios = list(right), 0, []
            print(f"{options.clients} clients, {options.seconds:g} s a round; milliseconds of a request of {TOKENS} tokens")
            print("round  changes  requests    p50    p99   p99 ratio")
            for number in range(options.rounds):
                p99 = {}
                for changes in (False, True):
                    found, wrong, made = round_of(address, options.clients, options.seconds, versions, right, changes)
                    p50, p99[changes] = (found[int(len(found) * part)] for part in (0.5, 0.99))
                    failed += len(wrong)
                    ratio = f"{p99[True] / p99[False]:.2f}" if changes else ""
                    print(f"{number + 1:5}  {made:7}  {len(found):8}  {p50:5.1f}  {p99[changes]:5.1f}   {ratio}", flush=True)
                    for case in wrong[:3]:
                        print("  wrong:", case)
                ratios.append(p99[True] / p99[False])
            print(f"p99 with changes / without: {sorted(ratios)[len(ratios) // 2]:.2f} (median); failed or wrong: {failed}")
        finally:
            server.terminate()
            server.wait()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
