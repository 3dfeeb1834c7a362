"""When is a product made, and when again? Children of these tests copy in place of computing."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import bundles
from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import (
    CanvasRTError,
    CapacityError,
    CheckpointError,
    InputError,
    ServerError,
    TimedOutError,
)
from canvasrt.fingerprint import fingerprint
from canvasrt.pipeline.prepare import prepared, served
from canvasrt.pipeline.receipt import receipt_file
from canvasrt.profiles.profile import load_profile
from pipelines import Job, Time, files_of, flip, write
from planning import DEMO

INSTALLED = version("tensorrt_rtx_cu13")
OPTIONS = {"context": 512, "slots": 2}


@dataclass
class Copies:
    """In place of `canvasrt quantize` and `canvasrt build`. ``codes``: exit codes of the next runs, else 0."""

    ran: list[list[str]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    compiler: str = INSTALLED

    def run(self, what: str, command: list[str], environment: Mapping[str, str], lock: int, watched: Path) -> int:
        self.ran.append(command[3:])
        if self.codes and (code := self.codes.pop(0)):
            return code
        out = Path(self.option("--out"))
        if what == "quantize":
            shutil.copytree(command[4], out)
        else:
            self._bundle(out)
        return 0

    def option(self, name: str) -> str:
        return self.ran[-1][self.ran[-1].index(name) + 1]

    @property
    def made(self) -> list[str]:
        return [each[0] for each in self.ran]

    def _bundle(self, out: Path) -> None:
        profile = load_profile(self.option("--profile"))
        if "--force" in self.ran[-1]:
            shutil.rmtree(out)
        checkpoint = Path(self.option("--checkpoint"))
        found = fingerprint(checkpoint)
        names = [name for name in ("context", "slots") if f"--{name}" in self.ran[-1]]
        bundles.write(
            out,
            checkpoint,
            checkpoint={
                "folder": checkpoint.name,
                "quantization": "none",
                "layout": found.layout,
                "content": found.content,
            },
            profile=profile.model_dump(mode="json"),
            options={name: int(self.option(f"--{name}")) for name in names},
            compiler={"name": "tensorrt-rtx", "version": self.compiler},
        )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "source"))


def job(tmp_path: Path, children: Copies | None = None, **changes: Any) -> Job:
    content = {"volume": str(tmp_path / "v"), "profile": "cpu", "checkpoint": {"source": str(tmp_path / "source")}}
    file = write(tmp_path / "pipeline.yaml", **{**content, **changes})
    return Job(file, children=children or Copies())


def quantizing(tmp_path: Path, children: Copies, **changes: Any) -> Job:
    return job(tmp_path, children, quantize={"recipe": "fp8"}, **changes)


def building(tmp_path: Path, children: Copies, **changes: Any) -> Job:
    return job(tmp_path, children, **{"profile": "rtx-5090", "bundle": {"name": "b", **OPTIONS}, **changes})


def test_a_folder_is_served_in_place_and_must_be_a_checkpoint(tmp_path: Path, source: Path) -> None:
    assert job(tmp_path).run().model == source
    assert not (tmp_path / "v").exists()
    (source / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="too few for a safetensors file"):
        job(tmp_path).run()


def test_a_quantized_checkpoint_is_made_once_and_again_where_it_or_its_source_changed(
    tmp_path: Path, source: Path
) -> None:
    children = Copies()
    folder = quantizing(tmp_path, children).run().model
    assert quantizing(tmp_path, children).run().model == folder
    assert children.ran[0][:5] == ["quantize", str(source), "--recipe", "fp8", "--out"]
    assert len(children.ran) == 1
    assert files_of(folder) == files_of(source)
    flip(folder / "model.safetensors")
    quantizing(tmp_path, children, verify="sizes").run()
    assert len(children.ran) == 1
    waiting = quantizing(tmp_path, children)
    waiting.timeout = 10
    with pytest.raises(TimedOutError, match=r"model\.safetensors has another SHA-256"):
        waiting.wait()
    assert quantizing(tmp_path, children).run().model == folder
    assert len(children.ran) == 2
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"not prepared yet: .* tokenizer\.json has 2 bytes, .*: canvasrt prepare"):
        prepared(quantizing(tmp_path, children).file)
    quantizing(tmp_path, children, verify="sizes").run()
    assert len(children.ran) == 3
    flip(source / "model.safetensors")
    again = quantizing(tmp_path, children, verify="sizes")
    again.run()
    assert (len(children.ran), again.made) == (4, [folder.name])
    assert "was quantized from something else: fingerprint" in again.log
    assert files_of(folder) == files_of(source)
    shutil.rmtree(source)  # not kept: what was made of it still is
    assert quantizing(tmp_path, children).run().model == folder
    assert len(children.ran) == 4


def test_a_finished_child_of_a_killed_run_is_not_repeated_and_one_of_other_inputs_is(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Copies()

    def dies(folder: Path, names: list[str]) -> dict[str, str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("canvasrt.pipeline.making.hash_files", dies)
        with pytest.raises(KeyboardInterrupt):
            quantizing(tmp_path, children).run()
    folder = quantizing(tmp_path, children).run().model
    assert len(children.ran) == 1
    assert Checkpoint.open(folder).names() == Checkpoint.open(DEMO).names()
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr("canvasrt.pipeline.making.hash_files", dies)
        with pytest.raises(KeyboardInterrupt):
            quantizing(tmp_path, children).run()
    flip(source / "model.safetensors")
    quantizing(tmp_path, children).run()
    assert len(children.ran) == 3
    assert files_of(folder) == files_of(source)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted(
        [f".{folder.name}.prepare.lock", folder.name, receipt_file(folder).name]
    )


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (2, InputError, "quantize failed with exit code 2; its lines above say why"),
        (3, CapacityError, "quantize failed with exit code 3"),
        (1, ServerError, "quantize failed with exit code 1"),
        (-9, ServerError, "quantize was ended by signal 9: most likely the memory"),
    ],
)
def test_how_a_child_ends_is_how_we_end(
    code: int, error: type[CanvasRTError], message: str, tmp_path: Path, source: Path
) -> None:
    with pytest.raises(error, match=message):
        quantizing(tmp_path, Copies(codes=[code])).run()
    quantizing(tmp_path, Copies()).run()


def test_a_bundle_is_built_once_and_again_where_it_is_not_what_is_wanted(tmp_path: Path, source: Path) -> None:
    children = Copies()

    def run(**changes: Any) -> Job:
        made = building(tmp_path, children, **changes)
        assert made.run().model == tmp_path / "v" / "engines" / "b"
        return made

    assert run().made == ["b"]
    assert run().made == []
    assert children.ran[0][-4:] == ["--context", "512", "--slots", "2"]
    bundle = tmp_path / "v" / "engines" / "b"
    flip(bundle / "text.engine")
    assert run(verify="sizes").made == []
    assert "is damaged" in run().log
    assert "--force" in children.ran[-1]
    os_size = (bundle / "text.engine").read_bytes()
    (bundle / "text.engine").write_bytes(os_size[:-1])
    assert run(verify="sizes").made == ["b"]
    changed = run(bundle={"name": "b", **OPTIONS, "slots": 4})
    assert "was built with the options {'context': 512, 'slots': 2}" in changed.log
    assert "was built for another profile" in run(profile="rtx-pro-6000").log
    flip(source / "model.safetensors")
    assert "was built from another checkpoint than" in run(profile="rtx-pro-6000").log
    assert run(profile="rtx-pro-6000").made == []
    shutil.rmtree(source)
    assert run(profile="rtx-pro-6000").made == []  # the receipt tells
    receipt_file(bundle).unlink()
    with pytest.raises(CheckpointError, match="source"):
        run(profile="rtx-pro-6000")


def test_a_bundle_of_another_library_is_built_again(tmp_path: Path, source: Path) -> None:
    old = Copies(compiler="1.0.0.1")
    with pytest.raises(ServerError, match=r"was built, and was compiled by tensorrt-rtx 1\.0\.0\.1, and 1\..* is inst"):
        building(tmp_path, old).run()
    again = building(tmp_path, Copies())
    again.run()
    assert again.made == ["b"]


def test_what_is_not_ours_is_left_alone(tmp_path: Path, source: Path) -> None:
    bundle = tmp_path / "v" / "engines" / "b"
    bundle.mkdir(parents=True)
    building(tmp_path, Copies()).run()  # an empty folder is nobody's
    shutil.rmtree(bundle)
    receipt_file(bundle).unlink()
    bundle.mkdir()
    (bundle / "notes.txt").write_text("mine")
    for ask in (building(tmp_path, Copies()).run, building(tmp_path, Copies()).wait):
        with pytest.raises(InputError, match=r"holds other files and is no bundle: remove it, or choose another"):
            ask()
    assert files_of(bundle) == {"notes.txt": b"mine"}
    folder = quantizing(tmp_path, Copies()).run().model
    receipt_file(folder).unlink()
    with pytest.raises(InputError, match=r"is there without .*receipt\.json, so it is not ours: remove it"):
        quantizing(tmp_path, Copies()).run()


def test_a_bundle_whose_manifest_is_gone_is_ours_by_its_receipt(tmp_path: Path, source: Path) -> None:
    children = Copies()
    building(tmp_path, children).run()
    (tmp_path / "v" / "engines" / "b" / "manifest.json").unlink()
    building(tmp_path, children).run()
    assert children.made == ["build", "build"]
    assert "--force" not in children.ran[-1]


def test_what_a_server_is_told(tmp_path: Path, source: Path) -> None:
    children = Copies()
    changes = {"quantize": {"recipe": "fp8"}, "kernels": str(tmp_path / "k")}
    wanted = building(tmp_path, children, **changes)
    with pytest.raises(InputError, match=r"not prepared yet: .*/engines/b is not there\. Prepare it: canvasrt prepare"):
        served(wanted.file, [])
    wanted.run()
    assert (tmp_path / "k").is_dir()  # a server may be let write into it and not make it
    assert children.made == ["quantize", "build"]
    bundle = tmp_path / "v" / "engines" / "b"
    assert served(wanted.file, ["slots=4"]) == (bundle, [f"kernels={tmp_path}/k/b.kernels", "slots=4"])
    assert (tmp_path / "k").is_dir()
    flip(source / "model.safetensors")
    with pytest.raises(InputError, match=r"not prepared yet: .*/b its checkpoint was quantized from something else"):
        served(wanted.file, [])
    building(tmp_path, children, **changes).run()
    assert children.made == ["quantize", "build"] * 2
    (quantized,) = (tmp_path / "v" / "checkpoints").glob("*-fp8")
    shutil.rmtree(quantized)  # the weights are inside
    assert served(wanted.file, [])[0] == bundle


def test_waiting_makes_nothing_and_sees_what_another_process_makes(tmp_path: Path, source: Path) -> None:
    maker = quantizing(tmp_path, Copies())
    waiter = quantizing(tmp_path, Copies())

    class Meanwhile(Time):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if self.now > 25:
                maker.run()

    waiter.time = Meanwhile()
    assert waiter.wait() == maker.run()
    assert (waiter.made, waiter.children.ran) == ([], [])
    assert [line.partition(":")[0] for line in waiter.said] == [f"waiting, {number} s so far" for number in (0, 10, 20)]
    shutil.rmtree(waiter.wait().model)
    waiter.time, waiter.timeout = Time(), 5
    with pytest.raises(TimedOutError, match=r"not prepared after 6 s: .* is not there"):
        waiter.wait()
