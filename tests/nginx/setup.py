"""Softserve servers and nginx with docker/nginx/softserve.conf on this machine, for run.py."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONF = ROOT / "docker/nginx/softserve.conf"
# The servers and nginx share these processors, and whoever asks takes the others, if there are any.
PROCESSORS = sorted(os.sched_getaffinity(0))
SERVING = PROCESSORS[:2]
ASKING = PROCESSORS[2:] or PROCESSORS
# Tasks of the demo's prompts, under names of their own, so that each server has some.
TASKS = [f"task-{i:02}" for i in range(24)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def processor_seconds(processes):
    """What these processes and their children have computed so far, in seconds of one processor."""
    ticks, wanted = 0, {process.pid for process in processes}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the name in parentheses: state, parent, … and as the 12th and 13th user and system time.
            fields = stat.read_text().rpartition(")")[2].split()
            if int(stat.parent.name) in wanted or int(fields[1]) in wanted:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def pinned(command):
    return ["taskset", "-c", ",".join(map(str, SERVING)), *command]


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        assert self.status < 300, f"{self.status}: {self.body[:300]}"
        return json.loads(self.body)


def ask(port, method, path, body=None, headers=None, timeout=60, connection=None):
    """One request, on a connection of its own if none is given."""
    own = connection is None
    connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        if isinstance(body, dict):
            body, headers = json.dumps(body), {"content-type": "application/json", **(headers or {})}
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        if own:
            connection.close()


def generate(port, task, tokens=4, **more):
    body = {"input": "The soup was cold.", "max_tokens": tokens, "ignore_eos": True, **more}
    return ask(port, "POST", f"/v1/tasks/{task}/generate", body)


class Server:
    """One program with the demo model and the shared folder of prompts."""

    def __init__(self, program, home, name, threads):
        self.program, self.home, self.name, self.threads = program, home, name, threads
        self.port = free_port()
        self.start()

    def start(self):
        command = [self.program, "serve", "--prompts", self.home / "prompts", f"--files={self.home / self.name}"]
        command += [f"--listen=127.0.0.1:{self.port}", f"--threads={self.threads}", "--kv-cache=64MiB", "--log-level=warn"]
        environment = {"HOME": str(self.home), "XDG_DATA_HOME": str(self.home), "PATH": os.environ["PATH"]}
        with (self.home / f"{self.name}.log").open("a") as log:
            self.process = subprocess.Popen(pinned(command), env=environment, stdout=log, stderr=log)
        wait_for(self.is_ready, 60, f"{self.name} is ready")

    def is_ready(self):
        assert self.process.poll() is None, (self.home / f"{self.name}.log").read_text()
        with contextlib.suppress(OSError):
            return ask(self.port, "GET", "/health/ready").status == 200

    def kill(self):
        self.process.kill()
        self.process.wait()

    def answered(self):
        """How many requests of each task it has taken since it started."""
        text = ask(self.port, "GET", "/metrics").body.decode()
        found = re.findall(r'^softserve_request_input_tokens_count\{task="([^"]*)"\} (\d+)', text, re.M)
        return {task: int(count) for task, count in found}

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)


class Nginx:
    """nginx with the configuration as it is, but for the ports."""

    def __init__(self, home, servers):
        self.port = free_port()
        text = CONF.read_text()
        for server, shipped in zip(servers, [8081, 8082, 8083], strict=True):
            assert f"server 127.0.0.1:{shipped}" in text
            text = text.replace(f"server 127.0.0.1:{shipped}", f"server 127.0.0.1:{server.port}")
        text = text.replace("listen 8080;", f"listen 127.0.0.1:{self.port};")
        self.folder = home / f"nginx-{self.port}"
        self.folder.mkdir()
        (self.folder / "softserve.conf").write_text(text)
        temporary = "".join(
            f"{kind}_temp_path {self.folder}/{kind};\n" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        )
        main = f"daemon off;\nworker_processes 2;\npid {self.folder}/pid;\nerror_log {self.folder}/error.log;\n"
        main += "user root;\n" if os.getuid() == 0 else ""
        main += f"events {{}}\nhttp {{\naccess_log off;\n{temporary}include {self.folder}/softserve.conf;\n}}\n"
        (self.folder / "nginx.conf").write_text(main)
        command = ["nginx", "-p", self.folder, "-e", self.folder / "error.log", "-c", self.folder / "nginx.conf"]
        subprocess.run([*command, "-t", "-q"], check=True)
        self.process = subprocess.Popen(pinned(command))
        wait_for(self.is_there, 10, "nginx answers")

    def is_there(self):
        with contextlib.suppress(OSError):
            return ask(self.port, "GET", "/health/live").status == 200

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def make_tasks(home):
    prompts = sorted(folder for folder in (ROOT / "prompts").iterdir() if folder.is_dir())
    for i, task in enumerate(TASKS):
        shutil.copytree(prompts[i % len(prompts)], home / "prompts" / task)


class Load:
    """Clients that send one request after another, of a task at random, until they are stopped. Each request is noted:
    (task, began, ended, what went wrong)."""

    def __init__(self, port, clients=12, tokens=24):
        self.port, self.tokens, self.over = port, tokens, False
        self.pool = concurrent.futures.ThreadPoolExecutor(clients)
        self.clients = [self.pool.submit(self.client, i) for i in range(clients)]

    def client(self, number):
        noted = []
        while not self.over:
            task = TASKS[(number * 7 + len(noted) * 5) % len(TASKS)]
            began, wrong = time.monotonic(), None
            try:
                answer = generate(self.port, task, self.tokens)
                if answer.status != 200:
                    wrong = f"{answer.status}"
                elif answer.json()["usage"]["completion_tokens"] != self.tokens:
                    wrong = "a wrong answer"
            except (OSError, http.client.HTTPException) as fault:
                wrong = repr(fault)
            noted.append((task, began, time.monotonic(), wrong))
        return noted

    def stop(self):
        self.over = True
        noted = [request for client in self.clients for request in client.result(120)]
        self.pool.shutdown()
        return noted


def bench(program, port, requests, concurrency):
    """Generated tokens a second of `softserve bench` on what listens there."""
    url = f"http://127.0.0.1:{port}"
    command = [program, "bench", "--url", url, f"--requests={requests}", f"--concurrency={concurrency}"]
    command += ["--input-tokens=16-64", "--output-tokens=32", "--json=-"]
    command = ["taskset", "-c", ",".join(map(str, ASKING)), *command]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout)

