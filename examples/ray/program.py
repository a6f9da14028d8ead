"""One `softserve serve` as a child process, and HTTP requests to it that nothing changes on the way."""

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import threading

import h11

READ_BYTES = 1 << 16
# Once the program has ended, this process ends within this time.
END_S = 5


class Broken(Exception):
    """The program ended a connection before its answer."""


class Program:
    """A running `softserve serve`. It ends when this process ends, however that happens."""

    def __init__(self, command, environment, start_timeout_s, stop_timeout_s):
        self._command = command
        self._environment = {**os.environ, **environment}
        self._stop_timeout_s = stop_timeout_s
        self._stopping = False
        self._port = concurrent.futures.Future()
        self._child = None
        # The kernel sends the death signal when the thread that started the child ends, so that thread waits for the child.
        threading.Thread(target=self._run, name="softserve", daemon=True).start()
        self.port = self._port.result(start_timeout_s)

    def _run(self):
        try:
            # `setpriv` sets the death signal and becomes the program: the same process, with the same number.
            self._child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._command, "--listen", "127.0.0.1:0"],
                env=self._environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            self._port.set_exception(error)
            return
        for line in self._child.stdout:
            if line.strip().startswith("listen ") and not self._port.done():
                self._port.set_result(int(line.rstrip().rsplit(":", 1)[1]))
        code = self._child.wait()
        if not self._port.done():
            self._port.set_exception(RuntimeError(f"{self._command[0]} ended with {code}; its log says why"))
        elif not self._stopping:
            # A replica without its program is of no use. Ray notices that the actor is gone, and starts another.
            print(f"{self._command[0]} ended with {code}; this replica ends too", flush=True)
            os._exit(1)

    def stop(self):
        """Lets the program finish its requests, and waits until it has ended."""
        self._stopping = True
        self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    async def request(self, method, target, headers, body=b""):
        """Gives `(status, headers)`, then the pieces of the body as they arrive. Leaving it early cancels the request."""
        writer, connection = None, h11.Connection(h11.CLIENT)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            for event in (h11.Request(method=method, target=target, headers=headers), h11.Data(body), h11.EndOfMessage()):
                writer.write(connection.send(event))
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(READ_BYTES))
                elif isinstance(event, h11.Response):
                    yield event.status_code, [(bytes(name).lower(), bytes(value)) for name, value in event.headers]
                elif isinstance(event, h11.Data):
                    yield bytes(event.data)
                elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                    return
        except (OSError, h11.RemoteProtocolError) as error:
            # If the program has ended, this process ends before the time is over, and whoever asked is told by Ray. So no
            # request gets an answer from a replica that is ending, and is sent to the same one again.
            await asyncio.sleep(END_S)
            raise Broken(str(error)) from error
        finally:
            if writer:
                writer.close()

    async def status(self, path):
        """The status that the program answers a GET with."""
        async with contextlib.aclosing(self.request("GET", path, [("host", "localhost"), ("connection", "close")])) as answer:
            status, _ = await anext(answer)
            return status
