"""Softserve as a Ray Serve application: replicas that scale with the load, and requests of one task on one replica.

    serve run --app-dir examples/ray app:build prompts=s3://bucket/prefix max_replicas=8

Ray's proxy gives every request to the gate. The gate finds the task in it and names it as the session of its call, so that
Ray's consistent hashing gives all requests of a task to the same replica, or to the next one while that has no place left.
Each replica is an actor with one `softserve serve` as its child process.
"""

import asyncio
import contextlib
import json
import os
import re
import secrets
import tempfile
from urllib.parse import unquote

import pydantic
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from starlette.applications import Starlette
from starlette.routing import Mount

from program import Broken, Program

# Connections end at each hop, so what describes them does. Ray's proxy writes a date and the request's id itself.
NOT_SENT_ON = {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"expect", b"upgrade"}
NOT_SENT_BACK = {b"connection", b"keep-alive", b"transfer-encoding", b"date", b"x-request-id"}
KEYS = ("api_key", "api_key_file", "admin_key", "admin_key_file", "keys")
# Requests under these paths may change something. Any other is sent once more if its replica ends before the answer begins. Once:
# the request may be the reason.
CHANGES = ("/v1/admin", "/v1/files", "/v1/batches")
ATTEMPTS = 2


class Settings(pydantic.BaseModel, extra="forbid"):
    """What `serve run app:build NAME=VALUE` takes. Keys belong in files, or in the environment that Ray starts in."""

    program: str = "softserve"
    model: str | None = None
    prompts: str | None = None
    threads: int = 1
    gpus: float = 0
    options: list[str] = []  # more options of `softserve serve`, such as --dtype=bf16
    environment: dict[str, str] = {}
    api_key_file: str | None = None
    admin_key_file: str | None = None
    keys: str | None = None
    open_admin: bool = False  # without any key, admin routes are closed unless this is set

    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing_requests: float = 16  # of a replica, on average; more start another one
    max_ongoing_requests: int = 64  # of a replica; further ones go to the next
    upscale_delay_s: float = 30
    downscale_delay_s: float = 600
    look_back_period_s: float = 30  # how much of the past the average is of
    gates: int = 1
    max_body: int = 65 << 20
    start_timeout_s: float = 600
    drain_s: float = 30
    health_check_period_s: float = 5

    def has_keys(self):
        return any(getattr(self, key, None) or os.environ.get(f"SOFTSERVE_{key.upper()}") for key in KEYS)

    def command(self, files):
        given = {"model": self.model, "prompts": self.prompts, "threads": self.threads, "files": files}
        given |= {"drain-timeout": f"{self.drain_s:g}s", "keys": self.keys}
        given |= {"api-key-file": self.api_key_file, "admin-key-file": self.admin_key_file}
        return [self.program, "serve", *(f"--{name}={value}" for name, value in given.items() if value), *self.options]


@serve.deployment
class Softserve:
    """A replica: one program."""

    def __init__(self, settings):
        self.name = serve.get_replica_context().replica_id.unique_id
        self.files = tempfile.TemporaryDirectory(prefix=f"softserve-{self.name}-")
        environment = dict(settings.environment)
        if not settings.has_keys() and not settings.open_admin:
            # The program takes what comes from its own machine for its owner's, but the proxy's callers may be anybody.
            # So there is a key, which nobody knows.
            environment["SOFTSERVE_ADMIN_KEY"] = secrets.token_hex()
        command = settings.command(self.files.name)
        self.program = Program(command, environment, settings.start_timeout_s, settings.drain_s + 5)

    async def answer(self, method, target, headers, body):
        async with contextlib.aclosing(self.program.request(method, target, headers, body)) as answer:
            status, headers = await anext(answer)
            yield status, [*headers, (b"x-softserve-replica", self.name.encode())]
            async for piece in answer:
                yield piece

    async def check_health(self):
        status = await self.program.status("/health/ready")
        if status != 200:
            raise RuntimeError(f"/health/ready answers {status}")

    def __del__(self):
        """Ray calls this when the replica has no requests left and is to go."""
        self.program.stop()
        self.files.cleanup()


@serve.deployment
@serve.ingress()
class Gate:
    """What the proxy gives requests to."""

    def __init__(self, replicas, max_body):
        self.replicas = replicas.options(stream=True)
        self.max_body = max_body

    def __serve_build_asgi_app__(self):
        return Starlette(routes=[Mount("/", app=self.pass_on)])

    async def pass_on(self, scope, receive, send):
        """One request, from its first byte to the last byte of its answer."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        body = await self.body(receive)
        if body is None:
            return await problem(send, 413, "too_large", f"a body has at most {self.max_body} bytes here")
        started = False
        try:
            async for part in self.answer(scope, body):
                if started:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                else:
                    status, headers = part
                    headers = [header for header in headers if header[0] not in NOT_SENT_BACK]
                    await send({"type": "http.response.start", "status": status, "headers": headers})
                    started = True
            await send({"type": "http.response.body", "body": b""})
        except (RayActorError, Broken):
            if started:
                raise  # the proxy closes the connection, so that the client sees an answer that is not whole
            await problem(send, 503, "replica_lost", "the replica with this request ended; send it again")

    async def body(self, receive):
        pieces, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            more = message.get("more_body", False)
            if size > self.max_body:
                return None
        return b"".join(pieces)

    async def answer(self, scope, body):
        """What the task's replica answers, piece by piece."""
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        headers = [header for header in scope["headers"] if header[0] not in NOT_SENT_ON]
        headers += [(b"connection", b"close")]
        if body or scope["method"] not in ("GET", "HEAD", "DELETE", "OPTIONS"):
            headers += [(b"content-length", str(len(body)).encode())]
        replicas = self.replicas.options(session_id=task_of(scope["path"], body))
        attempts = 1 if scope["path"].startswith(CHANGES) else ATTEMPTS
        started = False
        while not started:
            attempts -= 1
            answer = replicas.answer.remote(scope["method"], target, headers, body)
            try:
                async for part in answer:
                    started = True
                    yield part
            except RayActorError:
                if started or not attempts:
                    raise
            finally:
                answer.cancel()


def task_of(path, body):
    """The task that a request is for, without a version; empty where none or several are named, which any replica answers."""
    if named := re.match(r"/v1/(?:admin/)?tasks/([^/]+)", path):
        return unquote(named[1]).partition("@")[0]
    if re.match(r"/v1/(files|batches)\b", path):
        return path.split("/")[2]
    try:
        asked = json.loads(body)
        return str(asked.get("model") or asked.get("task") or "").partition("@")[0]
    except (ValueError, AttributeError):
        return ""


async def problem(send, status, code, detail):
    body = json.dumps({"type": "about:blank", "title": code, "status": status, "code": code, "detail": detail}).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", b"1")] if status == 503 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def build(settings: Settings) -> serve.Application:
    replicas = Softserve.options(
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
            "look_back_period_s": settings.look_back_period_s,
        },
        max_ongoing_requests=settings.max_ongoing_requests,
        request_router_config=RequestRouterConfig(
            request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
        ),
        health_check_period_s=settings.health_check_period_s,
        graceful_shutdown_timeout_s=2 * settings.drain_s + 10,
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": settings.gpus},
    ).bind(settings)
    gate = Gate.options(num_replicas=settings.gates, max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0.1})
    return gate.bind(replicas, settings.max_body)
