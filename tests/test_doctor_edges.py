"""``canvasrt doctor`` where programs hang or print anything at all; the command on this machine and on made-up ones."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import doctor_machines as kinds
from canvasrt.cli.main import app
from canvasrt.doctor.checks import NotUnderstoodError, parsed
from canvasrt.doctor.machine import Answer, ThisMachine, ask
from canvasrt.doctor.nodes import Nodes
from canvasrt.profiles.detect import QUERY
from doctor_machines import MISSING, FakeMachine, looked, printed, well_formed

HANGS = Answer(problem="gave no answer within 10 seconds")
ANYTHING = st.one_of(
    st.just(""),
    st.just("null"),
    st.just("[]"),
    st.just('{"items": null, "groups": [null], "serverVersion": 3}'),
    st.just('{"items": [{}], "groups": [{}], "serverVersion": {}}'),
    st.just("0, 1, 2, 3, 4, 5\n, , , , ,\nGPU 0:\n  MIG 1g.10gb "),
    st.text(max_size=60),
)


@st.composite
def broken(draw: st.DrawFn) -> FakeMachine:
    """A machine of ours, some of whose programs and files say less, more or something else."""
    machine = kinds.EVERY[draw(st.sampled_from(sorted(kinds.EVERY)))]()
    machine.answers = kinds.kubernetes(kinds.NODES) | machine.answers
    for command in draw(st.lists(st.sampled_from(sorted(machine.answers)), max_size=6)):
        machine.answers[command] = draw(answers(machine.answers[command].out))
    for path in draw(st.lists(st.sampled_from(sorted(machine.files) or ["/proc/meminfo"]), max_size=2)):
        machine.files[path] = draw(mangled(machine.files.get(path, "")))
    return machine


def mangled(text: str) -> st.SearchStrategy[str]:
    """Cut somewhere, one character replaced, repeated, or anything else."""
    places = st.integers(0, max(len(text) - 1, 0))
    return st.one_of(
        places.map(lambda end: text[:end]),
        places.map(lambda start: text[start:]),
        st.tuples(places, st.characters()).map(lambda at: text[: at[0]] + at[1] + text[at[0] + 1 :]),
        st.just(text * 2),
        ANYTHING,
    )


def answers(text: str) -> st.SearchStrategy[Answer]:
    codes = st.sampled_from([0, 0, 0, 1, 9, -9])
    said = st.builds(
        lambda out, code: printed(out, code, "error: out of order\n" if code else ""), mangled(text), codes
    )
    return st.one_of(said, st.sampled_from([HANGS, MISSING]))


@given(broken(), st.sampled_from([None, True, False]), st.sampled_from([None, "h100"]))
@settings(max_examples=50, deadline=None)
def test_whatever_is_printed_the_answer_is_a_report(
    machine: FakeMachine, wanted: bool | None, name: str | None
) -> None:
    well_formed(looked(machine, kubernetes=wanted, profile=name))


def test_where_every_program_hangs_each_is_skipped_or_a_fault() -> None:
    machine = kinds.laptop()
    machine.answers = dict.fromkeys([*kinds.rtx_5090().answers, *machine.answers], HANGS)
    report = looked(machine)
    well_formed(report)
    said = {each.name: each.finding for each in report.checks if "no answer" in each.finding}
    assert {"driver", "Docker", "cluster", "containerd"} <= said.keys()


def test_json_of_another_form_is_named() -> None:
    with pytest.raises(NotUnderstoodError, match=r"its output is not understood: items\.0\.metadata"):
        parsed('{"items": [{"metadata": 3}]}', Nodes)


def real(folder: Path | None = None, **environment: str) -> ThisMachine:
    path = "/usr/bin:/bin" if folder is None else f"{folder}:/usr/bin:/bin"
    return ThisMachine({"PATH": path, **environment}, lambda path: path)


def test_commands_get_the_environment_and_nothing_to_read() -> None:
    answer = real(WORD="given").run(("sh", "-c", "cat; echo $WORD; echo wrong >&2; exit 3"), 10)
    assert answer == Answer("given\n", "wrong\n", 3)
    assert answer.said == "exit code 3: wrong given"
    assert real().run(("sh", "-c", "printf '\\377ok'"), 10).out == "\ufffdok"
    assert real().run(("no-such-program",), 10).missing


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """The child would hold a pipe open, and go on after its parent."""
    sign = tmp_path / "child"
    answer = real().run(("sh", "-c", f"(sleep 1; touch {sign}) & sleep 60"), 0.2)
    assert answer.problem == "sh gave no answer within 0.2 seconds"
    assert not answer.missing
    time.sleep(1.2)
    assert not sign.exists()


def test_what_runs_together_ends_together_and_an_interrupt_ends_all() -> None:
    sleeps = (("sh", "-c", "sleep 60"), 30.0)

    class Interrupted(ThisMachine):
        def run(self, command: tuple[str, ...], timeout: float) -> Answer:
            if command != sleeps[0]:
                raise KeyboardInterrupt
            return super().run(command, timeout)

    with pytest.raises(KeyboardInterrupt):  # and not after 30 seconds
        ask(Interrupted({"PATH": "/usr/bin:/bin"}, lambda path: path), [(("true",), 1.0), sleeps])


def test_a_file_that_can_not_be_started_or_read(tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("no program")
    program.chmod(0o755)
    assert "could not be started" in real(tmp_path).run(("broken",), 10).problem
    assert real().read(str(tmp_path)) is None
    assert real().names(str(program)) == []
    assert real().disk(str(tmp_path / "not" / "there")).place == str(tmp_path)
    assert (real().version("pytest"), real().version("no-such-package")) == (pytest.__version__, None)


def test_a_port_that_somebody_listens_on_is_not_free() -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert "in use" in real().port_problem(port)
    assert real().port_problem(port) == ""


# The command itself. Neither a cluster nor a daemon of this machine is asked.
ELSEWHERE = {"KUBECONFIG": "/nonexistent/config", "DOCKER_HOST": "unix:///nonexistent/docker.sock"}


def test_the_command_on_this_machine() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"], env=ELSEWHERE)
    report = json.loads(result.stdout)
    assert set(report) == {"model", "checks", "fits", "next"}
    assert set(report["checks"][0]) == {"group", "name", "status", "finding", "fix"}
    statuses = [each["status"] for each in report["checks"]]
    assert result.exit_code == int("fault" in statuses), result.output
    groups = ["system", "GPU", "memory and disk", "ports", "packages", "containers", "kubernetes", "what fits"]
    assert list(dict.fromkeys(each["group"] for each in report["checks"])) == groups
    assert report["fits"]


def run(*options: str, environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """What it prints on both streams, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "canvasrt.cli.main", "doctor", *options],
        env={"PATH": "/usr/bin:/bin", **ELSEWHERE, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr, done.returncode


def programs(folder: Path, machine: FakeMachine) -> str:
    """Puts programs into ``folder`` that print what the machine's do; the PATH to find them with."""
    by_name: dict[str, dict[str, list[Any]]] = {}
    for command, answer in machine.answers.items():
        by_name.setdefault(command[0], {})["\0".join(command[1:])] = [answer.out, answer.err, answer.code]
    for name, said in by_name.items():
        (folder / f"{name}.json").write_text(json.dumps(said))
        program = folder / name
        program.write_text(
            f"#!{sys.executable} -IS\nimport json, sys\n"
            f"said = json.load(open({str(folder / name)!r} + '.json'))\n"
            "out, err, code = said[chr(0).join(sys.argv[1:])]\n"
            "sys.stdout.write(out), sys.stderr.write(err), sys.exit(code)\n"
        )
        program.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_the_command_as_a_process_asks_real_programs(tmp_path: Path) -> None:
    machine = kinds.rtx_5090()
    machine.answers |= kinds.kubernetes(kinds.NODES)
    path = {"PATH": programs(tmp_path, machine)}
    text, code = run("--volume", str(tmp_path), "--json", environment=path)
    found = {(each["group"], each["name"]): each for each in json.loads(text)["checks"]}
    assert code == int("fault" in {each["status"] for each in found.values()})  # disk and memory are this machine's
    assert found["GPU", "GPU 0"]["finding"].endswith("profile rtx-5090")
    assert found["kubernetes", "node gpu-1"]["status"] == "ok"


def test_text_is_grouped_with_a_line_each_and_a_fix_below(tmp_path: Path) -> None:
    text, code = run("--no-kubernetes", environment={"PATH": programs(tmp_path, kinds.h100_old())})
    assert code == 1
    lines = text.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")][:3] == ["System", "GPU", "Memory and disk"]
    (at,) = [index for index, line in enumerate(lines) if line.startswith("  FAULT driver: 535.183.01 supports CUDA")]
    assert lines[at + 1].startswith("        -> Install driver 580 or newer")
    assert "What fits for DiffusionGemma 26B-A4B" in lines
    assert "\x1b" not in text
    assert lines[-1].split()[1].startswith("fault")


def test_wrong_options_exit_with_2() -> None:
    text, code = run("--profile", "rtx-9090")
    assert (code, "no GPU profile is called 'rtx-9090'" in text) == (2, True), text
    assert CliRunner().invoke(app, ["doctor", "--http-port", "0"]).exit_code == 2


def test_a_planted_fault_is_seen(tmp_path: Path) -> None:
    """The same machine, once with and once without what is wrong: only the exit code and one line differ."""
    machine = kinds.rtx_5090()
    machine.answers[QUERY] = replace(machine.answers[QUERY], code=9)
    assert (looked(kinds.rtx_5090()).faults, looked(machine).faults) == (0, 1)
