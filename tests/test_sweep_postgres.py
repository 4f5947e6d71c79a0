"""A sweep whose trials are kept in PostgreSQL: Debian's server, in a temporary folder, with a password."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from lit_defect.sweep import main
from tests.sweeping import at_once, claimed_by, epochs_of, hold, outcome, run_record, start, sweep_file, until

PASSWORD = "kept-to-itself"
SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(not SERVERS, reason="no PostgreSQL server: apt-get install postgresql"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a database of a server that runs as another user than root, which it refuses."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = {"user": "postgres", "group": "postgres", "cwd": folder} if os.geteuid() == 0 else {"cwd": folder}
    if user.get("user"):
        shutil.chown(folder, "postgres", "postgres")
    programs = SERVERS[-1].parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    secret = folder / "secret"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    data, how = str(folder / "data"), f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        _run([programs / "initdb", "-D", data, "-U", "sweeper", "-A", "scram-sha-256", "--pwfile", secret], user)
        _run([programs / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", how, "start"], user)
        try:
            yield f"postgresql://sweeper:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            _run([programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], user)
    finally:
        shutil.rmtree(folder)


def _run(command: list[object], user: dict) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, **user)


def test_workers_that_come_to_an_empty_database_at_the_same_moment_all_find_the_study(tmp_path, url):
    with psycopg.connect(url, autocommit=True) as server:
        for name in ("one", "two", "three"):
            server.execute(f"CREATE DATABASE {name}")
            assert at_once(tmp_path, f"{url.removesuffix('postgres')}{name}") == ["toy"] * 6


def test_two_workers_of_which_one_is_killed(tmp_path, url):
    held = hold(tmp_path)
    file = sweep_file(tmp_path, parameters={"x": {"values": list(range(8))}}, options={"epochs": 3, "hold": held})
    first, second = start(file, "--storage", url), start(file, "--storage", url)
    (of_first,) = until(lambda: claimed_by(tmp_path, first.pid))  # before that, the others wait for three minutes
    until(lambda: (tmp_path / f"runs/toy/toy-{of_first}-s0/state.json").exists())
    first.kill()
    first.wait()
    held.unlink()
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    trials = outcome(file)["trials"]
    assert [trial["params"]["x"] for trial in trials] == list(range(8))
    assert {trial["state"] for trial in trials} == {"complete"}
    assert all(epochs_of(file, trial["runs"][0]) == [0, 1, 2] for trial in trials)
    assert sum(run_record(file, trial["runs"][0])["launches"] for trial in trials) == 9
    assert len(list((tmp_path / "runs/toy").glob("toy-t*"))) == 8
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if PASSWORD in path.read_text(errors="replace")]
    assert PASSWORD not in said


def test_status_and_errors_do_not_show_the_password(tmp_path, url, capsys):
    file = sweep_file(tmp_path, name="other", options={"epochs": 1})
    assert main([str(file), "--runs_dir", str(tmp_path / "runs"), "--storage", url]) == 0
    assert main(["status", str(file), "--runs_dir", str(tmp_path / "runs"), "--storage", url]) == 0
    assert "3 of 3 trials" in capsys.readouterr().out
    assert main([str(file), "--runs_dir", str(tmp_path / "elsewhere"), "--storage", url]) == 2
    assert main([str(file), "--runs_dir", str(tmp_path / "runs"), "--storage", url.replace(PASSWORD, "wr0ng")]) == 2
    said = capsys.readouterr()
    assert "of another folder" in said.err
    assert "cannot be used" in said.err
    assert PASSWORD not in said.err + said.out
    assert "wr0ng" not in said.err
