"""softserve, the program itself, asked over HTTP."""

import asyncio
import json
import pathlib
import shutil
import signal
import subprocess
import time


class Server:
    """A server of one dtype. It is stopped (SIGSTOP) whenever it is not its turn."""

    def __init__(self, program, setting, dtype, folder, options=()):
        prompts = folder / f"prompts-{dtype}"
        for path in setting.prompts:
            shutil.copytree(path, prompts / path.name)
        self.tasks = [path.name for path in setting.prompts]
        self.output_tokens = setting.output_tokens
        command = [
            program, "serve", "--model", setting.model, "--prompts", prompts, "--dtype", dtype, "--threads",
            setting.threads, "--listen", "127.0.0.1:0", "--log-level", "warn", "--log-format", "text",
            # Random weights repeat themselves: guesses of what is repeated would flatter.
            "--draft-tokens", "0", *options,
        ]
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            key, _, value = line.strip().partition(" ")
            if key == "listen":
                self.host, _, self.port = value.strip().removeprefix("http://").rpartition(":")
                break
        else:
            raise SystemExit("the server did not start; its error is above")

    def __enter__(self):
        self.process.send_signal(signal.SIGCONT)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGSTOP)

    def close(self):
        self.process.kill()
        self.process.wait()

    def memory(self):
        """Bytes it held at most."""
        try:
            status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def together(self, requests):
        """Every request at once, each on a connection of its own: seconds, and the tokens of each answer."""
        async def run():
            return await asyncio.gather(*(self._ask(r, self.output_tokens) for r in requests))
        begun = time.perf_counter()
        answers = asyncio.run(run())
        return time.perf_counter() - begun, [[int(word[1:]) for word in a["output"].split()] for a in answers]

    def stream(self, request, new_tokens):
        """One request: seconds from its sending to each of its tokens."""
        return asyncio.run(self._stream(request, new_tokens))

    async def _send(self, request, new_tokens, stream):
        reader, writer = await asyncio.open_connection(self.host, self.port)
        body = json.dumps({
            "input": request.text(), "max_tokens": new_tokens, "ignore_eos": True, "stream": stream}).encode()
        head = (f"POST /v1/tasks/{self.tasks[request.task]}/generate HTTP/1.1\r\nhost: {self.host}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n")
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"softserve answered {status.decode()}{(await reader.read()).decode()}")
        return reader, writer

    async def _ask(self, request, new_tokens):
        reader, writer = await self._send(request, new_tokens, False)
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return json.loads(body)

    async def _stream(self, request, new_tokens):
        begun = time.perf_counter()
        reader, writer = await self._send(request, new_tokens, True)
        times = []
        async for line in reader:
            # The last event has no token.
            if line.startswith(b"data: {") and b"finish_reason" not in line:
                times.append(time.perf_counter() - begun)
        writer.close()
        return times
