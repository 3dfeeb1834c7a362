"""A Kubernetes control plane on this machine, without nodes: etcd, API server, scheduler and controllers are real.

What is missing is the kubelet: `Kubelet` says of every Pod that is scheduled what a kubelet would say of one that runs
well, and makes a volume for every claim. So everything up to the start of containers is real, and no container runs.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BINARIES = ("etcd", "kube-apiserver", "kube-scheduler", "kube-controller-manager")
TOKEN = "cluster-check"  # of a server on the loopback address that lives for minutes
START_SECONDS = 90.0
CONTROLLERS = (
    "deployment-controller,replicaset-controller,statefulset-controller,job-controller,disruption-controller,"
    "serviceaccount-controller,garbage-collector-controller,resourceclaim-controller,persistentvolume-binder-controller,"
    "persistentvolume-protection-controller,persistentvolumeclaim-protection-controller,namespace-controller"
)
Object = dict[str, Any]


class Cluster:
    """A running control plane. Attributes: ``kubeconfig``, for helm and kubectl."""

    def __init__(self, folder: Path, kubectl: str) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self._kubectl = kubectl

    def kubectl(self, *arguments: str, stdin: Object | None = None, check: bool = True) -> str:
        command = [self._kubectl, "--kubeconfig", str(self.kubeconfig), *arguments]
        text = None if stdin is None else json.dumps(stdin)
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
        if check and done.returncode != 0:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout if done.returncode == 0 else done.stderr

    def get(self, *what: str) -> list[Object]:
        return list(json.loads(self.kubectl("get", *what, "-o", "json"))["items"])

    def apply(self, each: Object) -> None:
        self.kubectl("apply", "--server-side", "-f", "-", stdin=each)

    def status(self, kind: str, name: str, status: Object, namespace: str = "default") -> None:
        patch = json.dumps({"status": status})
        # Gone meanwhile is no fault: another step may have removed it.
        self.kubectl(
            "patch", kind, name, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch, check=False
        )

    def node(self, name: str, architecture: str, labels: dict[str, str], resources: dict[str, str]) -> None:
        """A node that is ready, with these resources to give."""
        own = {"kubernetes.io/arch": architecture, "kubernetes.io/os": "linux", "kubernetes.io/hostname": name}
        meta = {"name": name, "labels": own | labels}
        self.apply({"apiVersion": "v1", "kind": "Node", "metadata": meta})
        room = {"cpu": "128", "memory": "2Ti", "pods": "110", "ephemeral-storage": "10Ti"} | resources
        ready = {
            "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "stand-in",
            "lastHeartbeatTime": _now(), "lastTransitionTime": _now(),
        }  # fmt: skip
        self.status("node", name, {"capacity": room, "allocatable": room, "conditions": [ready]})
        # The API server taints new nodes until their controller, which does not run here, has seen them.
        self.kubectl("patch", "node", name, "--type=merge", "-p", '{"spec":{"taints":null}}')


class Kubelet(threading.Thread):
    """Stands in for kubelets and the volume provisioner. ``failing``: names of containers that never get well."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.failing: set[str] = set()
        self._cluster = cluster
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.3):
            with contextlib.suppress(
                RuntimeError, subprocess.TimeoutExpired, KeyError
            ):  # of a cluster that is stopping
                self._volumes()
                for pod in self._cluster.get("pods", "-A"):
                    self._pod(pod)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _volumes(self) -> None:
        for claim in self._cluster.get("pvc", "-A"):
            if claim["status"].get("phase") == "Bound" or "deletionTimestamp" in claim["metadata"]:
                continue
            meta, spec = claim["metadata"], claim["spec"]
            volume: Object = {
                "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"pv-{meta['uid'][:8]}"},
                "spec": {
                    "capacity": spec["resources"]["requests"], "accessModes": spec["accessModes"],
                    "storageClassName": spec.get("storageClassName", ""), "hostPath": {"path": "/nowhere"},
                    "claimRef": {"namespace": meta["namespace"], "name": meta["name"]},
                },
            }  # fmt: skip
            self._cluster.apply(volume)

    def _pod(self, pod: Object) -> None:
        meta, spec, status = pod["metadata"], pod["spec"], pod["status"]
        if not spec.get("nodeName"):
            return
        if "deletionTimestamp" in meta:
            self._cluster.kubectl(
                "delete", "pod", meta["name"], "-n", meta["namespace"], "--grace-period=0", "--force", check=False
            )
            return
        once = spec["restartPolicy"] == "Never"
        names = [each["name"] for each in spec["containers"]]
        bad = bool(self.failing.intersection(names))
        phase = ("Failed" if bad else "Succeeded") if once else "Running"
        if status.get("phase") == phase and once:
            return
        ready = "True" if phase == "Running" and not bad else "False"
        if any(each["type"] == "Ready" and each["status"] == ready for each in status.get("conditions", [])):
            return
        ended = {"terminated": {"exitCode": int(bad), "reason": "Error" if bad else "Completed", "finishedAt": _now()}}
        state = ended if once else {"running": {"startedAt": _now()}}
        container = {"ready": ready == "True", "restartCount": 0, "image": "stand-in", "imageID": "", "state": state}
        conditions = [
            {"type": kind, "status": ready, "lastTransitionTime": _now()} for kind in ("Ready", "ContainersReady")
        ]
        new = {
            "phase": phase, "conditions": conditions, "startTime": _now(),
            "containerStatuses": [{"name": name, **container} for name in names],
        }  # fmt: skip
        self._cluster.status("pod", meta["name"], new, meta["namespace"])


def missing(folder: Path) -> list[str]:
    return [name for name in BINARIES if not os.access(folder / name, os.X_OK)]


@contextlib.contextmanager
def control_plane(binaries: Path, folder: Path, kubectl: str) -> Iterator[Cluster]:
    """Starts all four, and ends them. Raises RuntimeError with the last lines of what did not start."""
    client, peer, port = (_free_port() for _ in range(3))
    key = folder / "service-account.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    tokens = folder / "tokens.csv"
    tokens.write_text(f'{TOKEN},admin,admin,"system:masters"\n')
    cluster = Cluster(folder, kubectl)
    server = f"https://127.0.0.1:{port}"
    cluster.kubeconfig.write_text(json.dumps(_kubeconfig(server)))
    etcd = f"http://127.0.0.1:{client}"
    config = f"--kubeconfig={cluster.kubeconfig}"
    with contextlib.ExitStack() as stack:

        def start(name: str, *arguments: str) -> None:
            stack.enter_context(_running([str(binaries / name), *arguments], folder / f"{name}.log"))

        start(
            "etcd", f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
        )  # fmt: skip
        start(
            "kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={port}", "--bind-address=127.0.0.1",
            f"--cert-dir={folder / 'certificates'}", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}", "--service-account-issuer=https://cluster-check",
            f"--token-auth-file={tokens}", "--authorization-mode=RBAC", "--service-cluster-ip-range=10.0.0.0/24",
            "--profiling=false",
        )  # fmt: skip
        _wait(cluster, folder / "kube-apiserver.log")
        start(
            "kube-controller-manager", config, f"--service-account-private-key-file={key}",
            f"--controllers={CONTROLLERS}", "--leader-elect=false", f"--secure-port={_free_port()}",
            "--bind-address=127.0.0.1",
        )  # fmt: skip
        start(
            "kube-scheduler",
            config,
            "--leader-elect=false",
            f"--secure-port={_free_port()}",
            "--bind-address=127.0.0.1",
        )
        yield cluster


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[None]:
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)  # nothing of it is kept
        process.wait()


def _wait(cluster: Cluster, log: Path) -> None:
    last = time.monotonic() + START_SECONDS
    while "ok" not in cluster.kubectl("get", "--raw", "/readyz", check=False):
        if time.monotonic() > last:
            raise RuntimeError("the API server did not start:\n" + "\n".join(log.read_text().splitlines()[-10:]))
        time.sleep(0.5)


def _kubeconfig(server: str) -> Object:
    one: Object = {"apiVersion": "v1", "kind": "Config", "current-context": "check"}
    one["clusters"] = [{"name": "check", "cluster": {"server": server, "insecure-skip-tls-verify": True}}]
    one["users"] = [{"name": "check", "user": {"token": TOKEN}}]
    one["contexts"] = [{"name": "check", "context": {"cluster": "check", "user": "check"}}]
    return one


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
