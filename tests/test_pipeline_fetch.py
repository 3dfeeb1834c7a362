"""Checkpoints and bundles from a hub, a bucket and a registry: whole or not at all, gone on with, and never a token."""

import gc
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import bundles
from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import BundleError, CapacityError, CheckpointError, InputError, ServerError
from canvasrt.pipeline.receipt import read_receipt, receipt_file
from canvasrt.pipeline.transfer import Credentials
from fetching import COMMIT, INDEX, KINDS, LARGE, SECRET, SMALL, UNWANTED, Place, demo_files, place
from host_bundles import host_bundle
from http_double import Answer, Asked, serving_http
from pipelines import Job, everything_below, files_of, flip
from planning import DEMO


@pytest.fixture(params=KINDS)
def origin(request: pytest.FixtureRequest) -> Iterator[Place]:
    with place(request.param) as found:
        yield found


def job(origin: Place, folder: Path, **changes: object) -> Job:
    return Job(origin.file(folder, **changes), origin.credentials)


def test_what_is_whole_stays_what_was_cut_goes_on_and_what_is_damaged_is_fetched_again(
    origin: Place, tmp_path: Path
) -> None:
    origin.server.cuts[origin.end(LARGE)] = [2_000_000]
    first = job(origin, tmp_path)
    folder = first.run().model
    assert files_of(folder) == demo_files()
    assert first.made == [folder.name]
    assert Checkpoint.open(folder).nbytes() == Checkpoint.open(DEMO).nbytes()
    assert sorted(each.name for each in folder.parent.iterdir()) == sorted(
        [f".{folder.name}.prepare.lock", folder.name, f"{folder.name}.receipt.json"]
    )
    asked = origin.server.bodies(origin.end(LARGE))
    # huggingface_hub takes pieces of 10 MB: of so small a file it has nothing to go on with.
    _, second = (each.headers.get("Range", "") for each in asked)
    assert second == "" if origin.kind == "hf" else re.fullmatch(r"bytes=[1-9]\d+-", second)
    assert origin.count(SMALL) == 1
    assert not any(origin.server.bodies(name) for name in UNWANTED)

    before = len(origin.server.asked)
    again = job(origin, tmp_path)
    assert again.run().model == folder
    assert (again.made, len(origin.server.asked)) == ([], before)  # not even a listing: the network may be gone

    flip(folder / SMALL)
    careless = job(origin, tmp_path, verify="sizes")
    careless.run()
    assert careless.made == []
    mended = job(origin, tmp_path)
    mended.run()
    assert mended.made == [folder.name]
    assert f"{SMALL} has another SHA-256 than its receipt says" in mended.log
    assert files_of(folder) == demo_files()
    assert (origin.count(SMALL), origin.count(LARGE)) == (2, len(asked))

    (folder / LARGE).write_bytes(demo_files()[LARGE][:-1])
    careless = job(origin, tmp_path, verify="sizes")
    careless.run()
    assert "bytes, its receipt says" in careless.log
    assert files_of(folder) == demo_files()
    assert SECRET not in everything_below(tmp_path) + first.log + mended.log


def test_a_source_that_changed_meanwhile_is_never_mixed(tmp_path: Path) -> None:
    """Of a bucket: there is no name for its earlier state. One damaged file brings all that has changed."""
    with place("s3") as origin:
        folder = job(origin, tmp_path).run().model
        generation = demo_files()["generation_config.json"].replace(b"48", b"24")
        assert generation != demo_files()["generation_config.json"]
        origin.held.client.put_object(Bucket="models", Key="team/model/generation_config.json", Body=generation)
        flip(folder / SMALL)
        job(origin, tmp_path).run()
        assert files_of(folder) == {**demo_files(), "generation_config.json": generation}
        assert (origin.count(SMALL), origin.count(LARGE)) == (2, 1)


def test_an_object_that_is_replaced_between_listing_and_reading_is_listed_again(tmp_path: Path) -> None:
    with place("s3") as origin:
        changed = demo_files()[SMALL][:-1] + b"x"
        answer = origin.held.answer

        def replacing(asked: Asked) -> Answer:
            given: Answer = answer(asked)
            if "list-type" in asked.path:
                origin.held.client.put_object(Bucket="models", Key=f"team/model/{SMALL}", Body=changed)
            return given

        with serving_http(replacing) as server:
            origin.settings = {"s3": {"endpoint": server.url}}
            done = job(origin, tmp_path)
            assert files_of(done.run().model) == {**demo_files(), SMALL: changed}
        assert "was changed while it was fetched; trying again in 1 s" in done.log


def test_a_branch_that_moved_is_gone_on_with_at_the_commit_that_was_begun(tmp_path: Path) -> None:
    with place("hf") as origin:
        origin.held.wrong[SMALL] = b"cut"
        with pytest.raises(ServerError, match="given up"):
            job(origin, tmp_path).run()
        origin.held.commits = {"main": "f" * 40, "old": COMMIT}
        origin.held.wrong.clear()
        folder = job(origin, tmp_path).run().model
        receipt = read_receipt(receipt_file(folder))
        assert receipt is not None
        assert (receipt.revision, receipt.made_from) == (COMMIT, {"source": "hf://org/model"})
        assert origin.count(LARGE) == 1


def test_a_connection_that_is_cut_for_ever_is_given_up_and_another_process_goes_on(
    origin: Place, tmp_path: Path
) -> None:
    if origin.kind == "hf":  # begins a file again, and waits between its own five tries
        origin.held.wrong[LARGE] = b"short"
        message = r"5|size|another SHA-256"
    else:
        origin.server.cuts[origin.end(LARGE)] = [1000, 0, 0, 0, 0, 0, 0]
        message = "cut|reached"
    failing = job(origin, tmp_path)
    with pytest.raises(ServerError, match=message) as failed:
        failing.run()
    assert "given up after 5 tries" in str(failed.value)
    assert failing.time.slept == [1, 1, 2, 4, 8][-len(failing.time.slept) :]
    origin.server.cuts.clear()
    if origin.kind == "hf":
        origin.held.wrong.clear()
    done = job(origin, tmp_path)
    assert files_of(done.run().model) == demo_files()
    assert origin.count(SMALL) == 1


def test_bytes_that_are_not_what_was_published_are_refused(tmp_path: Path) -> None:
    content = bytearray(demo_files()[SMALL])
    content[-1] ^= 1
    with place("oci") as origin:
        origin.held.wrong[SMALL] = bytes(content)
        failing = job(origin, tmp_path)
        with pytest.raises(ServerError, match=f"{SMALL} of oci://.* arrived with another SHA-256 than published"):
            failing.run()
        assert (origin.count(LARGE), origin.count(SMALL)) == (1, 5)
        assert [each.name for each in (tmp_path / "v" / "checkpoints").glob("*.receipt.json")] == []


REFUSALS = [
    ("hf", {"token": "another"}, r"does not exist, or is private: HF_TOKEN is set, .*Secret of model.token"),
    ("hf", {"gated": True}, r"is gated: accept its terms"),
    ("hf", {"commits": {"v1": COMMIT}}, "there is no revision main. Check the part behind @"),
    (
        "s3",
        {"error": (403, "SignatureDoesNotMatch")},
        r"refused \(SignatureDoesNotMatch\): AWS_ACCESS_KEY_ID and .* set",
    ),
    ("s3", {"error": (404, "NoSuchBucket")}, r"is not there \(NoSuchBucket\): check bucket, s3.endpoint"),
    ("oci", {"password": "another"}, r"refused \(HTTP 401\): OCI_USERNAME and OCI_PASSWORD are set"),
    ("oci", {"asks": "basic", "password": "another"}, r"refused \(HTTP 401\): OCI_USERNAME"),
    ("oci", {"tag": "2.0"}, r"is not there \(HTTP 404\): check host, repository, and tag"),
    ("oci", {"status": 403}, r"refused \(HTTP 40[13]\)"),
]


@pytest.mark.parametrize(("kind", "fault", "message"), REFUSALS)
def test_a_refusal_is_one_sentence_with_the_fix_at_once_and_without_the_token(
    kind: str, fault: dict[str, object], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with place(kind) as origin:
        for name, value in fault.items():
            setattr(origin.held, name, value)
        failing = job(origin, tmp_path)
        with pytest.raises(InputError, match=message) as failed:
            failing.run()
        assert failing.time.slept == []
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # of no library either
    gc.collect()  # a connection that was left open is an error of a test
    assert SECRET not in f"{failed.value} {failing.log} {everything_below(tmp_path)} {failing.credentials}"


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_token_the_message_says_so(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with place(kind) as origin:
        if kind == "s3":
            origin.held.error = (403, "AccessDenied")
        asking = Credentials(hf_endpoint=origin.server.url)
        with pytest.raises(InputError, match=r"(HF_TOKEN is|are) not set"):
            Job(origin.file(tmp_path), asking).run()


def test_what_anybody_may_read_needs_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind, open_to_all in (("hf", {"token": None}), ("s3", {}), ("oci", {"asks": None})):
        with place(kind) as origin:
            for name, value in open_to_all.items():
                setattr(origin.held, name, value)
            (tmp_path / kind).mkdir()
            done = Job(origin.file(tmp_path / kind), Credentials(hf_endpoint=origin.server.url))
            assert files_of(done.run().model) == demo_files()
            assert not any("authorization" in map(str.lower, each.headers) for each in origin.server.asked)


def test_a_password_that_the_registry_itself_asks_for_and_a_token_that_runs_out(tmp_path: Path) -> None:
    with place("oci") as origin:
        origin.held.asks = "basic"
        job(origin, tmp_path).run()
        shutil.rmtree(tmp_path / "v")
        origin.held.asks = "token"
        stopped = job(origin, tmp_path)
        answer = origin.held.answer

        def forgetful(asked: Asked) -> Answer:
            given: Answer = answer(asked)
            if "/blobs/" in asked.path and len(origin.held.tokens) == 1:
                origin.held.tokens[0] = "none"  # the first is good for one file
            return given

        origin.held.answer = forgetful
        with serving_http(forgetful) as server:
            origin.server, origin.source = server, f"oci://{server.address}/team/model:1.0"
            stopped = job(origin, tmp_path)
            assert files_of(stopped.run().model) == demo_files()


def test_a_server_that_is_busy_is_asked_again_and_one_that_is_not_there_is_told(origin: Place, tmp_path: Path) -> None:
    if origin.kind == "s3":
        origin.held.error = (503, "SlowDown")
    else:
        origin.held.status = 503
    failing = job(origin, tmp_path)
    with pytest.raises(ServerError, match=r"(SlowDown|HTTP 503); given up after 5 tries"):
        failing.run()
    assert failing.time.slept == [1, 2, 4, 8]
    assert "trying again in 8 s" in failing.log


@pytest.mark.parametrize("kind", ["s3", "oci"])
@pytest.mark.parametrize("tls", [False, True])
def test_no_server_and_the_wrong_protocol(kind: str, tls: bool, tmp_path: Path) -> None:
    with place(kind) as origin:
        file = origin.file(tmp_path)
        text = file.read_text()
        if tls:  # a server that speaks plain HTTP
            text = text.replace("http://", "https://").replace("insecure: true", "insecure: false")
        else:
            text = text.replace(origin.server.address, "127.0.0.1:9")
        file.write_text(text)
        failing = Job(file, origin.credentials)
        with pytest.raises(InputError if tls else ServerError) as failed:
            failing.run()
    assert ("certificate" if tls else "can't be reached") in str(failed.value)
    assert SECRET not in str(failed.value)


def test_no_hub(tmp_path: Path) -> None:
    with place("hf") as origin:
        failing = Job(origin.file(tmp_path), Credentials(hf_token=SECRET, hf_endpoint="http://127.0.0.1:9"))
        with pytest.raises(
            ServerError, match=r"hf://org/model can't be reached \(.*refused.*\).*given up after 5 tries"
        ):
            failing.run()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_told_before_it_is_fetched(kind: str, tmp_path: Path) -> None:
    with place(kind, {"README.md": b"nothing", "other.json": b"{}"}) as origin:
        with pytest.raises(InputError, match=r"holds no checkpoint: there is no config.json at its top, but 1 other"):
            job(origin, tmp_path).run()
        assert origin.count("other.json") == 0


@pytest.mark.parametrize(
    "name", ["../config.json", "a/config.json", "..", "/etc/config.json", ".hidden.json", "a\nb.json"]
)
def test_names_that_could_lead_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with place("oci", {**demo_files(), name: b"{}"}) as origin:
        with pytest.raises(InputError, match="do not trust this source"):
            job(origin, tmp_path).run()
        assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == [
            tmp_path / "pipeline.yaml"
        ]


def test_a_full_disk_is_told_before_and_while_it_fills(
    origin: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("canvasrt.pipeline.transfer.free_bytes", lambda place: 70_000_000)
    monkeypatch.setattr("canvasrt.pipeline.transfer._SPARE_BYTES", 69_000_000)
    needed = sum(map(len, demo_files().values()))
    with pytest.raises(
        CapacityError, match=f"{needed:,} bytes in all, {needed:,} of them still missing, and 70,000,000"
    ):
        job(origin, tmp_path).run()
    assert origin.count(LARGE) == 0


def test_a_checkpoint_that_does_not_open_gets_no_name(tmp_path: Path) -> None:
    files = {**demo_files(), INDEX: b"{}"}
    with place("hf", files) as origin:
        with pytest.raises(CheckpointError, match="found no weight_map"):
            job(origin, tmp_path).run()
        assert [path.suffix for path in (tmp_path / "v" / "checkpoints").iterdir() if path.is_dir()] == [".partial"]


def bundle_files(folder: Path, **changes: object) -> dict[str, bytes]:
    bundles.write(folder, DEMO, **changes)
    return files_of(folder)


def test_a_bundle_is_fetched_and_verified_before_it_gets_its_name(tmp_path: Path) -> None:
    files = bundle_files(tmp_path / "b")
    wanted = {"profile": "rtx-5090", "checkpoint": None, "bundle": {"name": "demo"}}
    with place("oci", {**files, "README.md": b"#"}) as origin:
        wanted["bundle"] = {"name": "demo", "source": origin.source}
        folder = job(origin, tmp_path, **wanted).run().model
        assert folder == tmp_path / "v" / "engines" / "demo"
        assert files_of(folder) == files
        flip(folder / "text.engine")
        job(origin, tmp_path, **wanted).run()
        assert files_of(folder) == files
    damaged = {**files, "text.engine": files["text.engine"][:-1] + b"x"}
    with place("oci", damaged) as origin:
        wanted["bundle"] = {"name": "other", "source": origin.source}
        with pytest.raises(BundleError, match=r"text\.engine has the SHA-256"):
            job(origin, tmp_path, **wanted).run()
        assert not (tmp_path / "v" / "engines" / "other").exists()


def test_a_bundle_that_is_not_what_the_pipeline_says_is_refused(tmp_path: Path) -> None:
    with place("oci", bundle_files(tmp_path / "b")) as origin:
        wanted = {"checkpoint": None, "bundle": {"name": "demo", "source": origin.source}}
        with pytest.raises(BundleError, match=r"was built for rtx-5090 \(12\.0\), and profile l40s is 8\.9"):
            job(origin, tmp_path, profile="l40s", **wanted).run()
        job(origin, tmp_path, profile="rtx-5090", **wanted).run()
        with pytest.raises(BundleError, match="and profile l40s is"):
            job(origin, tmp_path, profile="l40s", **wanted).run()
    weights = host_bundle(tmp_path / "s", DEMO, context=256, chunk=64, canvases=1, slots=1, weights="stripped")
    with place("oci", files_of(weights)) as origin:
        wanted = {"checkpoint": None, "bundle": {"name": "other", "source": origin.source}}
        with pytest.raises(BundleError, match=r"has no weights inside: say bundle\.weights: stripped"):
            job(origin, tmp_path, profile="rtx-5090", **wanted).run()
        stripped = {"checkpoint": {"source": str(DEMO)}, "bundle": {**wanted["bundle"], "weights": "stripped"}}
        assert job(origin, tmp_path, profile="rtx-5090", **stripped).run().checkpoint == DEMO
        other = shutil.copytree(DEMO, tmp_path / "other")
        flip(other / "model.safetensors")
        stripped["checkpoint"] = {"source": str(other)}
        with pytest.raises(BundleError, match="another fine-tune"):
            job(origin, tmp_path, profile="rtx-5090", **stripped).run()


def test_another_source_under_the_same_name_is_fetched_anew_and_a_strangers_folder_left_alone(tmp_path: Path) -> None:
    files = bundle_files(tmp_path / "b")
    wanted = {"profile": "rtx-5090", "checkpoint": None}
    with place("oci", files) as origin:
        bundle = {"name": "demo", "source": origin.source}
        folder = job(origin, tmp_path, **wanted, bundle=bundle).run().model
        origin.held.tag = "2.0"
        bundle = {"name": "demo", "source": origin.source.replace(":1.0", ":2.0")}
        again = job(origin, tmp_path, **wanted, bundle=bundle)
        again.run()
        assert again.made == ["demo"]
        assert "was fetched from another place: source oci://" in again.log
        receipt_file(folder).unlink()
        with pytest.raises(InputError, match=r"demo is there without demo.receipt.json, .*: remove it"):
            job(origin, tmp_path, **wanted, bundle=bundle).run()
        assert files_of(folder) == files
