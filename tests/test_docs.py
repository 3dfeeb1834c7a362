"""The docs agree with the code: generated pages are current, links and paths lead somewhere, commands parse.

Every check is also run on a planted mistake, to show that it can fail.
"""

import importlib.util
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from canvasrt.cli.main import app
from canvasrt.ops.protocol import Ops
from canvasrt.runtime.memory import budget
from canvasrt.runtime.protocol import RunnerLimits
from canvasrt.spec import ModelSpec

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", ROOT / "CHANGELOG.md"] if page.exists()] + sorted(
    ROOT.glob("docs/**/*.md")
)
SHELLS = ("sh", "bash", "shell", "console")
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Each check takes a page's text and its folder and yields what is wrong.


def broken_links(text: str, folder: Path) -> Iterator[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        page = folder / path
        if path and not page.exists():
            yield f"link to {target}: no such file"
        elif anchor and anchor not in anchors(page.read_text(encoding="utf-8") if path else text):
            yield f"link to {target}: no such heading"


def anchors(text: str) -> set[str]:
    """The names that a Markdown viewer gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_paths(text: str, folder: Path) -> Iterator[str]:
    """Files of this repository that are spoken of and not there; after ``::``, functions of that file."""
    folders = "src|tests|docs|scripts|examples|requirements"
    for path, name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./*-]+)(?:::(\w+))?", text):
        found = list(ROOT.glob(path.rstrip(".")))
        if not found:
            yield f"{path}: no such file"
        elif name and f"def {name}(" not in found[0].read_text(encoding="utf-8"):
            yield f"{path} has no function {name}"


def wrong_commands(text: str, folder: Path) -> Iterator[str]:
    for words in commands(text):
        try:
            parse(words)
        except UsageError as error:
            yield f"canvasrt {shlex.join(words)}: {error}"


def commands(text: str) -> Iterator[list[str]]:
    """The words after ``canvasrt`` of each shell command in fenced blocks."""
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL):
        if language not in SHELLS:
            continue
        lines = block.replace("\\\n", " ")
        if language == "console":
            lines = "\n".join(line[2:] for line in lines.splitlines() if line.startswith("$ "))
        lines = re.sub(r"(^|\s)#[^\n'\"]*$", "", lines, flags=re.MULTILINE)
        lexer = shlex.shlex(lines, posix=True, punctuation_chars="();<>|&\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        words: list[str] = []
        for word in [*lexer, "\n"]:
            if word[0] not in "();<>|&\n":
                words.append(word)
                continue
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words and words[0].split("/")[-1] == "canvasrt":
                yield words[1:]
            words = []


def parse(words: list[str]) -> None:
    """What the command line does before it calls a command. Raises UsageError."""
    group: Any = typer.main.get_command(app)
    try:
        name, context = "canvasrt", None
        while True:
            context = group.make_context(name, list(words), parent=context)
            words = [*getattr(context, "_protected_args", ()), *context.args]  # what the options left over
            if not hasattr(group, "commands") or (not words and group.invoke_without_command):
                break
            name = next(iter(words), None)
            if name not in group.commands:
                raise typer.BadParameter(f"no command {name}")
            group, words = group.commands[name], words[1:]
    except typer.Exit:  # --help and --version
        pass


CHECKS = [broken_links, dead_paths, wrong_commands]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_agrees_with_the_code(page: Path, check: Callable[[str, Path], Iterator[str]]) -> None:
    assert list(check(page.read_text(encoding="utf-8"), page.parent)) == []


@pytest.mark.parametrize(
    ("check", "text", "part"),
    [
        (broken_links, "see [this](no/such.md)", "no/such.md: no such file"),
        (broken_links, "# One\n[two](#two)", "#two: no such heading"),
        (broken_links, "[over\nlines](docs/glossary.md#nothing)", "no such heading"),
        (dead_paths, "in `src/canvasrt/nothing.py`.", "src/canvasrt/nothing.py: no such file"),
        (dead_paths, "`tests/nothing*.py`", "no such file"),
        (dead_paths, "`tests/test_docs.py::test_nothing`", "has no function test_nothing"),
        (wrong_commands, "```sh\ncanvasrt genrate X\n```", "no command genrate"),
        (wrong_commands, "```sh\n.venv/bin/canvasrt verify X --dytpe float32\n```", "--dytpe"),
        (wrong_commands, "```sh\nOMP_NUM_THREADS=1 canvasrt \\\n  verify # no argument\n```", "checkpoint"),
        (wrong_commands, "```sh\ntrue && canvasrt bench X --requests 0 | cat\n```", "requests"),
        (wrong_commands, "```console\n$ canvasrt verify X --seed many\nany output\n```", "many"),
    ],
)
def test_a_planted_mistake_is_found(check: Callable[[str, Path], Iterator[str]], text: str, part: str) -> None:
    (found,) = check(text, ROOT)
    assert part in found


@pytest.mark.parametrize(
    "text",
    [
        "[web](https://example.com/x.md) [here](#a-b)\n# A, b",
        "```sh\ncanvasrt generate X -p 'two\nlines | of # text' --seed 3 --json > out.json  # done\nls X\n```",
        "```sh\ncanvasrt --version; canvasrt bench --help\n```",
        "```text\ncanvasrt no-command\n```\nin prose canvasrt no-command",
        "build/recipes is no folder of these, and x/tests/none.py is not ours",
    ],
)
def test_what_is_right_is_left_alone(text: str) -> None:
    assert [fault for check in CHECKS for fault in check(text, ROOT)] == []


def test_the_checks_see_something() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert len(PAGES) >= 9
    assert any(words for text in texts for words in commands(text))


def test_the_command_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_script().main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_command_reference_is_refused_and_then_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, page = load_script(), tmp_path / "cli.md"
    assert script.main(["--check"], tmp_path) == 1
    assert "docs/cli.md is missing. Write it: .venv/bin/python scripts/generate_docs.py" in capsys.readouterr().err
    page.write_text("old", encoding="utf-8")
    assert script.main(["--check"], tmp_path) == 1
    assert "docs/cli.md does not match its source" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "old"
    assert script.main([], tmp_path) == 0
    assert script.main(["--check"], tmp_path) == 0


def test_the_command_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script()
    wide = script.render()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    assert script.render() == wide


def test_every_command_and_option_is_in_the_reference() -> None:
    text = load_script().render()
    group: Any = typer.main.get_command(app)
    inner = [(f"{name} {sub}", each) for name, command in group.commands.items() for sub, each in subcommands(command)]
    assert inner
    for name, command in [*group.commands.items(), *inner]:
        section = text.split(f"## canvasrt {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            assert (parameter.metavar or parameter.opts[0]) in section


def subcommands(command: Any) -> list[tuple[str, Any]]:
    return list(getattr(command, "commands", {}).items())


def test_an_exit_code_without_a_meaning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script()
    monkeypatch.setattr(script.cli, "EXIT_NEW", 9, raising=False)
    with pytest.raises(SystemExit, match="missing: EXIT_NEW"):
        script.render()


def test_the_worked_example_of_the_architecture_is_the_budget() -> None:
    text_config = {
        "vocab_size": 262_144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512,
        "num_global_key_value_heads": 2, "sliding_window": 1024, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704, "max_position_embeddings": 262_144,
    }  # fmt: skip
    config = {"model_type": "diffusion_gemma", "canvas_length": 256, "text_config": text_config}
    spec = ModelSpec.from_config(config, "26B")
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    per_sliding_token = sum(4 * layer.kv_heads * layer.head_dim for layer in spec.layers if layer.kind == "sliding")
    for context in (4096, 32_768, 262_144):
        memory = budget(spec, RunnerLimits(slots=1, context=context, chunk=256, canvas=256, vocabulary=262_144), 2)
        row = [context, memory.full_kv_bytes, memory.sliding_kv_bytes, per_sliding_token * context]
        assert f"| {' | '.join(f'{number:,}' for number in row)} |" in text
    assert f"{memory.weight_bytes:,} bytes of weights" in text
    assert f"({sum(math.prod(shape) for shape in spec.tensors().values()):,} elements)" in text
    assert f"{memory.soft_bytes:,} bytes of soft embeddings" in text
    assert f"{256 * 262_144 * 4:,} bytes" in text


def test_the_number_of_primitives_is_right() -> None:
    count = sum(1 for name in vars(Ops) if not name.startswith("_"))
    for page in ("architecture.md", "decisions/0001-one-network-over-ops.md"):
        assert f"{count} primitives" in (ROOT / "docs" / page).read_text(encoding="utf-8")
