"""Holds the manifests of docker/kubernetes to their schemas, to each other and to the program. See docker/kubernetes/README.md.

    manifests.py --gateway-api FOLDER PROGRAM     FOLDER: the unpacked npm package @kubernetes-models/gateway-api
"""

import argparse
import copy
import json
import os
import pathlib
import re
import shutil
import subprocess

import jsonschema
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker/kubernetes"
OWN_SCHEMAS = json.loads(pathlib.Path(__file__).with_name("schemas.json").read_text())
# The oldest and the newest Kubernetes whose schemas they are held to.
KUBERNETES = ["1.33", "1.37"]
# Not applied with the others: an example of a secret, and what needs an adapter that not every cluster has.
LEFT_OUT = {"base/secret.example.yaml", "base/autoscaling.yaml"}
# Seconds beyond the drain in which src/cli/serve.rs sends the last bytes, joins the engine and shuts the runtime down.
AFTER_THE_DRAIN = 6


def read(folder=FOLDER):
    """Every document by its file and place in it: {("base/deployment.yaml", 0): {...}}."""
    files = sorted(folder.rglob("*.yaml"))
    return {
        (str(file.relative_to(folder)), place): document
        for file in files
        for place, document in enumerate(yaml.safe_load_all(file.read_text()))
    }


def closed(schema):
    """The same schema in which a field that it does not name is an error, as `kubectl apply` warns of it."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" or "kind" in schema.get("properties", {}):
        result.setdefault("additionalProperties", False)
    return result


def gateway_api(package, kind):
    """A schema of the npm package, which has it as a constant of a JavaScript file."""
    text = (package / f"gateway.networking.k8s.io/v1/{kind}.js").read_text()
    schema, _ = json.JSONDecoder().raw_decode(text, text.index("const schema = ") + len("const schema = "))
    # It refers to the schema of metadata in another package.
    schema["properties"]["metadata"] = {"$ref": "#/$defs/metadata"}
    return closed(schema) | {"$defs": OWN_SCHEMAS["$defs"]}


def own(name):
    return OWN_SCHEMAS[name] | {"$defs": OWN_SCHEMAS["$defs"]}


def faults(schema, document):
    for fault in jsonschema.Draft202012Validator(schema).iter_errors(document):
        yield f"{'.'.join(map(str, fault.absolute_path))}: {fault.message[:300]}"


def against_schemas(documents, package, only=None):
    """What each document, or each of one file, has that its schema does not allow."""
    for (file, _), document in documents.items():
        if only not in (None, file):
            continue
        version, kind = document.get("apiVersion", ""), document.get("kind", "")
        found = []
        if version.startswith("gateway.networking.k8s.io/"):
            found = [] if package is None else faults(gateway_api(package, kind), document)
        elif f"{version} {kind}" in OWN_SCHEMAS:
            found = list(faults(own(f"{version} {kind}"), document))
            for plugin in document.get("plugins", []):
                name = f"parameters of {plugin.get('type')}"
                # Those without a schema here take none.
                schema = own(name) if name in OWN_SCHEMAS else {"maxProperties": 0}
                found += faults(schema, plugin.get("parameters", {}))
        else:
            for kubernetes in KUBERNETES:
                try:
                    kubernetes_validate.validate(document, kubernetes, strict=True)
                except kubernetes_validate.ValidationError as fault:
                    found.append(f"{'.'.join(map(str, fault.path))}: {fault.message[:300]} (Kubernetes {kubernetes})")
                except kubernetes_validate.SchemaNotFoundError as fault:
                    found.append(fault.message)
        yield from (f"{file}: {version} {kind}: {fault}" for fault in found)


def seconds(text):
    return {"s": 1, "m": 60}[text[-1]] * int(text[:-1])


def size(text):
    number, unit = re.fullmatch(r"(\d+)([KMG]i)B?", text).groups()
    return int(number) << {"Ki": 10, "Mi": 20, "Gi": 30}[unit]


class Set:
    """The documents, to be asked for by kind and name."""

    def __init__(self, documents):
        self.documents = documents

    def all(self, kind):
        return [document for document in self.documents.values() if document["kind"] == kind]

    def one(self, kind, name="softserve"):
        found = [document for document in self.all(kind) if document["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} of {kind} {name}"
        return found[0]


def against_each_other(documents):
    """What one document says of another that is not so."""
    all_ = Set(documents)
    deployment = all_.one("Deployment")
    pod = deployment["spec"]["template"]
    labels, spec = pod["metadata"]["labels"], pod["spec"]
    container = spec["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    selectors = {
        "the Deployment": deployment["spec"]["selector"]["matchLabels"],
        "the Service": all_.one("Service")["spec"]["selector"],
        "the PodDisruptionBudget": all_.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        "the NetworkPolicy": all_.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        "the InferencePool": all_.one("InferencePool")["spec"]["selector"]["matchLabels"],
    }
    for who, selector in selectors.items():
        if not selector.items() <= labels.items():
            yield f"{who} selects {selector}, and the pods have {labels}"
    pool = all_.one("InferencePool")["spec"]
    if [port["number"] for port in pool["targetPorts"]] != [ports["http"]]:
        yield f"the InferencePool's ports are {pool['targetPorts']}, the container's {ports}"
    if all_.one("Service")["spec"]["ports"][0]["targetPort"] not in ports:
        yield "the Service's target is no port of the container"
    picker = all_.one("Service", pool["endpointPickerRef"]["name"])
    if pool["endpointPickerRef"]["port"]["number"] not in [port["port"] for port in picker["spec"]["ports"]]:
        yield "the endpoint picker's Service has no such port"
    names = {(document["kind"], document["metadata"]["name"]) for document in documents.values() if "metadata" in document}
    generated = [each for kustomization in all_.all("Kustomization") for each in kustomization.get("configMapGenerator", [])]
    names |= {("ConfigMap", each["name"]) for each in generated}
    for owner in all_.all("Deployment"):
        inner = owner["spec"]["template"]["spec"]
        wanted = [("ConfigMap", source["configMapRef"]["name"]) for c in inner["containers"] for source in c.get("envFrom", [])]
        for volume in inner["volumes"]:
            wanted += [("ConfigMap", volume["configMap"]["name"])] if "configMap" in volume else []
            wanted += [("Secret", volume["secret"]["secretName"])] if "secret" in volume else []
            if "persistentVolumeClaim" in volume:
                wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        yield from (f"{kind} {name} is used and is nowhere" for kind, name in wanted if (kind, name) not in names)
        volumes = {volume["name"] for volume in inner["volumes"]}
        mounted = {mount["name"] for c in inner["containers"] for mount in c["volumeMounts"]}
        if volumes != mounted:
            yield f"volumes {volumes} and mounts {mounted} are not the same"
    for route in all_.all("HTTPRoute"):
        for backend in (backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]):
            if (backend.get("kind", "Service"), backend["name"]) not in names:
                yield f"the route names {backend}, which is nowhere"
    config = all_.all("EndpointPickerConfig")[0]
    plugins = [plugin.get("name", plugin["type"]) for plugin in config["plugins"]]
    used = re.findall(r'"pluginRef": "([^"]*)"', json.dumps(config))
    yield from (f"the endpoint picker's {name} is no plugin of the configuration" for name in set(used) - set(plugins))
    yield from (f"the endpoint picker's plugin {name} is not used" for name in set(plugins) - set(used))
    extractor = next(plugin for plugin in config["plugins"] if plugin["type"] == "core-metrics-extractor")["parameters"]
    engines = [engine["name"] for engine in extractor["engineConfigs"]]
    for key in [extractor.get("engineLabelKey", "llm-d.ai/engine-type"), "inference.networking.k8s.io/engine-type"]:
        if labels.get(key) not in engines:
            yield f"the pods' label {key} is {labels.get(key)}, and the endpoint picker knows {engines}"


def against_the_files(documents, folder=FOLDER):
    """Files that a kustomization names and that are not there, and files that none names."""
    named = set()
    for (file, _), document in documents.items():
        if document["kind"] != "Kustomization":
            continue
        here = pathlib.PurePath(file).parent
        files = document.get("resources", []) + [f for each in document.get("configMapGenerator", []) for f in each["files"]]
        for name in files:
            if not (folder / here / name).exists():
                yield f"{file} names {name}, which is not there"
            named.add(os.path.normpath(here / name))
    there = {file for file, _ in documents if pathlib.PurePath(file).name != "kustomization.yaml"}
    yield from (f"{file} is in no kustomization" for file in sorted(there - named - LEFT_OUT))


def against_the_program(documents, help_text):
    """What the manifests say of softserve that is not so."""
    all_ = Set(documents)
    options, pod = all_.one("ConfigMap")["data"], all_.one("Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    for name in options:
        if f"[env: {name}=]" not in help_text and f"[env: {name}]" not in help_text:
            yield f"the program reads no {name}"
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = wait + seconds(options["SOFTSERVE_DRAIN_TIMEOUT"]) + AFTER_THE_DRAIN
    if pod["terminationGracePeriodSeconds"] < needed:
        yield f"a pod is killed after {pod['terminationGracePeriodSeconds']} s, and may need {needed} s to end"
    if options["SOFTSERVE_THREADS"] != container["resources"]["limits"]["cpu"]:
        yield "the threads are not as many as the container's CPUs"
    if size(options["SOFTSERVE_KV_CACHE"]) >= size(container["resources"]["limits"]["memory"]):
        yield "the KV cache alone is more than the container's memory"
    if options["SOFTSERVE_LISTEN"] != f"0.0.0.0:{container['ports'][0]['containerPort']}":
        yield "the program listens elsewhere than the container's port says"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for name in ["SOFTSERVE_PROMPTS", "SOFTSERVE_ADMIN_KEY_FILE"]:
        if not {options[name], str(pathlib.PurePath(options[name]).parent)} & mounts:
            yield f"{name} is in no volume"
    key = pathlib.PurePath(options["SOFTSERVE_ADMIN_KEY_FILE"]).name
    if key not in all_.one("Secret", "softserve-keys")["stringData"]:
        yield f"the secret has no {key}"
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "docker/Dockerfile").read_text(), re.M).groups()
    if user != (str(pod["securityContext"]["runAsUser"]), str(pod["securityContext"]["runAsGroup"])):
        yield f"the image's user is {user}"
    if not (container["securityContext"]["readOnlyRootFilesystem"] and pod["securityContext"]["runAsNonRoot"]):
        yield "the container may write its root, or run as root"
    paths = list(json.loads((ROOT / "openapi/openapi.json").read_text())["paths"]) + ["/docs", "/openapi.json"]
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"]:
        if container[probe]["httpGet"]["path"] not in paths:
            yield f"the {probe} asks for a path that there is not"
    for match in (m for route in all_.all("HTTPRoute") for rule in route["spec"]["rules"] for m in rule["matches"]):
        value = match["path"]["value"]
        if not any(path == value or path.startswith(value + "/") for path in paths):
            yield f"the route {value} is no path of the program"
        if any(path == value or path.startswith(value + "/") for path in ["/metrics", "/health/ready", "/v1/files"]):
            yield f"the route {value} leads to what belongs to one pod"
    metric = all_.one("HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    if f'"{metric}"' not in (ROOT / "src/telemetry.rs").read_text():
        yield f"the autoscaler asks for {metric}, which is no metric"


def against_kustomize(documents, package, kubectl):
    """What `kubectl kustomize` makes of both folders, beside the schemas and the documents."""
    for folder in ["base", "inference-gateway"]:
        run = subprocess.run([kubectl, "kustomize", FOLDER / folder], capture_output=True, text=True)
        if run.returncode:
            yield f"{folder}: {run.stderr.strip()}"
            continue
        made = {(f"{folder}, put together", place): each for place, each in enumerate(yaml.safe_load_all(run.stdout))}
        yield from against_schemas(made, package)
        yield from (
            f"{folder}: {each['kind']} is in the namespace {each['metadata'].get('namespace')}"
            for each in made.values() if each["metadata"].get("namespace") != "softserve"
        )
        if folder == "base":
            continue
        no_resources = ("Kustomization", "EndpointPickerConfig")
        left_out = [file for (file, _), each in documents.items() if file in LEFT_OUT or each["kind"] in no_resources]
        # The configuration of the endpoint picker becomes a ConfigMap.
        if len(made) != len(documents) - len(left_out) + 1:
            yield f"{folder}: {len(made)} documents of {len(documents)}"
        picker = Set(made).one("Deployment", "softserve-endpoint-picker")["spec"]["template"]["spec"]
        config = Set(made).one("ConfigMap", picker["volumes"][0]["configMap"]["name"])
        if yaml.safe_load(config["data"]["endpoint-picker-config.yaml"])["kind"] != "EndpointPickerConfig":
            yield f"{folder}: the endpoint picker has no configuration"


def problems(documents, package, help_text, changed=None):
    found = list(against_schemas(documents, package, changed))
    # What is off its schema may lack what the others look at.
    return found or [
        *against_each_other(documents), *against_the_files(documents), *against_the_program(documents, help_text)
    ]


# Mistakes, each of which has to be found: file and document, the path to what is changed, the new key or value, and a word of the
# complaint. A value that is a dict {"rename": NAME} renames the last key of the path.
POD = ["spec", "template", "spec"]
BOX = [*POD, "containers", 0]
MISTAKES = [
    ("base/deployment.yaml", 0, [*BOX, "readinessProbe"], {"rename": "readinesProbe"}, "readinesProbe"),
    ("base/deployment.yaml", 0, [*BOX, "ports", 0, "containerPort"], "http", "containerPort"),
    ("base/deployment.yaml", 0, [*BOX, "livenessProbe", "httpGet", "path"], "/health/alive", "livenessProbe"),
    ("base/deployment.yaml", 0, [*BOX, "securityContext", "readOnlyRootFilesystem"], False, "write its root"),
    ("base/deployment.yaml", 0, [*POD, "terminationGracePeriodSeconds"], 30, "may need 46 s"),
    ("base/deployment.yaml", 0, [*POD, "securityContext", "runAsUser"], 10002, "the image's user"),
    ("base/deployment.yaml", 0, [*POD, "volumes", 1, "persistentVolumeClaim", "claimName"], "prompts", "is nowhere"),
    ("base/deployment.yaml", 0, ["spec", "template", "metadata", "labels", "llm-d.ai/engine-type"], "vllm", "engine-type is vllm"),
    ("base/configmap.yaml", 0, ["data", "SOFTSERVE_MAX_BATCH"], {"rename": "SOFTSERVE_MAX_BATCHES"}, "SOFTSERVE_MAX_BATCHES"),
    ("base/configmap.yaml", 0, ["data", "SOFTSERVE_THREADS"], "8", "the threads"),
    ("base/configmap.yaml", 0, ["data", "SOFTSERVE_DRAIN_TIMEOUT"], "1m", "may need 76 s"),
    ("base/service.yaml", 0, ["spec", "selector"], {"app.kubernetes.io/name": "soft"}, "the Service selects"),
    ("base/disruption.yaml", 0, ["spec", "maxUnavailable"], {"rename": "maxUnavailble"}, "maxUnavailble"),
    ("base/network-policy.yaml", 0, ["spec", "policyTypes"], "Ingress", "policyTypes"),
    ("base/autoscaling.yaml", 0, ["spec", "metrics", 0, "pods", "metric", "name"], "softserve_waiting", "no metric"),
    ("base/kustomization.yaml", 0, ["resources", 0], "config.yaml", "not there"),
    ("inference-gateway/inference-pool.yaml", 0, ["spec", "targetPorts"], {"rename": "targetPort"}, "targetPort"),
    ("inference-gateway/inference-pool.yaml", 0, ["spec", "endpointPickerRef", "port"], {"rename": "portNumber"}, "portNumber"),
    ("inference-gateway/inference-pool.yaml", 0, ["spec", "endpointPickerRef", "failureMode"], "Open", "failureMode"),
    ("inference-gateway/inference-pool.yaml", 0, ["spec", "targetPorts", 0, "number"], 8081, "the InferencePool's ports"),
    ("inference-gateway/inference-pool.yaml", 1, ["spec", "priority"], "high", "priority"),
    ("inference-gateway/endpoint-picker.yaml", 4, [*BOX, "args"], {"rename": "arguments"}, "arguments"),
    ("inference-gateway/endpoint-picker-config.yaml", 0, ["plugins", 2, "type"], "queue-score", "queue-score"),
    ("inference-gateway/endpoint-picker-config.yaml", 0, ["schedulingProfiles", 0, "plugins", 0, "pluginRef"], "queue", "queue"),
    (
        "inference-gateway/endpoint-picker-config.yaml", 0,
        ["plugins", 1, "parameters", "engineConfigs", 0, "kvUsageSpec"], {"rename": "kvCacheUsageSpec"}, "kvCacheUsageSpec",
    ),
    ("inference-gateway/gateway.yaml", 1, ["spec", "rules", 0, "backendRefs", 0, "name"], "soft", "nowhere"),
    ("inference-gateway/gateway.yaml", 1, ["spec", "rules", 0, "matches", 0, "path", "value"], "/v1/complete", "no path"),
    ("inference-gateway/gateway.yaml", 1, ["spec", "rules", 1, "matches", 5, "path", "value"], "/metrics", "one pod"),
]
# These need the schemas of the Gateway API.
GATEWAY_MISTAKES = [
    ("inference-gateway/gateway.yaml", 1, ["spec", "rules", 0, "backendRefs"], {"rename": "backends"}, "backends"),
    ("inference-gateway/gateway.yaml", 1, ["spec", "rules", 0, "timeouts", "request"], "never", "timeouts"),
    ("inference-gateway/gateway.yaml", 0, ["spec", "gatewayClassName"], {"rename": "gatewayClass"}, "gatewayClass"),
]


def with_mistake(documents, file, place, path, value):
    changed = copy.deepcopy(documents)
    inner = changed[file, place]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]]  # It has to be there.
    if isinstance(value, dict) and "rename" in value:
        inner[value["rename"]] = inner.pop(path[-1])
    else:
        inner[path[-1]] = value
    return changed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("--gateway-api", type=pathlib.Path, help="without it Gateway and HTTPRoute are held to no schema")
    options = parser.parse_args()
    help_text = subprocess.run([options.program, "serve", "--help"], check=True, capture_output=True, text=True).stdout
    documents = read()
    found = problems(documents, options.gateway_api, help_text)
    if kubectl := shutil.which("kubectl"):
        found += against_kustomize(documents, options.gateway_api, kubectl)
    else:
        print("SKIPPED: what kustomize makes of the manifests: there is no kubectl")
    if found:
        raise SystemExit("\n".join(found))
    mistakes = MISTAKES + (GATEWAY_MISTAKES if options.gateway_api else [])
    for file, place, path, value, word in mistakes:
        found = problems(with_mistake(documents, file, place, path, value), options.gateway_api, help_text, changed=file)
        if not any(word in problem for problem in found):
            raise SystemExit(f"not found in {file}: {path} became {value}; found instead: {found}")
    print(f"{len(documents)} documents hold, for Kubernetes {' and '.join(KUBERNETES)}; each of {len(mistakes)} mistakes is found")


if __name__ == "__main__":
    main()
