"""Runs examples/ray for real, with three replicas on one machine, and holds it to what its README says. See .ci/ray.

Keys are set. Another `softserve serve`, started by hand on the same
prompts, is what answers are compared with. Every check prints its figure; the exit code is 1 if one fails.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile

import ray
from ray import serve

from around import ADMIN_KEY, API_KEY, CLIENTS, INPUT, REPLICA, TASKS, Load, Server, bucket, ended, free_port, wait_for

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "ray"
# What differs from hop to hop, or says when and by whom an answer was given.
OF_THE_HOP = {"date", "server", "connection", "transfer-encoding", REPLICA}
# An answer's own number, and what the cache happens to hold.
OF_THE_MOMENT = re.compile(rb'"id":"[0-9a-f-]{36}"|"cached_tokens":[0-9]+')
STEADY_S = 2

failed = []


def check(holds, what):
    print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)
    if not holds:
        failed.append(what)


def seconds(time_taken):
    return "no time that was waited" if time_taken is None else f"{time_taken:.2f} s"


def unchanged(server, alone):
    """Statuses, headers and bodies are those that the program gives without Ray."""
    classify = {"inputs": [INPUT, "The train was late."]}
    cases = [
        ("200", "GET", "/v1/tasks", None, API_KEY),
        ("200", "GET", "/", None, None),
        ("200", "HEAD", "/", None, None),
        ("303", "HEAD", "/docs", None, None),
        ("200", "POST", "/v1/tasks/topic/classify", classify, API_KEY),
        ("200", "POST", "/v1/tasks/to%70ic/classify?a=b%20c", classify, API_KEY),
        ("200", "GET", "/v1/admin/tasks/topic/versions", None, ADMIN_KEY),
        ("400", "POST", "/v1/tasks/topic/generate", b"{", API_KEY),
        ("401", "POST", "/v1/tasks/topic/generate", {"input": INPUT}, None),
        ("401", "POST", "/v1/completions", {"model": "topic", "prompt": INPUT}, None),
        ("403", "GET", "/v1/admin/tasks", None, API_KEY),
        ("404", "POST", "/v1/tasks/none/generate", {"input": INPUT}, API_KEY),
        ("404", "POST", "/v1/completions", {"model": "none", "prompt": INPUT}, API_KEY),
        ("404", "GET", "/nowhere", None, API_KEY),
        ("405", "DELETE", "/v1/tasks/topic/generate", None, API_KEY),
        ("413", "POST", "/v1/tasks/topic/generate", b" " * (2 << 20), API_KEY),
    ]
    differ, statuses = [], collections.Counter()
    for expected, method, path, body, key in cases:
        headers = {"x-request-id": f"case-{len(statuses)}", "content-type": "application/json"}
        both = []
        for each in (server, alone):
            status, got, answer = each.ask(method, path, body, key=key, headers=headers)
            both.append((status, sorted(header for header in got if header[0] not in OF_THE_HOP), OF_THE_MOMENT.sub(b"", answer)))
        statuses[both[0][0]] += 1
        if both[0] != both[1] or str(both[0][0]) != expected:
            differ.append(f"{method} {path}: {both}"[:1500])
    seen = ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))
    check(not differ, f"answers equal the program's own, byte for byte: {len(cases) - len(differ)} of {len(cases)} ({seen})")
    print("\n".join(differ), end="\n" if differ else "")


def arrivals(server, tokens):
    """When each piece of a streamed answer came, in seconds from the request."""
    began, times = time.monotonic(), []
    asked = {"input": INPUT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with server.open("POST", "/v1/tasks/story/generate", asked) as answer:
        while answer.read1(1 << 16):
            times.append(time.monotonic() - began)
    return times


def streams(server, alone):
    tokens = 200
    times, direct = arrivals(server, tokens), arrivals(alone, tokens)
    check(
        len(times) > len(direct) / 2 > tokens / 4 and times[0] < times[-1] / 4,
        f"a streamed answer of {tokens} tokens comes in {len(times)} pieces ({len(direct)} without Ray), "
        f"the first after {times[0] * 1000:.0f} ms, the last after {times[-1] * 1000:.0f} ms",
    )


def number(metrics, name):
    """The sum of a metric over those of its labels that start so."""
    return sum(float(line.split()[-1]) for line in metrics.decode().splitlines() if line.startswith(name))


def cancels(server):
    """A client that leaves ends the work for it."""
    name, choices, tokens = "softserve_engine_generated_tokens_total", 16, 400

    def in_all(metric):
        return sum(number(answer, metric) for answer in server.of_each_replica(3, "GET", "/metrics").values())

    before = in_all(name)
    asked = {"input": INPUT, "max_tokens": tokens, "n": choices, "temperature": 1, "ignore_eos": True, "stream": True}
    with server.open("POST", "/v1/tasks/story/generate", asked) as answer:
        answer.read1(100)
    wait_for(lambda: in_all("softserve_engine_running_requests") == 0, 10)
    made = in_all(name) - before
    check(
        0 < made < choices * tokens / 2,
        f"a client that leaves at once costs {made:.0f} of {choices * tokens} tokens",
    )


def routes(server):
    """Requests of one task go to one replica, and the tasks to all of them."""
    route = 'softserve_http_requests_total{method="POST",route="/v1/tasks/{task}/generate"'
    before = server.of_each_replica(3, "GET", "/metrics")
    homes, each = collections.defaultdict(collections.Counter), 12

    def client():
        for task in TASKS:
            homes[task][server.generate(task, max_tokens=4)[1]] += 1

    threads = [threading.Thread(target=client) for _ in range(each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = sum(homes.values(), collections.Counter())
    alone = sum(len(home) == 1 for home in homes.values())
    spread = collections.Counter(next(iter(home)) for home in homes.values())
    check(alone == len(TASKS), f"{alone} of {len(TASKS)} tasks have all of their {each} requests on one replica")
    check(len(spread) == 3, f"the tasks are spread over three replicas: {sorted(spread.values())}")
    after = server.of_each_replica(3, "GET", "/metrics")
    counted = {name: number(after[name], route) - number(before[name], route) for name in after}
    check(counted == asked, f"the programs' own counters say the same: {sorted(int(n) for n in counted.values())} requests")
    in_body = 0
    for task in TASKS:
        _, headers, _ = server.ask("POST", "/v1/completions", {"model": task, "prompt": INPUT, "max_tokens": 1})
        in_body += dict(headers)[REPLICA] in homes[task]
    check(in_body == len(TASKS), f"{in_body} of {len(TASKS)} tasks that the body names are answered where the path's are")


def uploads(server, poll_s):
    """A prompt that one replica took answers on all three soon."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in ("adapter_config.json", "adapter_model.safetensors", "task.json"):
            archive.write(ROOT / "prompts" / "topic" / file, file)
    sent = {"content-type": "application/zip"}
    status, headers, body = server.ask("POST", "/v1/admin/tasks/new/versions", packed.getvalue(), key=ADMIN_KEY, headers=sent)
    began = time.monotonic()
    check(status == 201, f"an upload of {len(packed.getvalue())} bytes answers {status} {'' if status == 201 else body}")
    at_home = server.generate("new")
    check(at_home[0] == 200, f"a request for it right after the upload answers {at_home[0]}")
    asked, seen = {"requests": [{"task": "new", "input": INPUT}]}, {}
    while len(seen) < 3 and time.monotonic() - began < 3 * poll_s:
        _, headers, body = server.ask("POST", "/v1/generate", asked)
        if json.loads(body)["results"][0].get("output") == "food":
            seen.setdefault(dict(headers)[REPLICA], time.monotonic() - began)
        time.sleep(0.01)
    times = sorted(seen.values())
    check(
        len(seen) == 3 and times[-1] <= 2 * poll_s,
        f"it answers on {len(seen)} replicas after {', '.join(f'{at:.2f}' for at in times)} s (allowed: {2 * poll_s:g} s)",
    )


def survives(server, what, pick):
    """`kill -9` costs at most the streams that the replica held, and Ray brings a replica back."""
    with Load(server) as load:
        time.sleep(STEADY_S)
        before, victim, held = server.programs(), None, {}
        end = time.monotonic() + 10
        while len(held) < 2 and time.monotonic() < end:
            with load.lock:
                at = collections.Counter(load.home.get(task) for task, _ in load.running.values())
                victim = max(before, key=lambda name: at[name])
                held = {request: streams for request, (task, streams) in load.running.items() if load.home.get(task) == victim}
                if len(held) >= 2:
                    # A process takes a moment to die, in which its port is still open: no client sends anything in it.
                    os.kill(pick(*before[victim]), signal.SIGKILL)
                    wait_for(lambda: ended(pick(*before[victim])), 5)
            time.sleep(0.002)
        answered = load.answered
        gone = wait_for(lambda: all(map(ended, before[victim])), 10)
        back = wait_for(lambda: len(set(server.programs()) - {victim}) == 3)
        back = back if len(server.of_each_replica(3, "GET", "/v1/tasks")) == 3 else None
        time.sleep(STEADY_S)
        answered = load.answered - answered
    for files in pathlib.Path(tempfile.gettempdir()).glob(f"softserve-{victim}-*"):
        shutil.rmtree(files)  # nobody was left to do it
    beyond = {request: wrong for request, wrong in load.failures.items() if not held.get(request)}
    check(
        held and not beyond,
        f"{what} is killed: of {len(held)} requests that it held, {sum(held.values())} of them streams, {len(load.failures)} failed, "
        f"{len(beyond)} that are no streams or that it did not hold; {answered} others were answered meanwhile",
    )
    print("\n".join(map(str, beyond.items())), end="\n" if beyond else "")
    check(back is not None, f"three replicas answer again after {seconds(back)}")
    check(gone is not None and gone < 1.5, f"neither its program nor its actor is left after {seconds(gone)}")


def dies_with_its_parent(server, program, scratch):
    """The kernel ends a program whose parent was killed, with nobody else there who would."""
    start = "import program, sys, time; program.Program(sys.argv[1:], {}, 60, 10); time.sleep(600)"
    command = [program, "serve", f"--prompts={server.prompts}", f"--files={scratch}/softserve-alone-"]
    parent = subprocess.Popen([sys.executable, "-c", start, *command], cwd=EXAMPLE, stderr=subprocess.DEVNULL)
    started = wait_for(lambda: "alone" in server.programs())
    pid = server.programs().get("alone", (0, 0))[0]
    parent.kill()
    parent.wait()
    gone = wait_for(lambda: ended(pid), 5)
    check(started is not None and gone is not None, f"without Ray too a program ends with its parent, {seconds(gone)} after it")
    if gone is None:
        os.kill(pid, signal.SIGKILL)


def scales(server, apply):
    """Load makes replicas, and idleness takes them away again; no request notices."""
    old = set(server.programs())
    with Load(server, clients=2) as load:
        apply(min_replicas=1, max_replicas=3)
        down = wait_for(lambda: len(server.programs()) == 1 and not old & set(server.programs()))
    kept, wrong = old & set(server.programs()), list(load.failures.values())
    check(
        not wrong and not kept,
        f"new settings replace {len(old - kept)} of {len(old)} replicas under load: "
        f"{load.answered} requests, {len(wrong)} failures {wrong[:2]}",
    )
    check(down is not None, f"two clients, fewer than a replica is meant for, leave one replica after {seconds(down)}")
    with Load(server) as load:
        up = wait_for(lambda: len(server.programs()) == 3)
        answering = len(server.of_each_replica(3, "GET", "/v1/tasks"))
    check(up is not None and answering == 3, f"{CLIENTS} clients make three of one replica in {seconds(up)}; {answering} answer")
    with Load(server, clients=1, tokens=20) as light:
        down = wait_for(lambda: len(server.programs()) == 1)
        time.sleep(STEADY_S)
    check(down is not None, f"with one client there is one replica again after {seconds(down)}")
    wrong = list((load.failures | light.failures).values())
    check(not wrong, f"scaling up and down: {load.answered + light.answered} requests, {len(wrong)} failures {wrong[:2]}")


def closed_without_keys(server, apply):
    """Who reaches the proxy is not the owner of the machine, so without keys nobody gets to the admin routes."""
    apply(min_replicas=1, max_replicas=1, api_key_file=None, admin_key_file=None)
    asked = ("POST", "/v1/tasks/topic/generate", {"input": INPUT}, None)
    open_to_all = wait_for(lambda: server.ask(*asked)[0] == 200)
    for key in (None, ADMIN_KEY):
        status, _, _ = server.ask("DELETE", "/v1/admin/tasks/new", key=key)
        check(open_to_all is not None and status == 401, f"without keys a DELETE {'with' if key else 'without'} a key answers {status}")


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("program")
    options.add_argument("--prompts", choices=["bucket", "folder"], default="bucket")
    options.add_argument("--poll", type=float, default=5, help="seconds between two looks at the prompts")
    options = options.parse_args()

    scratch = pathlib.Path(tempfile.mkdtemp(prefix="ray-"))
    prompts = scratch / "prompts"
    shutil.copytree(ROOT / "prompts", prompts)
    for task in TASKS:
        shutil.copytree(ROOT / "prompts" / "topic", prompts / task)
    keys = {"api_key_file": scratch / "api.key", "admin_key_file": scratch / "admin.key"}
    keys["api_key_file"].write_text(API_KEY)
    keys["admin_key_file"].write_text(ADMIN_KEY)
    for name in [name for name in os.environ if name.startswith("SOFTSERVE")]:
        del os.environ[name]
    # Guessed tokens would come several at a time.
    os.environ |= {"SOFTSERVE_KV_CACHE": "64MiB", "SOFTSERVE_DRAFT_TOKENS": "0"}
    # Autoscaling looks at what is seconds old, where by default it may be tens of seconds old.
    os.environ |= {f"RAY_SERVE_{what}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5" for what in ("REPLICA", "HANDLE")}

    with contextlib.ExitStack() as at_end:
        at_end.callback(shutil.rmtree, scratch, ignore_errors=True)
        where = str(prompts)
        if options.prompts == "bucket":
            moto, where = bucket(prompts)
            at_end.callback(moto.kill)
        port = free_port()
        command = [options.program, "serve", *(f"--{name.replace('_', '-')}={file}" for name, file in keys.items())]
        command += [f"--prompts={where}", f"--files={scratch / 'files'}", f"--listen=127.0.0.1:{port}"]
        reference = subprocess.Popen([*command, "--threads=1", "--log-level=warn"], stdout=subprocess.DEVNULL)
        at_end.callback(reference.wait)
        at_end.callback(reference.terminate)

        cluster = ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="warning")
        at_end.callback(ray.shutdown)
        server, alone = Server(free_port(), where), Server(port, where)
        serve.start(http_options={"port": server.port})

        def apply(**settings):
            settings = {**keys, **settings, "program": options.program, "prompts": where, "target_ongoing_requests": 2, "drain_s": 10}
            settings |= {"upscale_delay_s": 1, "downscale_delay_s": 4, "look_back_period_s": 2, "health_check_period_s": 1}
            command = [pathlib.Path(sys.executable).parent / "serve", "run", "--non-blocking", "--working-dir", ".", "app:build"]
            command += [f"{name}={value}" for name, value in settings.items() if value is not None]
            environment = {**os.environ, "RAY_ADDRESS": cluster.address_info["gcs_address"]}
            done = subprocess.run(command, cwd=EXAMPLE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                sys.exit(f"serve run failed:\n{done.stdout[-3000:]}")

        began = time.monotonic()
        apply(min_replicas=3, max_replicas=3)
        answering = server.of_each_replica(3, "GET", "/v1/tasks")
        check(len(answering) == 3, f"{len(answering)} replicas answer {time.monotonic() - began:.1f} s after `serve run`")
        unchanged(server, alone)
        streams(server, alone)
        cancels(server)
        routes(server)
        uploads(server, options.poll)
        dies_with_its_parent(server, options.program, scratch)
        survives(server, "the program", lambda program, actor: program)
        survives(server, "the actor", lambda program, actor: actor)
        scales(server, apply)
        closed_without_keys(server, apply)
        serve.shutdown()
        left = wait_for(lambda: not server.programs(), 20)
        check(left is not None, f"no program is left {seconds(left)} after `serve shutdown`")
    print(f"{len(failed)} checks failed" if failed else "all checks hold")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
