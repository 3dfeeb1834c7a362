"""What holds for every rendered object, whatever the values: all GPUs, sets of options and versions of Kubernetes.

Every pair of the three is rendered, and each check is shown able to fail.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from canvasrt.profiles.profile import load_profile, profile_names
from helm import VERSIONS, Object, containers, faults, one, pods, refusal, render, server_pod

MONITORING = ("monitoring.coreos.com/v1",)
GATEWAY = ("gateway.networking.k8s.io/v1", "inference.networking.k8s.io/v1", "keda.sh/v1alpha1")
PARENT = [{"name": "public", "namespace": "gateways"}]
OPTIONS: dict[str, tuple[Object, tuple[str, ...]]] = {
    "as it is": ({}, ()),
    "a Job": (
        {
            "pipeline.mode": "job", "persistence.accessMode": "ReadWriteMany", "replicaCount": 4,
            "model.token.existingSecret": "hf", "model.s3.existingSecret": "s3", "model.oci.existingSecret": "oci",
            "imagePullSecrets": [{"name": "registry"}], "networkPolicy.enabled": True, "priorityClassName": "high",
        },
        (),
    ),
    "volumes of their own": ({"statefulSet.enabled": True, "replicaCount": 8, "persistence.storageClass": "fast"}, ()),
    "a folder of the node": (
        {
            "persistence.enabled": False, "hostPath.enabled": True, "runtimeClassName": "nvidia",
            "serviceAccount": {"create": False, "name": ""}, "strategy.type": "Recreate",
            "ingress": {"enabled": True, "hosts": [{"host": "canvas.example.org"}]},
        },
        (),
    ),
    "nothing kept": ({"persistence.enabled": False, "model.weights": "stripped", "tests.enabled": False}, ()),
    "DRA": ({"gpu.dra.enabled": True, "gpu.nodeSelection": "none"}, ()),
    "MIG": ({"gpu.mig": "1g.24gb", "model.context": 4096, "model.slots": 1, "topologySpread.enabled": False}, ()),
    "watched": (
        {
            "metrics.serviceMonitor.enabled": True, "metrics.prometheusRule.enabled": True,
            "metrics.dashboard.enabled": True, "autoscaling.enabled": True, "networkPolicy.enabled": True,
        },
        MONITORING,
    ),
    "routed": (
        {
            "autoscaling": {"enabled": True, "type": "keda", "prometheus": {"serverAddress": "http://prometheus:9090"}},
            "httpRoute": {"enabled": True, "parentRefs": PARENT, "hostnames": ["a.example.org"]},
            "grpcRoute": {"enabled": True, "parentRefs": PARENT, "hostnames": ["b.example.org"]},
            "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
            "metrics.podMonitor.enabled": True,
        },
        MONITORING + GATEWAY,
    ),
    "all by hand": (
        {
            "pipeline.mode": "none", "model.path": "/bundle", "gpu.nodeSelection": "computeCapability",
            "service.type": "LoadBalancer", "env": [{"name": "A", "value": "b"}], "podLabels": {"team": "a"},
            "extraVolumes": [{"name": "more", "emptyDir": {}}], "nodeSelector": {"pool": "gpu"}, "server.host": "::",
            "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}], "podAnnotations": {"note": "x"},
            "podDisruptionBudget.enabled": False,
            "fullnameOverride": "a-very-long-name-that-goes-on-and-on-and-on-until-here",
        },
        (),
    ),
}  # fmt: skip


def cases() -> list[tuple[str, str, str]]:
    """A Latin square: every profile with every version, each with every option, and every profile with every option."""
    profiles, options = profile_names(), list(OPTIONS)
    assert len(profiles) <= len(options), "more GPUs than options: a pair would be missing"
    return [
        (profile, options[(row + column) % len(options)], version)
        for row, profile in enumerate(profiles)
        for column, version in enumerate(VERSIONS)
    ]


@pytest.mark.parametrize(("profile", "option", "version"), cases())
def test_what_is_rendered_keeps_the_rules(profile: str, option: str, version: str) -> None:
    values, apis = OPTIONS[option]
    on_gpu = load_profile(profile).choices.compiler.value != "torch"
    if option == "DRA" and on_gpu and int(version.split(".")[1]) < 32:
        assert "gpu.dra.enabled" in refusal(profile, values, version)
        return
    objects = render(profile, values, version, apis)
    assert faults(objects, profile, version) == []


@pytest.mark.parametrize("option", OPTIONS)
def test_helm_3_renders_the_same(option: str) -> None:
    values, apis = OPTIONS[option]
    if option == "DRA":
        apis = ("resource.k8s.io/v1",)  # helm 4 knows it by itself
    assert render("h100", values, "1.34", apis, 3) == render("h100", values, "1.34", apis, 4)


def server(objects: list[Object]) -> Object:
    return containers(server_pod(objects))[1]


Change = Callable[[list[Object]], Any]
PLANTED: dict[str, Change] = {
    "may run as root": lambda o: server_pod(o)["spec"]["securityContext"].pop("runAsNonRoot"),
    "no seccomp": lambda o: server_pod(o)["spec"]["securityContext"].pop("seccompProfile"),
    "token for the API": lambda o: one(o, "Pod")["spec"].pop("automountServiceAccountToken"),
    "root file system": lambda o: containers(server_pod(o))[0]["securityContext"].pop("readOnlyRootFilesystem"),
    "keeps capabilities": lambda o: server(o)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
    "no fixed tag": lambda o: server(o).update(image="canvasrt/server:latest"),
    "no limit of memory": lambda o: server(o)["resources"]["limits"].pop("memory"),
    "that are no text": lambda o: server(o)["resources"]["limits"].update({"nvidia.com/gpu": 1}),
    "not declared": lambda o: server_pod(o)["spec"]["volumes"].pop(),
    "is not the canary": lambda o: server(o)["livenessProbe"]["exec"].update(command=["true"]),
    "64 MiB": lambda o: server(o)["volumeMounts"].pop(-2),
    "can change the models": lambda o: server(o)["volumeMounts"][1].pop("readOnly"),
    "asks for 2 GPUs": lambda o: server(o)["resources"]["limits"].update({"nvidia.com/gpu": "2"}),
    "the server has 0 GPUs": lambda o: server(o)["resources"]["limits"].pop("nvidia.com/gpu"),
    "sees all": lambda o: one(o, "Pod")["spec"]["containers"][0]["env"].pop(),
    "gets a token": lambda o: server(o).update(env=[{"name": "HF_TOKEN", "value": "x"}]),
    "no ConfigMap": lambda o: o.remove(one(o, "ConfigMap")),
    "no PersistentVolumeClaim": lambda o: o.remove(one(o, "PersistentVolumeClaim")),
    "no ServiceAccount": lambda o: o.remove(one(o, "ServiceAccount")),
    "finds no server": lambda o: one(o, "Service", "demo-canvasrt")["spec"]["selector"].update(a="b"),
    "finds other Pods": lambda o: one(o, "Service", "demo-canvasrt")["spec"].update(
        selector={"app.kubernetes.io/instance": "demo"}
    ),
    "is there twice": lambda o: o.append(one(o, "ServiceAccount")),
    "is no name": lambda o: one(o, "ServiceAccount")["metadata"].update(name="Demo_"),
    "Additional properties": lambda o: one(o, "Deployment")["spec"].update(replica=1),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_the_checks_find_a_planted_fault(fault: str) -> None:
    objects = copy.deepcopy(render("h100"))
    assert faults(objects, "h100", "1.34") == []
    PLANTED[fault](objects)
    assert fault in "\n".join(faults(objects, "h100", "1.34"))


def test_every_pod_is_checked() -> None:
    objects = render("h100", {"pipeline.mode": "job"})
    assert [name.split()[0] for name, _ in pods(objects)] == ["Deployment", "Job", "Pod"]
