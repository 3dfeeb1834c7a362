"""The Kubernetes cluster that kubectl reaches. Nothing of its configuration is shown but the context's name."""

from canvasrt.doctor.checks import Check, Group, NotUnderstoodError, Said, Status, numbers, understood
from canvasrt.doctor.machine import Answer, Answers, Command, Machine, ask
from canvasrt.doctor.nodes import GpuNode, NamedList, Nodes, node_checks

LEAST_KUBERNETES, LEAST_HELM = (1, 28), (3, 17)
HELM: Command = ("helm", "version", "--short")
CONTEXT: Command = ("kubectl", "config", "current-context")
_REQUEST = "--request-timeout=5s"
VERSION: Command = ("kubectl", "version", "-o", "json", _REQUEST)
NODES: Command = ("kubectl", "get", "nodes", "-o", "json", _REQUEST)
CLASSES: Command = ("kubectl", "get", "storageclasses", "-o", "json", _REQUEST)
APIS: Command = ("kubectl", "get", "--raw", "/apis", _REQUEST)
DEVICES: Command = ("kubectl", "get", "deviceclasses.resource.k8s.io", "-o", "json", _REQUEST)
RESOURCES = ("deployments.apps", "services", "persistentvolumeclaims", "jobs.batch")
MAY = {name: ("kubectl", "auth", "can-i", "create", name, _REQUEST) for name in RESOURCES}
TIMEOUT_SECONDS = 15.0  # of the program: it asks a server several times, and a login helper before that
DEVICE_CLASS = "gpu.nvidia.com"
_DEFAULT = ("storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class")
_OPTIONAL = {  # API group: name, values that need it
    "monitoring.coreos.com": ("Prometheus Operator", "metrics.serviceMonitor, metrics.prometheusRule"),
    "gateway.networking.k8s.io": ("Gateway API", "httpRoute, grpcRoute"),
    "keda.sh": ("KEDA", "autoscaling.type=keda"),
    "inference.networking.k8s.io": ("inference extension", "inferencePool"),
}


class _Server(Said):
    git_version: str = ""


class _Version(Said):
    server_version: _Server | None = None


class _ApiGroup(Said):
    name: str = ""


class _Apis(Said):
    groups: list[_ApiGroup]


def examine(machine: Machine, answers: Answers, wanted: bool | None) -> tuple[list[Check], list[GpuNode]]:
    """``wanted`` None: only where there is a context. ``answers`` has CONTEXT and HELM. Asks the cluster the rest."""
    group, context = Group("kubernetes"), answers[CONTEXT]
    asked = wanted is True
    trouble: Status = "fault" if asked else "skipped"
    if context.missing:
        group.add(trouble, "kubectl", "not installed", "https://kubernetes.io/docs/tasks/tools/" if asked else "")
        return group.checks, []
    name = " ".join(context.out.split())[:80] if context.ok else ""
    if not name and not asked:
        group.skipped("cluster", "kubectl has no current context" if context.code else context.said)
        return group.checks, []
    version = machine.run(VERSION, TIMEOUT_SECONDS)
    try:
        server = understood(version, _Version).server_version
    except NotUnderstoodError as error:
        said = "the server does not answer" if version.code else str(error)
        who = f"context {name}" if name else "no context"
        group.add(
            trouble, "cluster", f"{who}: {said}", "kubectl cluster-info; another: kubectl config use-context NAME"
        )
        return group.checks, []
    group.ok("cluster", f"context {name}" if name else "the one that this Pod runs in")
    _version(group, server.git_version if server is not None else "")
    commands = (NODES, CLASSES, APIS, DEVICES, *MAY.values())
    told = ask(machine, ((command, TIMEOUT_SECONDS) for command in commands))
    _rights(group, told)
    groups = _groups(told[APIS])
    dra = groups is not None and "resource.k8s.io" in groups and _has_device_class(told[DEVICES])
    found: list[GpuNode] = []
    try:
        checks, found = node_checks(understood(told[NODES], Nodes), dra, asked)
        group.checks += checks
    except NotUnderstoodError as error:
        group.skipped("nodes", f"kubectl get nodes: {error}", "Ask who runs the cluster which GPUs it has")
    if dra:
        group.ok("DRA", f"device class {DEVICE_CLASS}: --set gpu.dra.enabled=true asks for GPUs through it")
    else:
        group.skipped("DRA", f"no device class {DEVICE_CLASS}: the chart asks for nvidia.com/gpu, its default")
    _storage(group, told[CLASSES])
    _optional(group, groups)
    _helm(group, answers[HELM])
    return group.checks, found


def _version(group: Group, said: str) -> None:
    found, least = numbers(said), ".".join(map(str, LEAST_KUBERNETES))
    if not found:
        group.skipped("Kubernetes", "the server does not tell its version")
    elif found < LEAST_KUBERNETES:
        group.fault("Kubernetes", f"{said[:40]} is too old for the chart", f"Upgrade the cluster to {least} or newer")
    else:
        group.ok("Kubernetes", said[:40])


def _rights(group: Group, told: Answers) -> None:
    said = {name: told[command] for name, command in MAY.items()}
    words = {name: (answer.out.split() or [""])[0] for name, answer in said.items()}  # "no - no RBAC policy matched"
    refused = [name for name, word in words.items() if word == "no"]
    unknown = [name for name, word in words.items() if word not in ("yes", "no")]
    if refused:
        what = ", ".join(name.partition(".")[0] for name in refused)
        fix = f"Ask for the role edit in a namespace; check with: kubectl auth can-i create {refused[0]} -n NAMESPACE"
        group.fault("permission", f"you may not create {what} in this namespace", fix)
    elif unknown:
        group.skipped("permission", f"kubectl auth can-i: {said[unknown[0]].said}")
    else:
        group.ok("permission", "you may create what the chart needs")


def _groups(said: Answer) -> set[str] | None:
    try:
        return {each.name for each in understood(said, _Apis).groups}
    except NotUnderstoodError:
        return None


def _has_device_class(said: Answer) -> bool:
    try:
        return any(each.metadata.name == DEVICE_CLASS for each in understood(said, NamedList).items)
    except NotUnderstoodError:
        return False


def _storage(group: Group, said: Answer) -> None:
    try:
        classes = understood(said, NamedList).items
    except NotUnderstoodError as error:
        group.skipped("storage", f"kubectl get storageclasses: {error}")
        return
    defaults = [
        each for each in classes if any((each.metadata.annotations or {}).get(key) == "true" for key in _DEFAULT)
    ]
    if defaults:
        group.ok("storage", f"default StorageClass {defaults[0].metadata.name}")
    elif classes:
        names = ", ".join(each.metadata.name for each in classes)
        fix = f"Name one: --set persistence.storageClass={classes[0].metadata.name}"
        group.warning("storage", f"no StorageClass is the default ({names})", fix)
    else:
        fix = "Install one, or use what is there: --set persistence.existingClaim=NAME, --set hostPath.enabled=true"
        group.warning("storage", "no StorageClass, so that no volume is made for models", fix)


def _optional(group: Group, groups: set[str] | None) -> None:
    for api, (name, values) in _OPTIONAL.items():
        if groups is None:
            group.skipped(name, "the server does not list its APIs")
        elif api in groups:
            group.ok(name, f"{api} is there: {values} can be used")
        else:
            group.skipped(name, f"no {api}: leave {values} off")


def _helm(group: Group, said: Answer) -> None:
    found, least = numbers(said.out) if said.ok else (), ".".join(map(str, LEAST_HELM))
    if said.missing:
        group.warning("helm", "not installed: it installs the chart", "https://helm.sh/docs/intro/install/")
    elif not found:
        group.skipped("helm", f"helm version: {said.said}")
    elif found < LEAST_HELM:
        group.warning("helm", f"{said.out.strip()[:40]} is not tested with the chart", f"Install helm {least} or newer")
    else:
        group.ok("helm", said.out.strip()[:40])
