"""``canvasrt doctor`` where kubectl reaches a cluster: nodes, what the cluster lacks, what to install."""

from pathlib import Path
from typing import Any

import pytest

import doctor_machines as kinds
from canvasrt.doctor import cluster
from canvasrt.doctor.machine import Answer
from doctor_machines import check, looked, node, printed, status


def test_a_laptop_whose_cluster_has_gpus() -> None:
    report = looked(kinds.laptop())
    assert report.faults == 0
    assert check(report, "cluster").finding == "context lab"
    for name, profile in (("gpu-1", "h100"), ("gpu-2", "h100"), ("spark-1", "dgx-spark")):
        assert check(report, f"node {name}").status == "ok"
        assert check(report, f"node {name}").finding.endswith(f"profile {profile}")
    assert "arm64" in check(report, "node spark-1").finding
    unlabelled = check(report, "node unlabelled")
    assert unlabelled.status == "warning"
    assert "has 4 GPUs and no label" in unlabelled.finding
    assert "gpu.nodeSelection=none" in unlabelled.fix
    assert check(report, "nodes without GPUs").finding == "1 of 5"
    assert check(report, "storage").finding == "default StorageClass local-path"
    assert status(report, "Prometheus Operator") == "ok"
    assert {status(report, name) for name in ("Gateway API", "KEDA", "inference extension", "DRA")} == {"skipped"}
    assert [fit.where for fit in report.fits] == [(), ("node gpu-1", "node gpu-2"), ("node spark-1",)]
    assert report.next[:2] == tuple(
        f"helm install demo helm/canvasrt -f helm/canvasrt/profiles/{name}.yaml" for name in ("h100", "dgx-spark")
    )
    for line in report.next[:2]:
        assert (Path(__file__).parents[1] / line.split()[-1]).is_file()


@pytest.mark.parametrize(
    ("change", "name", "wanted", "part"),
    [
        ({cluster.VERSION: kinds.kubernetes([], "v1.27.9")[cluster.VERSION]}, "Kubernetes", "fault", "1.28 or newer"),
        ({cluster.MAY["services"]: printed("no - no RBAC\n", 1)}, "permission", "fault", "can-i create services"),
        ({cluster.MAY["services"]: printed("", 1, "Forbidden")}, "permission", "skipped", ""),
        ({cluster.NODES: printed("", 1, "Error: nodes is forbidden")}, "nodes", "skipped", "Ask who"),
        ({cluster.CLASSES: kinds.listed([])}, "storage", "warning", "existingClaim"),
        ({cluster.CLASSES: kinds.listed([{"metadata": {"name": "slow"}}])}, "storage", "warning", "storageClass=slow"),
        ({cluster.HELM: kinds.MISSING}, "helm", "warning", "helm.sh"),
        ({cluster.HELM: printed("v3.9.0+g7ceeda6\n")}, "helm", "warning", "3.17"),
        ({cluster.APIS: printed("not JSON")}, "KEDA", "skipped", ""),
        ({cluster.VERSION: printed("", 1, "Unable to connect to the server")}, "cluster", "skipped", "kubectl"),
        ({cluster.CONTEXT: printed("", 1, "error: current-context is not set")}, "cluster", "skipped", ""),
    ],
)  # fmt: skip
def test_what_a_cluster_may_lack(change: dict[Any, Answer], name: str, wanted: str, part: str) -> None:
    machine = kinds.laptop()
    machine.answers |= change
    found = check(looked(machine), name)
    assert found.status == wanted, found
    assert part in found.fix


@pytest.mark.parametrize(
    ("given", "wanted", "part"),
    [
        (node("n", kinds.H100_LABELS, {"nvidia.com/gpu": "8"}, "arm64"), "warning", "the profile is for amd64"),
        (node("n", kinds.H100_LABELS, {"nvidia.com/gpu": "8"}, unschedulable=True), "warning", "takes no Pods"),
        (node("n", kinds.H100_LABELS, {"nvidia.com/gpu": "0"}), "warning", "no Pod can ask"),
        (node("n", kinds.H100_LABELS, {"nvidia.com/mig-1g.10gb": "7"}), "warning", "7 x mig-1g.10gb of"),
        (node("n", kinds.gpu_labels("Tesla-T4", "7.5", 15360), {"nvidia.com/gpu": "1"}), "warning", "no profile"),
        (node("n", kinds.gpu_labels("NVIDIA-L4", "8.9", 23034), {"nvidia.com/gpu": "1"}), "warning", "rtx-4090"),
    ],
)
def test_nodes_that_a_pod_would_not_start_on(given: dict[str, Any], wanted: str, part: str) -> None:
    machine = kinds.laptop()
    machine.answers[cluster.NODES] = kinds.listed([given])
    found = check(looked(machine), "node n")
    assert (found.status, part in found.finding) == (wanted, True), found
    assert found.fix


def test_a_cluster_that_gives_gpus_by_claims_is_installed_with_them() -> None:
    machine = kinds.laptop()
    machine.answers[cluster.NODES] = kinds.listed([node("n", kinds.H100_LABELS, {})])
    machine.answers[cluster.DEVICES] = kinds.listed([{"metadata": {"name": "gpu.nvidia.com"}}])
    report = looked(machine)
    assert (status(report, "DRA"), status(report, "node n")) == ("ok", "ok")
    assert report.next[0].endswith("h100.yaml --set gpu.dra.enabled=true")


def test_a_cluster_is_asked_only_where_it_is_wanted() -> None:
    machine = kinds.laptop()
    looked(machine, kubernetes=False)
    assert not [command for command in machine.asked if command[0] in ("kubectl", "helm")]
    alone = kinds.rtx_5090()
    assert check(looked(alone), "kubectl").status == "skipped"
    assert check(looked(alone, kubernetes=True), "kubectl").status == "fault"
    empty = kinds.laptop()
    empty.answers[cluster.NODES] = kinds.listed([])
    assert check(looked(empty), "GPU nodes").status == "warning"
    assert check(looked(empty, kubernetes=True), "GPU nodes").status == "fault"
    inside = kinds.laptop()
    inside.answers[cluster.CONTEXT] = printed("", 1, "error: current-context is not set")
    assert check(looked(inside, kubernetes=True), "cluster").finding == "the one that this Pod runs in"
