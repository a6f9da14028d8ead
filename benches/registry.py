"""The registry with many tasks: how long the server takes to start, what it takes in memory, and what a request costs to a task
whose prompt is in memory or not. Needs Python 3 and Linux, and nothing else.

    cargo build --release
    python3 benches/registry.py [--program target/release/softserve] [--tasks 1000,10000,100000] [--dir FOLDER]

Writes tasks of the demo's prompt below a temporary folder (the tensors' file is one file with many names), starts the program
on them twice, measures the second start, and prints a table. A request asks for one token, over a connection that is kept.
"""

import argparse
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import statistics
import struct
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A file system allows so many names of one file, and less than it does.
LINKS_PER_FILE = 10_000
# Tasks that are asked cold, and then warm.
ASKED = 200


def version_id(files):
    """The id of a version with these files: the beginning of the SHA-256 of their names and contents."""
    digest = hashlib.sha256()
    for name, content in files:
        for part in (name.encode(), content):
            digest.update(struct.pack("<Q", len(part)) + part)
    return digest.hexdigest()[:12]


def write_tasks(root, count):
    source = ROOT / "prompts" / "sentiment"
    config, weights = ((source / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    task = json.loads((source / "task.json").read_text())
    shared = root / ".shared"
    shared.mkdir()
    for i in range(count):
        # What makes each version another one.
        task["description"] = f"task {i}"
        own = json.dumps(task).encode()
        files = [("adapter_config.json", config), ("adapter_model.safetensors", weights), ("task.json", own)]
        version = version_id(files)
        folder = root / name_of(i) / "versions" / version
        folder.mkdir(parents=True)
        for name, content in files[:2]:
            original = shared / f"{i // LINKS_PER_FILE}-{name}"
            if not original.exists():
                original.write_bytes(content)
            os.link(original, folder / name)
        (folder / "task.json").write_bytes(own)
        (root / name_of(i) / "active.json").write_text(json.dumps({"version": version, "generation": 1}))


def name_of(i):
    return f"task-{i:06}"


class Server:
    def __init__(self, program, prompts):
        options = ["--listen", "127.0.0.1:0", "--kv-cache", "32MiB", "--log-level", "error", "--prompts", str(prompts)]
        self.process = subprocess.Popen([program, "serve", *options], stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if found := re.match(r"\s*listen\s+http://(\S+)", line):
                self.connection = http.client.HTTPConnection(found[1])
                return
        raise SystemExit("the program did not start")

    def generate(self, task, status=200):
        body = json.dumps({"input": "good", "max_tokens": 1})
        began = time.perf_counter()
        self.connection.request("POST", f"/v1/tasks/{task}/generate", body, {"content-type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        seconds = time.perf_counter() - began
        if answer.status != status:
            raise SystemExit(f"{task}: {answer.status}: {text.decode()}")
        return seconds

    def memory(self):
        """Resident memory in megabytes."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024 / 1e6

    def wait_until_idle(self):
        """Waits until the server's processor time stands still: it has read all that it reads ahead. Returns the seconds."""
        began = time.monotonic()
        while True:
            before = self.ticks()
            time.sleep(1)
            if self.ticks() - before <= 2:
                return time.monotonic() - began

    def ticks(self):
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(stat[11]) + int(stat[12])

    def stop(self):
        self.process.terminate()
        self.process.wait()


def measure(program, prompts, count):
    began = time.perf_counter()
    server = Server(program, prompts)
    server.generate(name_of(count - 1))
    start, memory = time.perf_counter() - began, server.memory()
    # From the end: the server reads ahead from the beginning.
    asked = [name_of(count - 2 - i * max(1, count // 2 // ASKED)) for i in range(ASKED)]
    cold = statistics.median([server.generate(task) for task in asked])
    warm = statistics.median([server.generate(task) for task in asked])
    missing = statistics.median([server.generate("no-such-task", 404) for _ in asked])
    ahead = server.wait_until_idle()
    idle = statistics.median([server.generate(task) for task in asked])
    after = server.memory()
    server.stop()
    ms = lambda seconds: f"{1e3 * seconds:.2f} ms"
    print(
        f"| {count:,} | {start:.2f} s | {memory:.0f} MB | {ms(cold)} | {ms(warm)} | {ms(missing)} | {ahead:.0f} s | "
        f"{after:.0f} MB | {ms(idle)} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(ROOT / "target" / "release" / "softserve"))
    parser.add_argument("--tasks", default="1000,10000,100000", help="numbers of tasks, separated by commas")
    parser.add_argument("--dir", help="where the folders of tasks are written; they are removed afterwards")
    args = parser.parse_args()
    print("| tasks | start to first answer | memory then | cold | warm | no such task | reading ahead | memory after | warm then |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for count in map(int, args.tasks.split(",")):
        prompts = pathlib.Path(tempfile.mkdtemp(prefix="softserve-registry-", dir=args.dir))
        try:
            write_tasks(prompts, count)
            # The first start has the folders read from the disk.
            first = Server(args.program, prompts)
            first.generate(name_of(0))
            first.stop()
            measure(args.program, prompts, count)
        finally:
            shutil.rmtree(prompts)


if __name__ == "__main__":
    main()
