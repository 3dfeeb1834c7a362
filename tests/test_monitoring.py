"""Alerts and dashboard agree with the metrics that the server has, and with the docs.

Where Prometheus's promtool is installed, it also fires every alert (tests/alerts.test.yaml).
"""

import copy
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from canvasrt.serve.metrics import FAMILIES
from promql import Series, faults, known

ROOT = Path(__file__).parents[1]
RULES = ROOT / "helm" / "canvasrt" / "files" / "alerts.yaml"
DASHBOARD = ROOT / "helm" / "canvasrt" / "files" / "dashboard.json"
UNIT_TESTS = ROOT / "tests" / "alerts.test.yaml"
PAGE = ROOT / "docs" / "alerts.md"
SEVERITIES = ("critical", "warning", "info")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
Rule = dict[str, Any]
Panel = dict[str, Any]


def rules() -> list[Rule]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded(every: list[Rule]) -> dict[str, Series]:
    return {rule["record"]: Series("gauge") for rule in every if "record" in rule}


def alerts(every: list[Rule]) -> list[Rule]:
    return [rule for rule in every if "alert" in rule]


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, flags=re.MULTILINE)


def rule_faults(every: list[Rule], page: str) -> Iterator[str]:
    """What is wrong with the rules: queries, texts, and their chapters in ``page``."""
    series = known(recorded(every))
    for rule in every:
        yield from faults(rule["expr"], series)
    for rule in alerts(every):
        name, said = rule["alert"], rule["annotations"]
        if rule["labels"]["severity"] not in SEVERITIES:
            yield f"{name}: severity {rule['labels']['severity']}"
        if set(said) != {"summary", "description", "runbook"} or not all(said.values()):
            yield f"{name}: annotations {sorted(said)}"
        if not said.get("summary", "").endswith((".", ").")) or not said.get("description", "").endswith("."):
            yield f"{name}: says no whole sentences"
        if said.get("runbook") != f"docs/alerts.md#{name.lower()}":
            yield f"{name}: runbook {said.get('runbook')}"
        used = set(re.findall(r"\{\{ ?(?:\$labels\.(\w+))", " ".join(said.values()))) - {""}
        if not used <= {"instance"}:
            yield f"{name}: speaks of the labels {used}, which not every target has"
    names = [rule["alert"] for rule in alerts(every)]
    chapters = headings(page)
    yield from (f"{name} is there twice" for name in {each for each in names if names.count(each) > 1})
    yield from (f"{name} has no chapter in docs/alerts.md" for name in names if name not in chapters)
    strangers = [each for each in chapters if each.startswith("CanvasRT") and each not in names]
    yield from (f"docs/alerts.md speaks of {each}, which is no alert" for each in strangers)


def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text(encoding="utf-8")))


def queries(panel: Panel) -> list[str]:
    return [target["expr"] for target in panel.get("targets", [])]


def dashboard_faults(board: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the dashboard: queries, places, units, sources."""
    panels = board["panels"]
    ids = [panel["id"] for panel in panels]
    yield from (f"id {each} is there twice" for each in {each for each in ids if ids.count(each) > 1})
    for one, other in itertools.combinations(panels, 2):
        if overlap(one["gridPos"], other["gridPos"]):
            yield f"{one['title']} lies on {other['title']}"
    for panel in panels:
        place = panel["gridPos"]
        if place["x"] < 0 or place["x"] + place["w"] > 24:
            yield f"{panel['title']} is wider than the page"
        if panel["type"] != "row":
            yield from panel_faults(panel)
    variables = {each["name"] for each in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([panels, board["annotations"]]))) - {"__rate_interval"}
    yield from (f"no variable {each}" for each in used - variables)
    for each in [*board["annotations"]["list"], *board["templating"]["list"]]:
        if each.get("datasource", SOURCE) != SOURCE:
            yield f"{each['name']} has a data source of its own"
    for each in board["annotations"]["list"]:
        yield from faults(each["expr"], known())


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in (("x", "w"), ("y", "h"))
    )


def panel_faults(panel: Panel) -> Iterator[str]:
    title = panel["title"]
    if not panel["description"].endswith("."):
        yield f"{title} has no description"
    if not panel["fieldConfig"]["defaults"].get("unit"):
        yield f"{title} has no unit"
    if panel["datasource"] != SOURCE or any("datasource" in target for target in panel["targets"]):
        yield f"{title} has a data source of its own"
    if not queries(panel):
        yield f"{title} asks nothing"
    references = [target["refId"] for target in panel["targets"]]
    if len(set(references)) != len(references):
        yield f"{title}: two queries have one refId"
    for query in queries(panel):
        # No recording rules: the dashboard must work for those who don't load them.
        yield from (f"{title}: {fault}" for fault in faults(query, known()))
        if query.count("{") != query.count('service=~"$service", instance=~"$instance"'):
            yield f"{title}: a series is not limited to the chosen servers"


def test_rules_and_runbook_agree_with_the_metrics() -> None:
    assert list(rule_faults(rules(), PAGE.read_text(encoding="utf-8"))) == []
    assert len(alerts(rules())) >= 12


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("canvasrt_slots", "canvasrt_slot", "canvasrt_slot is no metric of ours"),
        ("rate(canvasrt_denoising_steps_total[5m])", "canvasrt_denoising_steps_total", "it needs rate or increase"),
        ("deriv(canvasrt_requests_waiting[10m])", "rate(canvasrt_requests_waiting[10m])", "which is a gauge"),
        ('outcome="busy"', 'outcome="refused"', "no request ends as ['refused']"),
        ('outcome="busy"', 'result="busy"', "canvasrt_requests_total has no label result"),
        ("sum without (outcome)", "sum without (result)", "groups by ['result']"),
        ("canvasrt_first_canvas_seconds_bucket", "canvasrt_first_canvas_seconds", "is no metric of ours"),
        ("seconds_bucket[5m]", 'seconds_bucket{le="10"}[5m]', "is Prometheus's affair"),
        ("instance:canvasrt_busy:ratio_rate5m >", "instance:canvasrt_busy:ratio >", "is no metric of ours"),
        ("docs/alerts.md#canvasrtnoprogress", "docs/alerts.md#no-progress", "CanvasRTNoProgress: runbook"),
        ("severity: info", "severity: page", "severity page"),
        ("{{ $labels.instance }} has stopped", "{{ $labels.pod }} has stopped", "labels {'pod'}"),
        ("alert: CanvasRTSlotsFull", "alert: CanvasRTFull", "CanvasRTFull has no chapter"),
        ("alert: CanvasRTSlotsFull", "alert: CanvasRTFull", "speaks of CanvasRTSlotsFull, which is no alert"),
        (
            "canvasrt_requests_running / canvasrt_slots",
            "canvasrt_requests_running / (",
            "canvasrt_requests_running / (: ",
        ),
    ],
)
def test_a_planted_fault_in_a_rule_is_found(old: str, new: str, said: str) -> None:
    text = RULES.read_text(encoding="utf-8")
    assert old in text
    planted = [rule for group in yaml.safe_load(text.replace(old, new))["groups"] for rule in group["rules"]]
    found = list(rule_faults(planted, PAGE.read_text(encoding="utf-8")))
    assert any(said in fault for fault in found), found


def test_the_dashboard_agrees_with_the_metrics() -> None:
    board = dashboard()
    assert list(dashboard_faults(board)) == []
    assert board["uid"] == "canvasrt"
    assert board["schemaVersion"] >= 39


def test_every_metric_is_on_the_dashboard() -> None:
    text = " ".join(query for panel in dashboard()["panels"] for query in queries(panel))
    shown = set(re.findall(r"canvasrt_\w+", text))
    missing = {family.name for family in FAMILIES if not any(each.startswith(family.name) for each in shown)}
    # Each is a part of a panel about steps per canvas, which is their ratio.
    assert missing == {"canvasrt_canvases_total", "canvasrt_denoising_steps_total"}


def plant(panel: Panel, title: str) -> None:
    """A fault of that kind."""
    if title == "metric":
        panel["targets"][0]["expr"] = panel["targets"][0]["expr"].replace("canvasrt_requests", "canvasrt_request")
    elif title == "rate of a gauge":
        panel["targets"][0]["expr"] = panel["targets"][0]["expr"].replace("requests_total", "requests_waiting")
    elif title == "place":
        panel["gridPos"]["x"] -= 1
    elif title == "unit":
        panel["fieldConfig"]["defaults"]["unit"] = ""
    elif title == "id":
        panel["id"] = 1
    elif title == "source":
        panel["datasource"] = {"type": "prometheus", "uid": "PBFA97CFB590B2093"}
    elif title == "servers":
        panel["targets"][0]["expr"] = panel["targets"][0]["expr"].replace("$instance", "a")
    elif title == "variable":
        panel["targets"][0]["expr"] = panel["targets"][0]["expr"].replace("$instance", "$server")


@pytest.mark.parametrize(
    ("title", "said"),
    [
        ("metric", "canvasrt_request_total is no metric of ours"),
        ("rate of a gauge", "rate of canvasrt_requests_waiting, which is a gauge"),
        ("place", "lies on"),
        ("unit", "has no unit"),
        ("id", "id 1 is there twice"),
        ("source", "has a data source of its own"),
        ("servers", "is not limited to the chosen servers"),
        ("variable", "no variable server"),
    ],
)
def test_a_planted_fault_in_the_dashboard_is_found(title: str, said: str) -> None:
    board = copy.deepcopy(dashboard())
    plant(next(panel for panel in board["panels"] if panel["title"] == "Requests" and panel["type"] == "stat"), title)
    found = list(dashboard_faults(board))
    assert any(said in fault for fault in found), found


def test_promtool_fires_every_alert(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH: it comes with Prometheus")
    subprocess.run([promtool, "check", "rules", RULES], check=True, capture_output=True, timeout=60)
    code, said = promtool_test(promtool, UNIT_TESTS)
    assert code == 0, said
    text = UNIT_TESTS.read_text(encoding="utf-8")
    fired = {name for test in yaml.safe_load(text)["tests"] for name in expected_to_fire(test)}
    assert fired == {rule["alert"] for rule in alerts(rules())}
    # A rule that never fires must fail there.
    (tmp_path / "alerts.yaml").write_text(RULES.read_text().replace("ratio_rate5m > 0.02", "ratio_rate5m > 2"))
    (tmp_path / "alerts.test.yaml").write_text(text.replace("../helm/canvasrt/files/alerts.yaml", "alerts.yaml"))
    code, said = promtool_test(promtool, tmp_path / "alerts.test.yaml")
    assert code != 0
    assert "CanvasRTErrors" in said


def expected_to_fire(test: dict[str, Any]) -> Iterator[str]:
    """Names of the alerts that the unit test expects somewhere, in series or as notifications."""
    for each in test.get("alert_rule_test", []):
        if each["exp_alerts"]:
            yield each["alertname"]
    for each in test.get("promql_expr_test", []):
        if each["exp_samples"]:
            asked = " ".join([each["expr"], *(sample["labels"] for sample in each["exp_samples"])])
            yield from re.findall(r'alertname="(\w+)"', asked)


def promtool_test(promtool: str, file: Path) -> tuple[int, str]:
    """Exit code, and what it says."""
    command = [promtool, "test", "rules", str(file)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr
