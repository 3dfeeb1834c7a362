"""Installs, upgrades, rolls back and uninstalls the chart on a real Kubernetes control plane.

    .venv/bin/python scripts/cluster_check.py --binaries FOLDER

FOLDER holds etcd, kube-apiserver, kube-scheduler and kube-controller-manager of Kubernetes 1.34 or newer, such as those
of a release of Kubernetes and of etcd. Needs no node, no Docker and no network; takes three minutes for each helm on 2
cores. No container runs: what runs in them is tested in tests/test_images.py and tests/test_pipeline.py. Prints a line
for each check; exit code 1 if one fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from control_plane import Cluster, Kubelet, control_plane, missing

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "canvasrt"
HELM = Path(sys.prefix) / "helm"
NAMESPACE = "models"
WAIT_SECONDS = 60.0
OPERATORS = {  # group, version and kinds of what the chart can use where it is installed
    "monitoring.coreos.com/v1": ("ServiceMonitor", "PodMonitor", "PrometheusRule"),
    "keda.sh/v1alpha1": ("ScaledObject",),
    "gateway.networking.k8s.io/v1": ("HTTPRoute", "GRPCRoute"),
    "inference.networking.k8s.io/v1": ("InferencePool",),
}
Object = dict[str, Any]
CHECKS = (  # in this order: each goes on where the one before has left the cluster
    "a_release_starts_on_a_node_with_its_gpu",
    "the_test_hook_passes_and_fails_with_its_pod",
    "a_node_with_eight_gpus_takes_eight_replicas_and_no_ninth",
    "an_upgrade_rolls_though_no_gpu_is_free_and_a_rollback_finds_the_old_bundle",
    "an_upgrade_that_changes_nothing_restarts_nothing",
    "a_drain_takes_one_pod_at_a_time",
    "a_job_prepares_once_for_all_and_again_when_something_changes",
    "replicas_of_a_stateful_set_have_volumes_of_their_own",
    "a_slice_and_a_claim_find_their_nodes",
    "what_needs_an_operator_is_refused_and_works_with_it",
    "an_hpa_takes_over_the_replicas",
    "uninstall_leaves_the_volume_and_a_new_install_takes_it",
)


class Check:
    """One session on the cluster; each public method is a check, in order, and raises AssertionError."""

    def __init__(self, cluster: Cluster, kubelet: Kubelet, major: int) -> None:
        self._cluster, self._kubelet, self._major = cluster, kubelet, major

    def helm(self, *arguments: str, check: bool = True) -> str:
        command = [str(HELM / str(self._major) / "helm"), *arguments, "-n", NAMESPACE]
        command += ["--kubeconfig", str(self._cluster.kubeconfig)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert (done.returncode == 0) == check, done.stdout + done.stderr
        return done.stdout if check else done.stderr

    def install(self, name: str, profile: str, *sets: str, verb: str = "install", wait: bool = True) -> str:
        values = ["-f", str(CHART / "profiles" / f"{profile}.yaml"), *(each for one in sets for each in ("--set", one))]
        waiting = ["--wait", "--timeout", "3m"] if wait else []
        return self.helm(verb, name, str(CHART), *values, *waiting)

    def pods(self, name: str, component: str = "server") -> list[Object]:
        labels = f"app.kubernetes.io/instance={name},app.kubernetes.io/component={component}"
        return self._cluster.get("pods", "-n", NAMESPACE, "-l", labels)

    def nodes(self, name: str) -> list[str]:
        return sorted(str(pod["spec"].get("nodeName")) for pod in self.pods(name))

    def bundle(self, name: str) -> str:
        text = self._cluster.kubectl("get", "configmap", f"{name}-canvasrt-pipeline", "-n", NAMESPACE, "-o", "json")
        lines = str(json.loads(text)["data"]["pipeline.yaml"]).splitlines()
        return next(line for line in lines if line.startswith("  name: "))

    def a_release_starts_on_a_node_with_its_gpu(self) -> None:
        self.install("demo", "h100")
        assert self.nodes("demo") == ["h100-0"]
        self.install("spark", "dgx-spark")
        assert self.nodes("spark") == ["spark-0"]
        (pod,) = self.pods("spark")
        assert pod["spec"]["containers"][0]["image"].endswith("-rtx")

    def the_test_hook_passes_and_fails_with_its_pod(self) -> None:
        self.helm("test", "demo")
        self._kubelet.failing.add("generate")
        try:
            self.helm("test", "demo", check=False)
        finally:
            self._kubelet.failing.clear()

    def a_node_with_eight_gpus_takes_eight_replicas_and_no_ninth(self) -> None:
        eight = ("replicaCount=8", "persistence.accessMode=ReadWriteMany", "model.source=hf://a/b@1")
        self.helm("uninstall", "demo", "--wait")
        self._delete_claim("demo-canvasrt-models")  # of another access mode, which can't be changed
        self.install("demo", "h100", *eight)
        assert self.nodes("demo") == ["h100-0"] * 8
        self._cluster.kubectl("scale", "deployment/demo-canvasrt", "--replicas=9", "-n", NAMESPACE)
        last = self._until(lambda: self._unscheduled("demo"))
        assert "nvidia.com/gpu" in last, last
        self._cluster.kubectl("scale", "deployment/demo-canvasrt", "--replicas=8", "-n", NAMESPACE)
        self._until(lambda: len(self.pods("demo")) == 8)

    def an_upgrade_rolls_though_no_gpu_is_free_and_a_rollback_finds_the_old_bundle(self) -> None:
        before, pods = self.bundle("demo"), {pod["metadata"]["name"] for pod in self.pods("demo")}
        same = ("replicaCount=8", "persistence.accessMode=ReadWriteMany", "model.source=hf://a/b@1")
        self.install("demo", "h100", *same, "model.context=4096", verb="upgrade")
        assert self.bundle("demo") != before
        assert not pods & {pod["metadata"]["name"] for pod in self.pods("demo") if pod["status"]["phase"] == "Running"}
        self.helm("rollback", "demo", "1", "--wait", "--timeout", "3m")
        assert self.bundle("demo") == before
        assert self.nodes("demo") == ["h100-0"] * 8

    def an_upgrade_that_changes_nothing_restarts_nothing(self) -> None:
        names = sorted(pod["metadata"]["name"] for pod in self.pods("demo"))
        self.helm("upgrade", "demo", str(CHART), "--reuse-values", "--set", "service.annotations.a=b", "--wait")
        assert sorted(pod["metadata"]["name"] for pod in self.pods("demo")) == names

    def a_drain_takes_one_pod_at_a_time(self) -> None:
        self._until(lambda: self._allowed("demo") == 1)
        names = [pod["metadata"]["name"] for pod in self.pods("demo")]
        said = [self._evict(name) for name in names[:2]]
        assert "disruption budget" not in said[0], said[0]
        assert "disruption budget" in said[1], said[1]

    def a_job_prepares_once_for_all_and_again_when_something_changes(self) -> None:
        sets = ("pipeline.mode=job", "persistence.accessMode=ReadWriteMany", "replicaCount=2")
        self.install("jobs", "rtx-5090", *sets)
        labels = "app.kubernetes.io/instance=jobs"
        assert len(self._cluster.get("jobs", "-n", NAMESPACE, "-l", labels)) == 1
        (pod,) = self.pods("jobs", "pipeline")
        assert pod["spec"]["nodeName"] != "spark-0"  # it needs no GPU, so any node: but a volume binds it to none here
        first = self._cluster.get("jobs", "-n", NAMESPACE, "-l", labels)[0]["metadata"]["name"]
        self.install("jobs", "rtx-5090", *sets, "model.context=4096", verb="upgrade")
        (job,) = self._cluster.get("jobs", "-n", NAMESPACE, "-l", labels)
        assert job["metadata"]["name"] != first
        self.helm("uninstall", "jobs", "--wait")

    def replicas_of_a_stateful_set_have_volumes_of_their_own(self) -> None:
        self.install("own", "rtx-5090", "statefulSet.enabled=true", "replicaCount=2")
        claims = [each["metadata"]["name"] for each in self._cluster.get("pvc", "-n", NAMESPACE)]
        assert {"models-own-canvasrt-0", "models-own-canvasrt-1"} <= set(claims), claims
        self.helm("uninstall", "own", "--wait")

    def a_slice_and_a_claim_find_their_nodes(self) -> None:
        self.install("slice", "h100", "gpu.mig=2g.20gb")
        assert self.nodes("slice") == ["h100-mig"]
        self.install("claim", "b200", "gpu.dra.enabled=true", "gpu.nodeSelection=none")
        assert self.nodes("claim") == ["b200-dra"]
        claims = self._cluster.get("resourceclaims", "-n", NAMESPACE)
        assert claims[0]["status"]["allocation"]["devices"]["results"][0]["driver"] == "gpu.nvidia.com"
        for name in ("slice", "claim"):
            self.helm("uninstall", name, "--wait")

    def what_needs_an_operator_is_refused_and_works_with_it(self) -> None:
        sets = (
            "metrics.serviceMonitor.enabled=true", "metrics.prometheusRule.enabled=true",
            "metrics.dashboard.enabled=true", "networkPolicy.enabled=true", "httpRoute.enabled=true",
            "httpRoute.parentRefs[0].name=public", "httpRoute.hostnames={a.example.org}",
            "grpcRoute.hostnames={b.example.org}",
            "grpcRoute.enabled=true", "grpcRoute.parentRefs[0].name=public", "inferencePool.enabled=true",
            "inferencePool.endpointPicker.name=picker", "autoscaling.enabled=true", "autoscaling.type=keda",
            "autoscaling.prometheus.serverAddress=http://prometheus:9090", "ingress.enabled=true",
            "ingress.hosts[0].host=a.b",
        )  # fmt: skip
        values = ["-f", str(CHART / "profiles" / "rtx-5090.yaml"), *(each for one in sets for each in ("--set", one))]
        said = self.helm("install", "all", str(CHART), *values, check=False)
        assert "this cluster has no API" in said, said
        for api, kinds in OPERATORS.items():
            for kind in kinds:
                self._cluster.apply(_definition(*api.split("/"), kind))
        self._until(lambda: "ScaledObject" in self._cluster.kubectl("api-resources", "--api-group=keda.sh"))
        self.helm("install", "all", str(CHART), *values, "--wait", "--timeout", "3m")
        self.helm("uninstall", "all", "--wait")
        for api, kinds in OPERATORS.items():
            for kind in kinds:
                self._cluster.kubectl("delete", "crd", f"{kind.lower()}s.{api.split('/')[0]}")

    def an_hpa_takes_over_the_replicas(self) -> None:
        self.install("scaled", "rtx-5090", "autoscaling.enabled=true", "autoscaling.minReplicas=1")
        (scaler,) = self._cluster.get("hpa", "-n", NAMESPACE)
        assert scaler["spec"]["scaleTargetRef"]["name"] == "scaled-canvasrt"
        self.helm("uninstall", "scaled", "--wait")

    def uninstall_leaves_the_volume_and_a_new_install_takes_it(self) -> None:
        for name in ("demo", "spark"):
            self.helm("uninstall", name, "--wait")
        self._cluster.kubectl("delete", "pod", "demo-canvasrt-test", "-n", NAMESPACE)  # hooks are not helm's to remove
        kinds = "all,configmap,secret,serviceaccount,pdb,networkpolicy"
        labels = "app.kubernetes.io/name=canvasrt"
        self._until(lambda: not self._cluster.kubectl("get", kinds, "-n", NAMESPACE, "-l", labels, "-o", "name"))
        uid = self._claim("demo-canvasrt-models")
        self.install("demo", "h100", "persistence.accessMode=ReadWriteMany")
        assert self._claim("demo-canvasrt-models") == uid
        self.helm("uninstall", "demo", "--wait")

    def _claim(self, name: str) -> str:
        return self._cluster.kubectl("get", "pvc", name, "-n", NAMESPACE, "-o", "jsonpath={.metadata.uid}")

    def _delete_claim(self, name: str) -> None:
        self._cluster.kubectl("delete", "pvc", name, "-n", NAMESPACE)

    def _unscheduled(self, name: str) -> str:
        for pod in self.pods(name):
            for condition in pod["status"].get("conditions", []):
                if condition.get("reason") == "Unschedulable":
                    return str(condition["message"])
        return ""

    def _allowed(self, name: str) -> int:
        (budget,) = (
            each for each in self._cluster.get("pdb", "-n", NAMESPACE) if each["metadata"]["name"] == f"{name}-canvasrt"
        )
        return int(budget["status"].get("disruptionsAllowed", 0))

    def _evict(self, pod: str) -> str:
        eviction = {
            "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}
        }  # fmt: skip
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
        return self._cluster.kubectl("create", "--raw", path, "-f", "-", stdin=eviction, check=False)

    def _until(self, true: Callable[[], Any]) -> Any:
        last = time.monotonic() + WAIT_SECONDS
        while not (value := true()):
            assert time.monotonic() < last, "it did not happen"
            time.sleep(0.3)
        return value


def furnish(cluster: Cluster) -> None:
    """A namespace that enforces the restricted Pod standard, and nodes as GPU Feature Discovery labels them."""
    enforced = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": enforced}})
    for name in ("high",):
        cluster.apply(
            {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": 1}
        )

    def gpu(name: str, product: str, capability: str, count: int, arch: str = "amd64", resource: str = "gpu") -> None:
        major, minor = capability.split(".")
        labels = {f"nvidia.com/gpu.{key}": value for key, value in
                  {"product": product, "compute.major": major, "compute.minor": minor}.items()}  # fmt: skip
        cluster.node(name, arch, labels, {f"nvidia.com/{resource}": str(count)} if count else {})

    cluster.node("cpu-0", "amd64", {}, {})
    gpu("h100-0", "NVIDIA-H100-80GB-HBM3", "9.0", 8)
    gpu("h100-mig", "NVIDIA-H100-80GB-HBM3-MIG-2g.20gb", "9.0", 3, resource="mig-2g.20gb")
    gpu("rtx-0", "NVIDIA-GeForce-RTX-5090", "12.0", 2)
    gpu("spark-0", "NVIDIA-GB10", "12.1", 1, arch="arm64")
    gpu("b200-dra", "NVIDIA-B200", "10.0", 0)
    cluster.apply({
        "apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass", "metadata": {"name": "gpu.nvidia.com"},
        "spec": {"selectors": [{"cel": {"expression": "device.driver == 'gpu.nvidia.com'"}}]},
    })  # fmt: skip
    pool = {"name": "b200-dra", "generation": 1, "resourceSliceCount": 1}
    cluster.apply({
        "apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": "b200-dra-gpu"},
        "spec": {"driver": "gpu.nvidia.com", "nodeName": "b200-dra", "pool": pool, "devices": [{"name": "gpu-0"}]},
    })  # fmt: skip


def _definition(group: str, version: str, kind: str) -> Object:
    """A custom resource that takes anything: what the chart writes is checked against schemas in the tests."""
    plural = f"{kind.lower()}s"
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    meta: Object = {"name": f"{plural}.{group}"}
    if group.endswith("k8s.io"):
        meta["annotations"] = {"api-approved.kubernetes.io": "unapproved, for a check"}
    names = {"plural": plural, "singular": kind.lower(), "kind": kind, "listKind": f"{kind}List"}
    versions = [{"name": version, "served": True, "storage": True, "schema": schema}]
    spec = {"group": group, "scope": "Namespaced", "names": names, "versions": versions}
    return {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": meta, "spec": spec}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the chart on a real control plane.")
    parser.add_argument("--binaries", type=Path, required=True, help="folder with the control plane's programs")
    parser.add_argument("--helm", type=int, action="append", choices=(3, 4), help="major version; both by default")
    given = parser.parse_args()
    if lacking := missing(given.binaries):
        print(f"{given.binaries} lacks {', '.join(lacking)}: take them from releases of Kubernetes and etcd")
        return 2
    outcomes = [each for major in given.helm or (4, 3) for each in session(given.binaries.resolve(), major)]
    return 0 if all(outcomes) else 1


def session(binaries: Path, major: int) -> Iterator[bool]:
    """Every check on a new cluster with one version of helm: whether it passed."""
    with (
        tempfile.TemporaryDirectory(prefix="cluster-check-") as folder,
        control_plane(binaries, Path(folder), str(HELM / "4" / "kubectl")) as cluster,
    ):
        version = json.loads(cluster.kubectl("get", "--raw", "/version"))["gitVersion"]
        furnish(cluster)
        kubelet = Kubelet(cluster)
        kubelet.start()
        check = Check(cluster, kubelet, major)
        for name in CHECKS:
            began = time.monotonic()
            fault = None
            try:
                getattr(check, name)()
            except (AssertionError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                fault = f"FAILED: {error!r}"
            took = time.monotonic() - began
            print(
                f"helm {major}, Kubernetes {version}: {name.replace('_', ' ')}: {fault or 'ok'} ({took:.0f} s)",
                flush=True,
            )
            yield fault is None
        kubelet.stop()


if __name__ == "__main__":
    sys.exit(main())
