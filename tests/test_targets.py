"""docs/targets: the tables are the planner's, and what the pages tell people to type works as far as it can here.

That `canvasrt` commands parse and links lead somewhere is checked for all pages in tests/test_docs.py.
"""

import ast
import importlib.util
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from canvasrt.cli.main import app
from canvasrt.compile.budget import checked_budget
from canvasrt.compile.choices import SETTINGS, chosen_setting
from canvasrt.compile.forecast import forecast_steps
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import GB, Deployment, Setting
from canvasrt.pipeline.settings import Pipeline, load_pipeline
from canvasrt.profiles.profile import GpuProfile, load_profile, profile_names
from helm import CHART, Object, containers, faults, one, run, server_pod
from planning import PUBLISHED, ROOT

FOLDER = ROOT / "docs" / "targets"
DEPLOY = ROOT / "deploy"
FLAVORS = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}
EXTRAS = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}
LINES, COLUMNS = 110, 120
NOT_OURS = {  # Docker's, Linux's and Kubernetes' own words, and names of what says them
    'could not select device driver "nvidia"', "exec format error", "didn't match Pod's node affinity", "prepare",
    "OOMKilled",
}  # fmt: skip
MADE_BY_USERS = {"deploy/.env", "deploy/hf-token"}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("target_tables", ROOT / "scripts" / "target_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = load_script()
PAGES: dict[str, tuple[str, ...]] = TABLES.PAGES
COMPOSED = {page: names[0] for page, names in PAGES.items()}  # the profile that a page's commands are about


def text_of(page: str) -> str:
    return (FOLDER / f"{page}.md").read_text(encoding="utf-8")


def commands(page: str, program: str) -> Iterator[list[str]]:
    """The words of each line of a page's shell blocks that begins with a program."""
    for block in re.findall(r"^```sh\n(.*?)^```", text_of(page), flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(f"{program} "):
                yield shlex.split(line, comments=True)


def model(profile: GpuProfile) -> ModelSource:
    return ModelSource.open(PUBLISHED, profile.choices.recipe.value)


def test_every_page_is_known_and_short() -> None:
    assert {file.stem for file in FOLDER.glob("*.md")} == {*PAGES, TABLES.OVERVIEW}
    every = [name for names in PAGES.values() for name in names]
    assert sorted(every) == sorted(set(profile_names()) - {"cpu", "l40s"})
    for page in PAGES:
        lines = text_of(page).splitlines()
        assert len(lines) <= LINES, page
        assert [line for line in lines if len(line) > COLUMNS and not line.startswith("|")] == []
        for title in ("What you need", "What to expect", "What goes wrong first", "Not executed"):
            assert f"## {title}" in lines, page


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_tables_are_current_and_follow_the_profile(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of(page)
    assert TABLES.with_target_table(page, text) == text, "write it: .venv/bin/python scripts/generate_docs.py"

    def changed(name: str) -> GpuProfile:
        profile = load_profile(name)
        slots = profile.choices.slots.model_copy(update={"value": profile.choices.slots.value + 1})
        return profile.model_copy(update={"choices": profile.choices.model_copy(update={"slots": slots})})

    monkeypatch.setattr(TABLES, "load_profile", changed)
    assert TABLES.with_target_table(page, text) != text


@pytest.mark.parametrize(
    ("page", "change", "part"),
    [
        ("h100", lambda text: text.replace(TABLES.END, ""), "once and in order"),
        ("h100", lambda text: text + TABLES.BEGIN, "once and in order"),
        ("h100", lambda text: TABLES.END + text.replace(TABLES.END, ""), "once and in order"),
        ("a100", lambda text: text, "add it to PAGES"),
    ],
)
def test_a_page_without_a_place_for_its_tables_is_refused(page: str, change: Callable[[str], str], part: str) -> None:
    with pytest.raises(SystemExit, match=part):
        TABLES.with_target_table(page, change(text_of("h100")))


@pytest.mark.parametrize("page", PAGES)
def test_tables_say_what_the_planner_says(page: str) -> None:
    """Rates are recomputed there for any number of steps: those of the planner's own must come out."""
    tables = text_of(page).split(TABLES.BEGIN)[1].split(TABLES.END)[0]
    assert [load_profile(name).name for name in PAGES[page]] == re.findall(r"`([\w-]+)`", tables.splitlines()[1])
    for name in PAGES[page]:
        profile = load_profile(name)
        source = model(profile)
        setting = Setting.of(profile, source.spec)
        budget = Deployment.of(source, profile).budget(setting)
        assert f"**{budget.total_bytes / GB:.2f} GB**" in tables
        assert f"{setting.slots} x {setting.context:,}; {setting.canvases}; {setting.chunk:,}" in tables
        for step in forecast_steps(source, profile, setting):
            if not step.chosen or step.active == 4096 or (step.canvases, step.active) == (1, setting.context - 256):
                continue
            rates = " | ".join(f"{each.total_with_commit:,.0f}" for each in step.speeds)
            row = rf"\| {step.active:,} \| {step.canvases} \| .* \| {step.floor_ms:.3g} \| .* \| {rates} \|"
            assert re.search(row, tables), row


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_a_page_proposes_fit(page: str) -> None:
    plans = [words for words in commands(page, "canvasrt") if words[1] == "plan"]
    assert plans
    for words in plans:
        assert words[words.index("--profile") + 1] == COMPOSED[page]
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    (bundle,) = re.findall(r"`(bundle: \{.*?\})`", text_of(page))
    file = DEPLOY / "pipelines" / f"{COMPOSED[page]}.yaml"
    before = yaml.safe_load(file.read_text())
    after = Pipeline.model_validate({**before, **yaml.safe_load(bundle)})
    assert after.bundle is not None
    assert after.bundle.name != before["bundle"]["name"], "it would replace the bundle that is there"
    asked = after.bundle.options()
    (plan,) = plans
    given = {name: int(plan[plan.index(f"--{name}") + 1]) for name in SETTINGS if f"--{name}" in plan}
    assert asked == given
    profile = load_profile(COMPOSED[page])
    setting, _ = chosen_setting(profile, model(profile), {name: given.get(name) for name in SETTINGS})
    checked_budget(model(profile), profile, setting)


@pytest.mark.parametrize("page", PAGES)
def test_compose_gets_settings_that_it_knows(page: str) -> None:
    ((_, text, _, file),) = commands(page, "printf")
    assert file == "deploy/.env"
    given = dict(line.split("=", 1) for line in text.replace("\\n", "\n").splitlines())
    known = set(re.findall(r"^(CANVASRT_\w+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    assert set(given) <= known
    profile = load_profile(given["CANVASRT_PROFILE"])
    assert profile.name == COMPOSED[page]
    assert given.get("CANVASRT_FLAVOR", "rtx") == FLAVORS[profile.choices.compiler.value]
    pipeline = load_pipeline(DEPLOY / "pipelines" / f"{profile.name}.yaml")
    assert pipeline.checkpoint is not None
    asks = pipeline.checkpoint.source.startswith("hf://google/")  # docs/one-machine.md#tokens
    assert ("CANVASRT_TOKEN_FILE" in given) == asks
    for words in commands(page, "docker compose"):
        assert words[:4] == ["docker", "compose", "-f", "deploy/compose.yaml"]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "h100"])
def test_the_way_without_containers_makes_a_pipeline_file_and_installs_what_it_needs(page: str, tmp_path: Path) -> None:
    ((*words, source, _, name),) = commands(page, "sed")
    done = subprocess.run([*words, ROOT / source], capture_output=True, text=True, check=True)
    (tmp_path / name).write_text(done.stdout)
    pipeline = load_pipeline(tmp_path / name)
    assert (pipeline.profile, pipeline.volume) == (COMPOSED[page], "models")
    for command in ("prepare", "serve"):
        assert ["canvasrt", command, name] in list(commands(page, "canvasrt"))
    compiler = load_profile(pipeline.profile).choices.compiler.value
    wanted = {EXTRAS[compiler], "fetch", "client"} | ({"quantize"} if pipeline.quantize is not None else set())
    *_, (_, _, package) = (each for each in commands(page, "pip") if each[2].startswith("."))
    extras = set(package.removeprefix(".[").rstrip("]").split(","))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras == wanted <= set(known)


@cache
def rendered(*arguments: str) -> tuple[Object, ...]:
    """With the very arguments of a page, from the repository's root."""
    words = [str(ROOT / each) if each.startswith("helm/") else each for each in arguments]
    done = run("template", *words, "--kube-version", "1.34")
    assert done.returncode == 0, done.stderr
    return tuple(each for each in yaml.safe_load_all(done.stdout) if each)


def installs(page: str) -> list[list[str]]:
    return [words[2:] for words in commands(page, "helm") if words[1] == "install"]


@pytest.mark.parametrize("page", ["h100", "rtx-pro-6000"])
def test_what_a_page_installs_renders_with_helm(page: str) -> None:
    (given,) = installs(page)
    objects = list(rendered(*given))
    assert faults(objects, COMPOSED[page], "1.34") == []
    text = text_of(page)
    values = [shlex.split(each) for each in re.findall(r"`(--set [\w.]+=[^`]+)`", text)]
    values = [each for each in values if "." in each[1] or each[1].startswith("replicaCount")]  # else of canvasrt serve
    upgrades = [words[4:] for words in commands(page, "helm") if words[1] == "upgrade"]
    assert values
    for more in [*values, *([each for each in words if each != "--reuse-values"] for words in upgrades)]:
        assert list(rendered(*given, *more)) != objects, f"{more} changes nothing"


def test_commands_around_helm_name_what_the_chart_makes() -> None:
    (given,) = installs("h100")
    for name in PAGES["h100"] + PAGES["dgx-station"]:
        objects = list(rendered(*(each.replace("h100", name) for each in given)))
        named = [word.split("/") for words in commands("h100", "kubectl") for word in words if re.match(r"\w+/", word)]
        assert len(named) == 3
        for kind, called in named:
            one(objects, kind.capitalize(), called)
        ports = {str(each["port"]) for each in one(objects, "Service", "demo-canvasrt")["spec"]["ports"]}
        assert {"8000", "8001"} <= ports
        pod = server_pod(objects)
        assert [each["name"] for each in containers(pod)] == ["prepare", "server"]
        (tag,) = re.findall(r"-t (\S+)", text_of("h100"))
        built = {tag.replace("$image", image) for image in ("builder", "server")}
        assert {each["image"] for each in containers(pod)} == built


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_files_that_are_named_exist(page: str) -> None:
    named = set(re.findall(r"(?<![\w/.-])((?:deploy|helm|requirements|tests|scripts)/[\w./$-]*\w)", text_of(page)))
    for path in named - MADE_BY_USERS:
        assert list(ROOT.glob(path.replace("$image", "*"))), path
    assert (CHART / "Chart.yaml").exists()
    assert (DEPLOY / ".gitignore").read_text().count("/hf-token") == 1, "a token must not get into git"


@pytest.mark.parametrize("page", PAGES)
def test_figures_of_others_have_an_address(page: str) -> None:
    before, _, after = text_of(page).partition("Published by others with other software, not measured by us")
    assert after, page
    assert "tokens/s |\n" not in before.split(TABLES.BEGIN)[0]
    table = after.split("\n\n")[1].splitlines()
    assert "tokens/s" in table[0]
    assert len(table) > 2
    for row in table[2:]:
        assert re.search(r"\]\(https://[\w.-]+/\S+\)", row), row


def normal(text: str) -> str:
    """Without what differs from case to case: a message and the f-string that makes it become the same."""
    values = r"sm_\d+|\d+(\.\d+)*|%[sd]|\bamd64\b|\bNVFP4\b|\b(rtx|dgx)-[\w-]+\w"
    return re.sub(values, "{}", " ".join(text.split()))


@cache
def messages() -> str:
    """Every string of the sources and of the chart's templates."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(each.value if isinstance(each, ast.Constant) else "{}" for each in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    found += [file.read_text(encoding="utf-8") for file in (CHART / "templates").glob("*.tpl")]
    return normal("\n".join(found))


def said(page: str) -> list[str]:
    rows = text_of(page).split("## What goes wrong first")[1].split("\n\n")[1].splitlines()[2:]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


@pytest.mark.parametrize("page", PAGES)
def test_messages_that_are_explained_are_those_that_appear(page: str) -> None:
    assert len(said(page)) >= 4
    for message in set(said(page)) - NOT_OURS:
        assert normal(message) in messages(), message
    assert normal("and engines want CUDA 13") not in messages()


def test_slots_in_a_message_are_those_of_the_profile() -> None:
    quoted: dict[str, Any] = {}
    for page in PAGES:
        for message in said(page):
            if found := re.search(r"this bundle with (\d+) slots", message):
                quoted[page] = int(found[1])
    assert quoted == {page: load_profile(page).choices.slots.value for page in quoted}
    assert len(quoted) == 4
