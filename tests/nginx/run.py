"""Three softserve servers behind nginx with docker/nginx/softserve.conf: which server gets a task, streams, uploads, a server that is
killed, one that is stopped, and throughput. See docker/nginx/README.md.

    run.py [PROGRAM] [--rounds N]      by default target/release/softserve, and 5 rounds of the comparison
"""

import argparse
import collections
import http.client
import io
import json
import pathlib
import statistics
import tempfile
import time
import zipfile

from setup import ASKING, ROOT, SERVING, TASKS, Load, Nginx, Server, ask, bench, generate, make_tasks, processor_seconds, wait_for

# How often a server looks at the folder of prompts by itself (--poll-interval), in seconds. Where the system tells it of changes it
# is faster.
POLL = 5
# For how long nginx leaves a server alone that it could not reach: fail_timeout.
LEFT_ALONE = 5


def owners(servers, before=None):
    """Which servers have answered for each task, and how often, since `before`."""
    counts = collections.defaultdict(dict)
    for number, server in enumerate(servers):
        for task, count in server.answered().items():
            new = count - (before[number].get(task, 0) if before else 0)
            if new:
                counts[task][number] = new
    return counts


def one_server_each(nginx, servers):
    """Every task has one server, on each route that names the task, and every server has tasks."""
    before = [server.answered() for server in servers]
    for task in TASKS:
        for _ in range(4):
            generate(nginx.port, task).json()
        body = {"model": task, "prompt": "The soup was cold.", "max_tokens": 2}
        for name in [task, f"{task}@any"]:
            ask(nginx.port, "POST", "/v1/completions", body, {"x-softserve-task": name}).json()
        ask(nginx.port, "POST", f"/v1/tasks/{task}/score", {"input": "The soup", "continuations": [" was"]}).json()
    found = owners(servers, before)
    for task in TASKS:
        assert list(found[task].values()) == [7], f"{task} was answered by {found[task]} (server: how often)"
    owner = {task: next(iter(counts)) for task, counts in found.items()}
    share = collections.Counter(owner.values())
    assert len(share) == len(servers), f"a server has no tasks: {share}"
    # Without the header nginx does not know the task: the servers take turns.
    before = [server.answered() for server in servers]
    for _ in range(9):
        ask(nginx.port, "POST", "/v1/completions", {"model": TASKS[0], "prompt": "x", "max_tokens": 2}).json()
    turns = owners(servers, before)[TASKS[0]]
    assert len(turns) == len(servers), f"nine completions without a header went to {turns}"
    print(f"each of {len(TASKS)} tasks has one server; tasks of each: {sorted(share.values())}")
    return owner


def stream_pieces(port, task):
    """When the pieces of a streamed answer came, in seconds since it was asked for, and the whole time."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"input": "The soup was cold.", "max_tokens": 300, "ignore_eos": True, "stream": True}
    began = time.monotonic()
    connection.request("POST", f"/v1/tasks/{task}/generate", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.headers
    times, text = [], b""
    while piece := answer.read1(65536):
        times.append(time.monotonic() - began)
        text += piece
    connection.close()
    events = [line for line in text.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]" and len(events) > 100, events[-2:]
    return times, time.monotonic() - began, len(events)


def streams(nginx, servers, owner):
    """A stream passes as it comes: its first piece long before its end, and in many pieces."""
    times, whole, events = stream_pieces(nginx.port, TASKS[0])
    direct, _, _ = stream_pieces(servers[owner[TASKS[0]]].port, TASKS[0])
    assert times[0] < whole / 2, f"the first piece came after {times[0]:.3f} s of {whole:.3f} s"
    # On a busy machine several events are read at once.
    assert len(times) > len(direct) / 10, f"{len(times)} pieces through nginx, {len(direct)} without it"
    print(
        f"a stream of {events} events came in {len(times)} pieces through nginx and {len(direct)} without it, the first after "
        f"{times[0] * 1000:.0f} ms of {whole * 1000:.0f} ms"
    )


def uploads(nginx, servers):
    """A prompt that is uploaded through nginx is served by all servers, and sizes are bounded as the servers bound them."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        for name in ["adapter_config.json", "adapter_model.safetensors", "task.json"]:
            files.write(ROOT / "prompts/topic" / name, name)
    began = time.monotonic()
    content = {"content-type": "application/zip"}
    uploaded = ask(nginx.port, "POST", "/v1/admin/tasks/uploaded/versions", archive.getvalue(), content).json()
    waited = []
    for server in servers:
        answer = lambda: generate(server.port, "uploaded")
        wait_for(lambda: answer().status == 200, 2 * POLL, f"{server.name} serves the upload")
        waited.append(time.monotonic() - began)
        assert answer().json()["version"] == uploaded["version"]
    generate(nginx.port, "uploaded").json()
    large = ask(nginx.port, "POST", "/v1/admin/tasks/uploaded/versions", bytes(3 << 20), content)
    assert large.status == 400 and b"urn:softserve" in large.body, f"{large.status}: {large.body[:200]}"
    refused = ask(nginx.port, "POST", "/v1/tasks/uploaded/generate", bytes((1 << 20) + 1), content)
    assert refused.status == 413, f"{refused.status}: {refused.body[:200]}"
    assert ask(nginx.port, "DELETE", "/v1/admin/tasks/uploaded").status == 204
    print(f"an upload through nginx was served by all within {max(waited):.2f} s")


def small_things(nginx):
    assert ask(nginx.port, "GET", "/health/ready").status == 200
    assert ask(nginx.port, "GET", "/metrics").status == 404
    names = [task["task"] for task in ask(nginx.port, "GET", "/v1/tasks").json()["tasks"]]
    assert names == TASKS, names
    form = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\ncontent-disposition: form-data; '
    form += b'name="file"; filename="in.jsonl"\r\n\r\n{}\n\r\n--x--\r\n'
    file = ask(nginx.port, "POST", "/v1/files", form, {"content-type": "multipart/form-data; boundary=x"}).json()
    for _ in range(6):
        assert ask(nginx.port, "GET", f"/v1/files/{file['id']}").status == 200, "a file is not found again"


def one_is_killed(nginx, servers, owner):
    """kill -9 loses what the server held and no more, the others take its tasks over, and they come back to it."""
    victim = owner[TASKS[0]]
    load = Load(nginx.port)
    time.sleep(2)
    began = time.monotonic()
    servers[victim].kill()
    ended = time.monotonic()
    # Long enough for nginx to try it again.
    time.sleep(LEFT_ALONE + 2)
    noted = load.stop()
    lost = [request for request in noted if request[3]]
    held = [r for r in noted if owner[r[0]] == victim and r[1] <= ended and r[2] >= began]
    later = [r for r in noted if r[1] > ended and owner[r[0]] == victim]
    # The kernel closes a dead process' connections; nginx may read of a request and of that in the same moment.
    outside = [request for request in lost if request not in held and not ended < request[1] < ended + 0.05]
    assert not outside, f"requests were lost that the server did not hold: {outside[:3]}"
    assert len(later) > 20, f"only {len(later)} requests of its tasks after it was killed"
    takers = owners([server for number, server in enumerate(servers) if number != victim])
    spread = {next(iter(set(takers[task]))) for task in TASKS if owner[task] == victim and takers[task]}
    print(
        f"kill -9 of one: {len(held)} requests of its tasks were under way, {len(lost)} of {len(noted)} were lost; "
        f"{len(later)} later ones of its tasks were answered by {len(spread)} other servers"
    )
    servers[victim].start()
    time.sleep(LEFT_ALONE + 1)
    for task in TASKS:
        # The first request after the time is nginx's trial.
        generate(nginx.port, task).json()
    before = [server.answered() for server in servers]
    for task in TASKS:
        generate(nginx.port, task).json()
    back = {task: set(counts) for task, counts in owners(servers, before).items()}
    assert back == {task: {number} for task, number in owner.items()}, "the tasks did not come back"
    print("the server was started again, and its tasks came back to it")


def one_is_stopped(nginx, servers, owner):
    """SIGTERM: the server ends what it has, and nothing is lost but a request that meets a connection that is just being closed."""
    victim = owner[TASKS[1]]
    load = Load(nginx.port)
    time.sleep(1)
    began = time.monotonic()
    servers[victim].stop()
    ended = time.monotonic()
    time.sleep(1)
    noted = load.stop()
    lost = [request for request in noted if request[3]]
    assert servers[victim].process.returncode == 0
    outside = [r for r in lost if owner[r[0]] != victim or r[2] < began or r[1] > ended]
    assert not outside and len(lost) <= 1, f"{len(lost)} requests were lost: {lost[:3]}"
    print(f"SIGTERM of one: {len(lost)} of {len(noted)} requests were lost; it ended {ended - began:.2f} s later")
    servers[victim].start()
    time.sleep(LEFT_ALONE + 1)


def throughput(program, nginx, servers, home, rounds):
    """Three servers of one thread behind nginx, against one server without it: of three threads, and of one for each processor."""
    sides = {"three behind nginx": (nginx.port, [nginx.process, *(server.process for server in servers)])}
    single = [Server(program, home, f"one-of-{threads}", threads) for threads in (3, len(SERVING))]
    sides |= {f"one of {server.threads} threads": (server.port, [server.process]) for server in single}
    speed, cost = collections.defaultdict(list), collections.defaultdict(list)
    for number in range(rounds + 1):
        for side in list(sides) if number % 2 else list(sides)[::-1]:
            port, processes = sides[side]
            before = processor_seconds(processes)
            figures = bench(program, port, requests=288, concurrency=48)["results"][0]["median"]
            assert figures["errors"] == {} and figures["answered"] == 288, figures["errors"]
            # The first round warms up.
            if number:
                speed[side].append(figures["generated_tokens_per_second"])
                # With the requests of the warm-up, one for each task, on every side.
                cost[side].append((processor_seconds(processes) - before) / figures["generated_tokens"] * 1000)
    for server in single:
        server.stop()
    print(
        f"\nThroughput: 48 requests at once of {len(TASKS)} tasks, demo model, {rounds} rounds in turn. All servers and nginx share the "
        f"processors {SERVING}, `softserve bench` runs on {ASKING}.\nThree servers of one thread have as many threads as one of three; one "
        "with a thread for each processor is what a single server is at its best here.\nOn a machine that does other things too, more "
        "processes get more of it: what a token costs is then the better figure."
    )
    for side in sides:
        print(
            f"  {side:18}  median {statistics.median(speed[side]):6.0f} generated tokens/s ({min(speed[side]):.0f} to "
            f"{max(speed[side]):.0f}), {statistics.median(cost[side]):.3f} s of a processor for 1000 tokens"
        )
    three = "three behind nginx"
    for side in [side for side in sides if side != three]:
        ratios = sorted(a / b for a, b in zip(speed[three], speed[side], strict=True))
        costs = statistics.median(a / b for a, b in zip(cost[three], cost[side], strict=True))
        print(
            f"  {three} / {side}: throughput {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}; the goal is "
            f"0.9), cost of a token {costs:.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", type=pathlib.Path, default=ROOT / "target/release/softserve")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    program = options.program.resolve()
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        make_tasks(home)
        servers, nginx = [], None
        try:
            servers = [Server(program, home, f"server-{number}", threads=1) for number in range(3)]
            nginx = Nginx(home, servers)
            small_things(nginx)
            owner = one_server_each(nginx, servers)
            streams(nginx, servers, owner)
            uploads(nginx, servers)
            one_is_killed(nginx, servers, owner)
            one_is_stopped(nginx, servers, owner)
            throughput(program, nginx, servers, home, options.rounds)
        finally:
            if nginx:
                nginx.stop()
            for server in servers:
                server.stop()


if __name__ == "__main__":
    main()
