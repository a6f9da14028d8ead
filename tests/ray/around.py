"""What the checks of run.py ask and watch: a server by its port, the processes behind it, a load, an S3 server with the prompts."""

import contextlib
import http.client
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

API_KEY, ADMIN_KEY = "the-api-key", "the-admin-key"
TASKS = [f"topic-{number}" for number in range(24)]
INPUT = "The soup in Rome was delicious."
REPLICA = "x-softserve-replica"
HOST = "localhost"
CLIENTS = 12
LONG_S = 60


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(process):
    """Whether a process is gone, or only its exit code is left of it."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(holds, seconds=LONG_S):
    """The seconds until this held; None if it did not."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if holds():
            return time.monotonic() - began
        time.sleep(0.01)
    return None


class Server:
    """A port to ask, through Ray or not, and where the prompts behind it are."""

    def __init__(self, port, prompts):
        self.port, self.prompts = port, prompts

    @contextlib.contextmanager
    def open(self, method, path, body=None, key=API_KEY, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG_S)
        try:
            sent = {"host": HOST, **dict(headers)}
            sent |= {"authorization": f"Bearer {key}"} if key else {}
            if body is not None and not isinstance(body, bytes):
                body, sent["content-type"] = json.dumps(body).encode(), "application/json"
            with contextlib.suppress(BrokenPipeError):  # a body that is too large is refused before its end
                connection.request(method, path, body, sent)
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(self, *args, **kwargs):
        with self.open(*args, **kwargs) as answer:
            return answer.status, [(name.lower(), value) for name, value in answer.getheaders()], answer.read()

    def generate(self, task, **more):
        status, headers, body = self.ask("POST", f"/v1/tasks/{task}/generate", {"input": INPUT, **more})
        return status, dict(headers).get(REPLICA), body

    def of_each_replica(self, count, method, path, body=None, seconds=LONG_S):
        """The answer of each replica to a request that any may answer. Asks until `count` have answered."""
        answers, end = {}, time.monotonic() + seconds
        while len(answers) < count and time.monotonic() < end:
            status, headers, answer = self.ask(method, path, body)
            if status == 200:
                answers[dict(headers)[REPLICA]] = answer
            time.sleep(0.005)
        return answers

    def programs(self):
        """The replicas' programs that run now: the replica's name to its program's process and its actor's."""
        found = {}
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().decode().split("\0")
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            files = next((word for word in words if word.startswith("--files=")), "")
            name = pathlib.Path(files).name.split("-")
            if words[1:2] == ["serve"] and f"--prompts={self.prompts}" in words and name[0] == "softserve":
                found[name[1]] = (int(process.name), parent)
        return found


class Load:
    """Clients that ask one task after another and never ask again. Half of them have their answers streamed."""

    def __init__(self, server, clients=CLIENTS, tokens=100):
        self.server, self.tokens = server, tokens
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.running = {}  # the number of a request to its task and whether it is streamed
        self.failures = {}  # the same to what went wrong
        self.answered = 0
        self.home = {task: server.generate(task, max_tokens=1)[1] for task in TASKS}  # the replica that last answered a task
        self.next = 0
        self.threads = [threading.Thread(target=self.client, args=(number,)) for number in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def client(self, number):
        streams = number % 2 == 1
        while not self.stopping.is_set():
            with self.lock:
                self.next += 1
                request, task = self.next, TASKS[self.next % len(TASKS)]
                self.running[request] = task, streams
            try:
                status, replica, body = self.server.generate(task, max_tokens=self.tokens, ignore_eos=True, stream=streams)
                wrong = None if status == 200 and (not streams or body.endswith(b"data: [DONE]\n\n")) else f"{status} {body[-120:]}"
            except (OSError, http.client.HTTPException) as error:
                replica, wrong = None, repr(error)
            with self.lock:
                del self.running[request]
                if wrong:
                    self.failures[request] = wrong
                else:
                    self.answered += 1
                    self.home[task] = replica


def bucket(folder):
    """A bucket of a server of moto's with the prompts in it; sets what reads S3 by its environment."""
    import boto3

    port = free_port()
    moto = [str(pathlib.Path(sys.executable).parent / "moto_server"), "-p", str(port)]
    server = subprocess.Popen(moto, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    os.environ |= {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}

    def listens():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True

    if wait_for(listens) is None:
        sys.exit("moto_server does not answer")
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="prompts")
    for file in filter(pathlib.Path.is_file, folder.rglob("*")):
        s3.upload_file(str(file), "prompts", f"{folder.parent.name}/{file.relative_to(folder)}")
    return server, f"s3://prompts/{folder.parent.name}"
