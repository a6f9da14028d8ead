"""Reads a running softserve as the endpoint picker of the Gateway API inference extension and llm-d does: by the selectors of
docker/kubernetes/inference-gateway/endpoint-picker-config.yaml, idle, under load and after it.

    metrics.py PROGRAM          by default target/release/softserve
"""

import argparse
import concurrent.futures
import json
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request

import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "docker/kubernetes/inference-gateway/endpoint-picker-config.yaml"
# Requests that run at once in the test, and requests that are sent at once.
MAX_BATCH, SENT = 2, 24
# What the extractor takes from a scrape, by the field of its configuration.
VALUES = {
    "queuedRequestsSpec": "queued",
    "runningRequestsSpec": "running",
    "kvUsageSpec": "kv usage",
    "cacheBlockSizeSpec": "block size",
    "cacheNumBlocksSpec": "blocks",
}


class NotFound(Exception):
    pass


def selector(text):
    """A metric's name and the labels that a series must have, of `name{label=value,other="value"}`."""
    quoted = re.sub(r'(\w+)\s*=\s*([^",}\s]+)', r'\1="\2"', text)
    match = re.fullmatch(r"\s*([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{([^}]*)\})?\s*", quoted)
    if not match:
        raise NotFound(f"{text!r} is no selector")
    labels = {}
    for pair in filter(str.strip, (match[2] or "").split(",")):
        label = re.fullmatch(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"([^"]*)"\s*', pair)
        if not label:
            raise NotFound(f"{pair!r} in {text!r} is no label")
        labels[label[1]] = label[2]
    return match[1], labels


def value(families, text):
    """The value of the first series that the selector matches. The endpoint picker takes a gauge's or a counter's, and 0 of all else."""
    name, labels = selector(text)
    if name not in families:
        raise NotFound(f"there is no metric {name}")
    family = families[name]
    if family.type not in ("gauge", "counter"):
        raise NotFound(f"{name} is a {family.type}, of which the endpoint picker reads 0")
    # The parser takes a counter's _total off its family's name, the endpoint picker does not.
    for sample in family.samples:
        if sample.name == name and labels.items() <= sample.labels.items():
            return sample.value
    raise NotFound(f"{name} has no series with {labels}")


def extract(text, engine):
    """What the endpoint picker knows of the server after a scrape. An empty selector is one that is switched off."""
    families = {sample.name: family for family in text_string_to_metric_families(text) for sample in family.samples}
    return {name: value(families, engine[field]) for field, name in VALUES.items() if engine.get(field)}


def engine_of(config, name="softserve"):
    extractor = next(plugin for plugin in config["plugins"] if plugin["type"] == "core-metrics-extractor")
    return next(engine for engine in extractor["parameters"]["engineConfigs"] if engine["name"] == name)


class Server:
    """The demo model with its tasks, on one thread, with a batch that is soon full."""

    def __init__(self, program):
        self.home = tempfile.mkdtemp()
        shutil.copytree(ROOT / "prompts", pathlib.Path(self.home, "prompts"))
        options = ["--prompts", f"{self.home}/prompts", "--listen=127.0.0.1:0", "--threads=1", "--kv-cache=8MiB"]
        options += [f"--max-batch={MAX_BATCH}", "--log-level=warn"]
        environment = {"HOME": self.home, "XDG_DATA_HOME": self.home, "PATH": "/usr/bin:/bin"}
        self.process = subprocess.Popen(
            [program, "serve", *options], env=environment, stdout=subprocess.PIPE, text=True
        )
        self.url = next(line.split()[1] for line in self.process.stdout if line.split()[:1] == ["listen"])

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def generate(self):
        body = json.dumps({"input": "a red bicycle", "max_tokens": 200, "ignore_eos": True}).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/tasks/story/generate", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 200

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(10)
        shutil.rmtree(self.home)


def under_load(server, engine):
    """Scrapes while more requests are sent than run at once; also the seconds of one scrape, at most."""
    scrapes, longest = [], 0.0
    with concurrent.futures.ThreadPoolExecutor(SENT) as pool:
        answers = [pool.submit(server.generate) for _ in range(SENT)]
        while not all(answer.done() for answer in answers):
            began = time.monotonic()
            text = server.get("/metrics")
            longest = max(longest, time.monotonic() - began)
            scrapes.append(extract(text, engine))
            time.sleep(0.005)
        for answer in answers:
            answer.result()
    return scrapes, longest


def check(server, engine):
    """What is not as the endpoint picker needs it; and a line that says what was seen."""
    idle = extract(server.get("/metrics"), engine)
    assert set(idle) == set(VALUES.values()), f"not all is extracted: {idle}"
    assert (idle["queued"], idle["running"], idle["kv usage"]) == (0, 0, 0), idle
    assert idle["block size"] >= 1 and idle["blocks"] >= 1, idle
    scrapes, longest = under_load(server, engine)
    most = {name: max(scrape[name] for scrape in scrapes) for name in idle}
    assert most["running"] == MAX_BATCH, most
    assert SENT - MAX_BATCH >= most["queued"] >= SENT // 4, most
    # A request holds the blocks of 200 positions of its answer when it ends, and a scrape comes by at least half-way.
    assert 100 / (idle["blocks"] * idle["block size"]) <= most["kv usage"] <= 1, most
    for scrape in scrapes:
        assert scrape["queued"] + scrape["running"] <= SENT and 0 <= scrape["kv usage"] <= 1, scrape
        assert (scrape["blocks"], scrape["block size"]) == (idle["blocks"], idle["block size"]), scrape
        used = scrape["kv usage"] * scrape["blocks"]
        assert abs(used - round(used)) < 1e-6, f"{scrape}: no whole number of blocks"
    after = extract(server.get("/metrics"), engine)
    assert (after["queued"], after["running"], after["kv usage"]) == (0, 0, 0), after
    return (
        f"{len(scrapes)} scrapes under load: queued up to {most['queued']:.0f}, running up to {most['running']:.0f}, "
        f"KV cache up to {most['kv usage']:.3f} of {idle['blocks']:.0f} blocks of {idle['block size']:.0f} positions; "
        f"the longest scrape took {longest * 1000:.1f} ms"
    )


def check_models(server):
    """`/v1/models` as the picker's models-data-extractor reads it: an id of each model, and the parent of each adapter."""
    models = json.loads(server.get("/v1/models"))
    assert models["object"] == "list"
    base = [model["id"] for model in models["data"] if not model.get("parent")]
    tasks = {model["id"]: model["parent"] for model in models["data"] if model.get("parent")}
    expected = {folder.name for folder in (ROOT / "prompts").iterdir()}
    assert len(base) == 1 and set(tasks) == expected and set(tasks.values()) == set(base), models


def check_mistakes(text, engine):
    """A selector that is off in any way finds nothing: so the check above can fail."""
    extract(text, engine)
    wrong = {
        "queuedRequestsSpec": "softserve_engine_waiting_request",
        "runningRequestsSpec": "softserve_engine_running_requests{engine=one}",
        "kvUsageSpec": "softserve engine_kv_usage_ratio",
        "cacheBlockSizeSpec": "softserve_http_request_duration_seconds_sum",
        "cacheNumBlocksSpec": "softserve_engine_kv_blocks{",
    }
    for field, spec in wrong.items():
        try:
            extract(text, engine | {field: spec})
        except NotFound:
            continue
        raise SystemExit(f"{field}: {spec} finds something")
    series = 'm{a="1",b="x"} 3\n'
    for spec, found in {"m": 3, "m{a=1}": 3, 'm{a="1",b=x}': 3, "m{a=2}": None, "m{c=1}": None}.items():
        families = {f.name: f for f in text_string_to_metric_families("# TYPE m gauge\n" + series)}
        try:
            assert value(families, spec) == found, spec
        except NotFound:
            assert found is None, spec


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", type=pathlib.Path, default=ROOT / "target/release/softserve")
    engine = engine_of(yaml.safe_load(CONFIG.read_text()))
    with Server(parser.parse_args().program.resolve()) as server:
        try:
            print(check(server, engine))
        except NotFound as fault:
            raise SystemExit(f"{CONFIG.name}: {fault}")
        check_models(server)
        check_mistakes(server.get("/metrics"), engine)
    print("every selector of the endpoint picker finds its metric, and a wrong one does not; /v1/models has its models")


if __name__ == "__main__":
    main()
