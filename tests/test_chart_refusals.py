"""Wrong values of the chart are refused by the name of their key, by real helm 4 and 3, before anything is rendered."""

import pytest

from helm import Object, refusal

WRONG: list[tuple[str, str | None, Object, str]] = [
    ("no profile", None, {}, "profile.name"),
    ("unknown key", "h100", {"replicas": 2}, "replicas"),
    ("unknown key inside", "h100", {"server.drain": 2}, "drain"),
    ("wrong type", "h100", {"replicaCount": "two"}, "replicaCount"),
    ("negative", "h100", {"replicaCount": -1}, "replicaCount"),
    ("floating tag", "h100", {"image.tag": "latest"}, "image/tag"),
    ("floating builder", "h100", {"pipeline.image.tag": "main"}, "pipeline/image/tag"),
    ("tag in the repository", "h100", {"image.repository": "a/b:c"}, "image/repository"),
    ("architecture", "dgx-spark", {"image.architectures": ["amd64"]}, "image.architectures"),
    ("two mechanisms", "h100", {"gpu.mig": "1g.10gb", "gpu.dra.enabled": True}, "gpu.mig and gpu.dra.enabled"),
    ("other two", "h100", {"gpu.mig": "1g.10gb", "gpu.resourceName": "x.com/gpu"}, "gpu.resourceName and gpu.mig"),
    ("GPU by hand", "h100", {"resources.limits": {"nvidia.com/gpu": "2"}}, "resources.limits.nvidia.com/gpu"),
    ("quantity", "h100", {"resources.limits": {"memory": 3}}, "memory"),
    ("no Pods to protect", "h100", {"replicaCount": 0}, "replicaCount is 0 and podDisruptionBudget.enabled"),
    ("two places", "h100", {"hostPath.enabled": True}, "hostPath.enabled and persistence.enabled"),
    ("Job without a volume", "h100", {"pipeline.mode": "job", "persistence.enabled": False}, "pipeline.mode job"),
    ("Job for many volumes", "h100", {"pipeline.mode": "job", "statefulSet.enabled": True}, "statefulSet.enabled"),
    ("no source", "h100", {"model.source": ""}, "model.source"),
    ("unknown scheme", "h100", {"model.source": "ftp://a/b"}, "model/source"),
    ("no path", "h100", {"pipeline.mode": "none"}, "model.path"),
    ("path and pipeline", "h100", {"model.path": "/bundle"}, "model.path and pipeline.mode"),
    ("bundle for torch", "cpu", {"model.bundleSource": "/bundle"}, "model.bundleSource"),
    ("bundle and recipe", "rtx-4090", {"model.bundleSource": "/bundle"}, "model.quantize.recipe"),
    ("stripped from nowhere", "h100",
     {"model.bundleSource": "/b", "model.source": "", "model.weights": "stripped"}, "model.weights"),
    ("no products", "h100", {"profile.productNames": []}, "profile.productNames"),
    ("no capability", "h100",
     {"profile.computeCapability": "", "gpu.nodeSelection": "computeCapability"}, "computeCapability"),
    ("set twice", "h100", {"server.settings": {"slots": 2}, "model.slots": 2}, "server.settings.slots"),
    ("the chart's own", "h100", {"server.settings": {"drain_seconds": 2}}, "server.drainSeconds"),
    ("no such recipe name", "h100", {"model.quantize.recipe": "FP 8"}, "recipe"),
]  # fmt: skip


@pytest.mark.parametrize(("profile", "values", "key"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_wrong_values_are_refused_by_the_name_of_their_key(profile: str | None, values: Object, key: str) -> None:
    said = refusal(profile, values)
    assert key in said
    assert "nil pointer" not in said
    assert key.replace("/", ".") in refusal(profile, values, major=3).replace("/", ".")


def test_dra_is_refused_where_the_cluster_has_none() -> None:
    said = refusal("h100", {"gpu.dra.enabled": True}, "1.30")
    assert "gpu.dra.enabled is true" in said
    assert "1.30" in said


def test_a_cluster_that_is_too_old_is_refused() -> None:
    assert ">=1.28" in refusal("h100", {}, "1.27")
