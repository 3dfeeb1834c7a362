"""The lock of a product, and its receipt: one maker at a time, whatever dies, and no file that is not what it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from canvasrt.errors import InputError, ServerError, TimedOutError
from canvasrt.pipeline.lock import Clock, Lock, Waiting, lock_file
from canvasrt.pipeline.receipt import Entry, Receipt, difference, hash_files, read_receipt, write_receipt
from canvasrt.pipeline.transfer import Credentials, with_retries
from pipelines import Time, flip

# Takes the lock, starts a child that inherits it, says so and waits.
HOLDER = """
import subprocess, sys
from pathlib import Path
from canvasrt.pipeline.lock import Lock, Waiting
with Lock(Path(sys.argv[1]), Waiting(print)) as lock:
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.descriptor], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    child.wait()
"""


def test_a_second_holder_waits_and_says_for_whom_every_ten_seconds(tmp_path: Path) -> None:
    said: list[str] = []
    time = Time()
    with Lock(tmp_path / "p", Waiting(said.append)) as first:
        assert said == []
        with pytest.raises(TimedOutError, match=f"still being made by process {os.getpid()} on .* after 25 s"):
            Lock(tmp_path / "p", Waiting(said.append, time.clock, timeout=25)).__enter__()
        assert [line.partition("makes")[2] for line in said] == [
            f" {tmp_path}/p",
            f" {tmp_path}/p, 10 s so far",
            f" {tmp_path}/p, 20 s so far",
        ]
        assert said[0].startswith(f"waiting for process {os.getpid()} on ")

        def released(seconds: float) -> None:
            os.close(first.descriptor)

        with Lock(tmp_path / "p", Waiting(said.append, Clock(lambda: 0.0, released))) as second:
            os.dup2(second.descriptor, first.descriptor)  # for its own end
        assert len(said) == 4


def test_other_products_have_locks_of_their_own(tmp_path: Path) -> None:
    with Lock(tmp_path / "a", Waiting(pytest.fail)), Lock(tmp_path / "b", Waiting(pytest.fail)):
        assert lock_file(tmp_path / "a") != lock_file(tmp_path / "b")


def test_the_child_of_a_killed_holder_keeps_others_out_until_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "p")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        holder.kill()
        holder.wait()
        time = Time()
        try:
            with pytest.raises(TimedOutError, match=f"made by process {holder.pid}"):
                Lock(tmp_path / "p", Waiting(lambda line: None, time.clock, timeout=5)).__enter__()
        finally:
            os.kill(child, 9)
    with Lock(tmp_path / "p", Waiting(lambda line: None, timeout=30)):
        pass


def test_a_volume_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "v").write_text("a file")
    with pytest.raises(InputError, match="The volume must be writable"):
        Lock(tmp_path / "v" / "p", Waiting(pytest.fail)).__enter__()


def test_a_receipt_tells_what_changed_and_what_is_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(name.encode() * 100)
    files = {name: Entry(sha256=value, nbytes=100) for name, value in hash_files(folder, "abc").items()}
    write_receipt(tmp_path / "p.receipt.json", Receipt(made_from={"source": "s"}, files=files))
    receipt = read_receipt(tmp_path / "p.receipt.json")
    assert receipt is not None
    assert receipt.faults(folder, "full") == {}
    flip(folder / "a", 50)
    (folder / "b").write_bytes(b"b" * 99)
    (folder / "c").unlink()
    assert receipt.faults(folder, "sizes") == {
        "b": "has 99 bytes, its receipt says 100",
        "c": "can't be read (No such file or directory)",
    }
    assert receipt.faults(folder, "full").keys() == {"a", "b", "c"}
    (tmp_path / "p.receipt.json").write_text("{}")
    assert read_receipt(tmp_path / "p.receipt.json") is None


def test_what_is_not_known_differs_from_nothing() -> None:
    assert difference({"a": 1, "b": 2}, {"a": 1, "b": None}) is None
    assert difference({"a": 1}, {"a": 2}) == "a 1, and 2 is wanted"
    assert difference({}, {"a": "x"}) == "a null, and x is wanted"


def test_retries_are_bounded_only_where_nothing_arrives() -> None:
    arrived, tries, time = [0], [0], Time()

    def action() -> None:
        tries[0] += 1
        arrived[0] += 1 if tries[0] <= 10 else 0
        raise ServerError("cut")

    with pytest.raises(ServerError, match="cut; given up after 5 tries"):
        with_retries(action, lambda: arrived[0], lambda line: None, time.clock)
    assert tries[0] == 14
    assert time.slept == [1.0] * 10 + [2.0, 4.0, 8.0]


def test_no_token_is_shown_by_what_holds_it_or_left_in_a_message() -> None:
    secret = Credentials(hf_token="t0ken", aws_secret="s3cret", oci_password="passw0rd")
    assert str(secret) == "Credentials()"
    said = secret.scrub("t0ken and s3cret\nand https://me:passw0rd@host/x and https://h/blob?X-Signature=abc&b=1 end")
    assert said == "*** and *** and https://***@host/x and https://h/blob?*** end"
