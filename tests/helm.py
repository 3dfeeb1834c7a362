"""Real helm for tests of the chart, and what every rendered object must keep, whatever the values.

`faults` knows nothing of templates: it reads objects as a cluster would. tests/test_chart.py plants faults in them.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from canvasrt.profiles.profile import load_profile

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "canvasrt"
CRDS = ROOT / "tests" / "fixtures" / "crds"
VERSIONS = tuple(f"1.{minor}" for minor in range(28, 38))
Object = dict[str, Any]
FLOATING = ("latest", "main", "master", "nightly", "edge", "stable", "dev")


def helm(major: int = 4) -> str:
    """The binary that `make setup` installed, else the one on PATH (on machines for which there is no wheel)."""
    installed = Path(sys.prefix) / "helm" / str(major) / "helm"
    found = str(installed) if installed.exists() else shutil.which("helm")
    assert found is not None, f"no helm {major} at {installed}, and none on PATH: run make setup"
    return found


def run(*arguments: object, major: int = 4) -> "subprocess.CompletedProcess[str]":
    command = [helm(major), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def arguments(profile: str | None, values: Object | None = None) -> list[str]:
    """Of helm: values files and settings. JSON, so that types are kept."""
    files = [] if profile is None else ["-f", str(CHART / "profiles" / f"{profile}.yaml")]
    return files + [
        each for key, value in (values or {}).items() for each in ("--set-json", f"{key}={json.dumps(value)}")
    ]


def render(
    profile: str | None,
    values: Object | None = None,
    kubernetes: str = "1.34",
    apis: tuple[str, ...] = (),
    major: int = 4,
    chart: Path = CHART,
) -> list[Object]:
    given = [*arguments(profile, values), "--kube-version", kubernetes, *(f"--api-versions={api}" for api in apis)]
    done = run("template", "demo", chart, "--namespace", "models", *given, major=major)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


def refusal(profile: str | None, values: Object | None = None, kubernetes: str = "1.34", major: int = 4) -> str:
    """What helm says where it must not render."""
    done = run("template", "demo", CHART, *arguments(profile, values), "--kube-version", kubernetes, major=major)
    assert done.returncode != 0, done.stdout
    assert done.stdout == ""
    return done.stderr


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    (found,) = (each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"]))
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """(name of the object, Pod's metadata and spec) of everything that makes Pods."""
    for each in objects:
        name = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield name, {"metadata": each["metadata"], "spec": each["spec"]}
        elif each["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield name, each["spec"]["template"]


def server_pod(objects: list[Object]) -> Object:
    (found,) = (pod for _, pod in pods(objects) if pod["spec"]["containers"][0]["name"] == "server")
    return found


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def gpus(container: Object) -> int:
    """That a container asks for, by the device plugin or by a claim."""
    resources = container.get("resources", {})
    counted = sum(int(each) for name, each in resources.get("limits", {}).items() if name.startswith("nvidia.com/"))
    return counted + len(resources.get("claims", []))


def faults(objects: list[Object], profile: str, kubernetes: str) -> list[str]:
    """What is wrong with the objects of one release: schemas, security, references, GPUs, images."""
    found = [fault for each in objects for fault in _schema(each, kubernetes)]
    for name, pod in pods(objects):
        found += [f"{name}: {fault}" for fault in _pod(pod, objects, profile)]
    return found + list(_references(objects)) + list(_names(objects))


@cache
def crd(kind: str) -> Any:
    file = CRDS / f"{kind}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _schema(each: Object, kubernetes: str) -> Iterator[str]:
    name = f"{each['kind']} {each['metadata']['name']}"
    own = crd(each["kind"])
    if own is not None:
        for error in jsonschema.Draft7Validator(own).iter_errors(each):
            yield f"{name}: {error.json_path}: {error.message}"
        if each["kind"] != "ResourceClaimTemplate":
            return
    try:
        kubernetes_validate.validate(each, kubernetes, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        if own is None:
            yield f"{name}: {each['apiVersion']} is not known in Kubernetes {kubernetes}"


def _pod(pod: Object, objects: list[Object], profile: str) -> Iterator[str]:
    spec = pod["spec"]
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    if spec.get("automountServiceAccountToken") is not False:
        yield "gets a token for the API server"
    if any(spec.get(each) for each in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares a namespace with the node"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    volumes |= {
        claim["metadata"]["name"]
        for each in objects
        if each["kind"] == "StatefulSet"
        for claim in each["spec"].get("volumeClaimTemplates", [])
    }
    for container in containers(pod):
        for fault in _container(container, volumes):
            yield f"container {container['name']}: {fault}"
    most = max(gpus(container) for container in containers(pod))
    serves = spec["containers"][0]["name"] == "server"
    compiler = load_profile(profile).choices.compiler.value
    if serves and gpus(spec["containers"][0]) != (compiler != "torch"):
        yield f"the server has {gpus(spec['containers'][0])} GPUs"
    if most > 1:
        yield f"asks for {most} GPUs"
    for container in containers(pod):
        names = {each["name"]: each.get("value") for each in container.get("env", [])}
        if not gpus(container) and container["name"] != "server" and names.get("NVIDIA_VISIBLE_DEVICES") != "void":
            yield f"container {container['name']} has asked for no GPU and sees all"
        if container["name"] != "prepare" and any(each.startswith(("HF_", "AWS_", "OCI_")) for each in names):
            yield f"container {container['name']} gets a token"
    claims = {claim["name"] for claim in spec.get("resourceClaims", [])}
    used = {c["name"] for container in containers(pod) for c in container.get("resources", {}).get("claims", [])}
    if claims != used:
        yield f"declares the claims {claims} and uses {used}"


def _container(container: Object, volumes: set[str]) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("readOnlyRootFilesystem") is not True:
        yield "can write its root file system"
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "may gain privileges"
    if security.get("capabilities", {}).get("drop") != ["ALL"] or security.get("capabilities", {}).get("add"):
        yield "keeps capabilities"
    image, _, tag = container["image"].rpartition(":")
    if not image or not tag or tag in FLOATING:
        yield f"the image {container['image']} has no fixed tag"
    resources = container.get("resources", {})
    if "memory" not in resources.get("limits", {}) or "cpu" not in resources.get("requests", {}):
        yield "has no limit of memory, or no request of CPU"
    quantities = [value for part in ("limits", "requests") for value in resources.get(part, {}).values()]
    if not all(isinstance(value, str) for value in quantities):
        yield f"has quantities that are no text: {quantities}"
    mounts = container.get("volumeMounts", [])
    missing = {mount["name"] for mount in mounts} - volumes
    if missing:
        yield f"mounts {missing}, which are not declared"
    if "/tmp" not in [mount["mountPath"] for mount in mounts]:
        yield "can write nowhere: no /tmp"
    if container["name"] == "server":
        yield from _server(container)


def _server(container: Object) -> Iterator[str]:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = " ".join(container.get(name, {}).get("exec", {}).get("command", []))
        if '{"ping": true}' not in command or ":8000/v2/models/diffusion_gemma/generate" not in command:
            yield f"the {name} is not the canary request"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    if ports != {"http": 8000, "grpc": 8001, "metrics": 8002}:
        yield f"has the ports {ports}"
    if "/dev/shm" not in [mount["mountPath"] for mount in container["volumeMounts"]]:
        yield "has the 64 MiB of /dev/shm that a container gets"
    if any(mount["mountPath"] == "/models" and not mount.get("readOnly") for mount in container["volumeMounts"]):
        yield "can change the models"


def _references(objects: list[Object]) -> Iterator[str]:
    """Names and labels that lead to nothing."""
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    every = [(name, pod) for name, pod in pods(objects)]
    for name, pod in every:
        for volume in pod["spec"].get("volumes", []):
            config = volume.get("configMap", {}).get("name")
            if config and ("ConfigMap", config) not in names:
                yield f"{name}: no ConfigMap {config}"
            claim = volume.get("persistentVolumeClaim", {}).get("claimName", "").strip()
            if claim.startswith("demo") and ("PersistentVolumeClaim", claim) not in names:
                yield f"{name}: no PersistentVolumeClaim {claim}"
        for claim in pod["spec"].get("resourceClaims", []):
            if ("ResourceClaimTemplate", claim["resourceClaimTemplateName"]) not in names:
                yield f"{name}: no ResourceClaimTemplate {claim['resourceClaimTemplateName']}"
        account = pod["spec"]["serviceAccountName"]
        if account.startswith("demo") and ("ServiceAccount", account) not in names:
            yield f"{name}: no ServiceAccount {account}"
    servers = [pod["metadata"]["labels"] for _, pod in every if pod["spec"]["containers"][0]["name"] == "server"]
    for each in objects:
        label = f"{each['kind']} {each['metadata']['name']}"
        spec = each.get("spec", {})
        selector = spec["selector"] if each["kind"] == "Service" else _labels(spec.get("selector"))
        if each["kind"] in (
            "Service",
            "PodDisruptionBudget",
            "PodMonitor",
            "InferencePool",
            "Deployment",
            "StatefulSet",
        ):
            if not selector or not any(selector.items() <= labels.items() for labels in servers):
                yield f"{label}: its selector {selector} finds no server"
            strangers = [pod for _, pod in every if pod["spec"]["containers"][0]["name"] != "server"]
            if any(selector.items() <= pod["metadata"].get("labels", {}).items() for pod in strangers):
                yield f"{label}: its selector {selector} finds other Pods too"
        if each["kind"] == "ServiceMonitor":
            services = [other for other in objects if other["kind"] == "Service"]
            hits = [s for s in services if selector.items() <= s["metadata"]["labels"].items()]
            if len(hits) != 1:
                yield f"{label}: its selector {selector} finds {len(hits)} Services"
        target = spec.get("scaleTargetRef")
        if target and (target.get("kind", "Deployment"), target["name"]) not in names:
            yield f"{label}: no {target}"
        backends = re.findall(r'"name": "(demo[^"]*)", "port"', json.dumps(spec.get("rules", [])))
        for backend in backends:
            if ("Service", backend) not in names:
                yield f"{label}: no Service {backend}"


def _labels(selector: Any) -> dict[str, str]:
    return dict(selector.get("matchLabels", {})) if isinstance(selector, dict) else {}


def _names(objects: list[Object]) -> Iterator[str]:
    every = [(each["kind"], each["metadata"]["name"]) for each in objects]
    yield from (f"{kind} {name} is there twice" for kind, name in set(every) if every.count((kind, name)) > 1)
    for kind, name in every:
        if len(name) > 63 or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{kind} {name} is no name"
