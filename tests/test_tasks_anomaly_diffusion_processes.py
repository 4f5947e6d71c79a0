"""AnomalyDiffusion on two processes, killed, and through the command line: the files of one undisturbed process."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from lit_defect.generation.store import read_manifest
from tests.anomaly_diffusion import (
    contents,
    generate,
    lines,
    make_base,
    make_parts,
    marked,
    parts,
    pixels,
    task_of,
    write_config,
)
from tests.segmentation import command, fit, refused, weights
from tests.test_survival import LIMIT, reached, run, start

WORLD = 2
# Everything that draws is on.
OPTIONS = {"lora": 2, "prompt_noise": 0.1, "offset_noise": 0.1, "alignment": 0.1}
CANDIDATES = {"candidates": 2, "reweight": "official", "guidance": 1.5}


class Found(NamedTuple):
    root: Path
    base: Path
    folder: Path
    ranks: list[dict[str, torch.Tensor]]  # what each process has learnt


def on_one_rank(rank: int, root: str, base: str, folder: str, port: int) -> None:
    """Everything that needs two processes, in one launch."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "torch.distributed", FutureWarning)  # about what torch will drop
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["LIT_DEFECT_CACHE"] = f"{folder}/cache{rank}"
    two = {"devices": WORLD, "strategy": "ddp"}
    task, data = task_of(Path(base), CANDIDATES, **OPTIONS), parts(Path(root), batch_size=2, batches_per_epoch=2)
    trainer = fit(task, data, epochs=2, default_root_dir=f"{folder}/run", **two)
    trainer.save_checkpoint(f"{folder}/two.ckpt")
    torch.save({key: value.clone() for key, value in task.learnt_state().items()}, f"{folder}/{rank}.pt")
    for name, options in (("three groups", {}), ("one group", {"count": 1})):
        task.generation = type(task.generation)(**vars(task.generation) | {"count": 4} | options)
        generate(Path(folder) / "two.ckpt", task, parts(Path(root)), Path(folder) / name, **two)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("processes")
    root, base = make_parts(folder / "data"), make_base(folder / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has all modules already, but no process may fork once its autograd has threads for a GPU.
    way = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    arguments = (str(root), str(base), str(folder), port)
    torch.multiprocessing.start_processes(on_one_rank, arguments, WORLD, start_method=way)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    return Found(root, base, folder, ranks)


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def test_two_processes_learn_the_same(two):
    first, second = two.ranks
    assert first.keys() == second.keys()
    assert any(".lora_" in key for key in first)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    saved = torch.load(two.folder / "two.ckpt", weights_only=True)["state_dict"]
    assert [key for key in first if not torch.equal(first[key], saved[key])] == []


@pytest.mark.parametrize(("name", "count"), [("three groups", 4), ("one group", 1)])
def test_two_processes_make_the_files_of_one(two, tmp_path, name, count):
    """With an odd number of groups, and with less than one for each process."""
    task = task_of(two.base, CANDIDATES | {"count": count}, **OPTIONS)
    rows = generate(two.folder / "two.ckpt", task, parts(two.root), tmp_path / "alone")
    assert [int(row["number"]) for row in rows] == list(range(2 * count))
    assert differing(contents(tmp_path / "alone"), contents(two.folder / name)) == []


def test_one_process_goes_on_where_two_have_stopped(two, tmp_path):
    shutil.copytree(two.folder / "one group", tmp_path / "set")
    task = task_of(two.base, CANDIDATES | {"count": 4}, **OPTIONS)
    generate(two.folder / "two.ckpt", task, parts(two.root), tmp_path / "set")
    images = {key: value for key, value in contents(tmp_path / "set").items() if key.endswith(".png")}
    expected = contents(two.folder / "three groups")
    assert images == {key: expected[key] for key in images}
    assert len(read_manifest(tmp_path / "set")) == 8


# ---- through the command line ----------------------------------------------------------------------------------


class Run(NamedTuple):
    home: Path
    folder: Path  # the run's
    root: Path  # of the data

    def words(self, *more: object) -> tuple[object, ...]:
        """What follows `predict`, as the experiments' headers say it."""
        return ("--config", self.folder / "config.yaml", "--run_id", self.folder.name, "--ckpt_path", "last", *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("home")
    root, base = make_parts(home / "data"), make_base(home / "base")
    config = write_config(home / "tiny.yaml", root, base, data={"batches_per_epoch": 2}, **OPTIONS)
    command(home, "fit", "--config", config, "--run_id", "one")
    return Run(home, home / "runs" / "tiny" / "one", root)


@pytest.fixture
def predict(trained):
    return lambda *more: command(trained.home, "predict", *trained.words(*more))


def test_a_run_and_its_data_set(trained, predict, capsys):
    assert (trained.folder / "learnt.safetensors").is_file()
    assert json.loads((trained.folder / "run.json").read_text())["status"] == "finished"
    before = contents(trained.folder)
    predict()
    told = capsys.readouterr().out
    root = trained.folder / "generated"
    rows = lines(root / "manifest.csv")
    assert len(rows) == 4
    for row in rows:
        mask = marked(root / row["mask"])
        assert (pixels(root / row["image"])[~mask] == pixels(trained.root / row["source"])[~mask]).all()
    for pair in ("tile/crack", "tile/hole"):
        (line,) = [line for line in told.splitlines() if pair in line]
        assert re.findall(r"\d+", line) == ["2", "2"], "asked for and accepted"
    assert str(root) in told
    assert pixels(trained.folder / "figures" / "generated.png").std() > 10
    after = contents(trained.folder)
    assert {key for key in before if before[key] != after[key]} <= {"run.json"}, "the training is as it was"
    made = contents(root)
    predict("--model.generation.count", "3")
    assert len(lines(root / "manifest.csv")) == 6
    assert all(contents(root)[key] == value for key, value in made.items() if key.endswith(".png"))


def test_another_folder_and_other_options(trained, predict, tmp_path):
    folder = ("--model.generation.output", tmp_path / "set")
    predict(*folder, "--model.generation.types", "[hole]", "--model.generation.preset", "paper", "--seed_everything", 4)
    about = json.loads((tmp_path / "set" / "about.json").read_text())
    assert about["seed"] == 4
    assert about["counts"]["pairs"] == {"tile/hole": {"asked": 2, "accepted": 2}}
    with (trained.folder / "splits.csv").open(newline="") as file:
        split = {row["name"]: row["split"] for row in csv.DictReader(file)}
    known = {row["name"] for row in lines(tmp_path / "set" / "trained_on.csv")}
    assert {split[name] for name in known} == {"train"}, "no picture that tests"
    assert len(known) == 5


def test_off_is_a_word(trained, predict, tmp_path, capsys):
    """On the command line; in YAML it is false, and the error says what to do."""
    predict("--model.generation.output", tmp_path / "set", "--model.generation.reweight", "off")
    assert {row["reweight"] for row in lines(tmp_path / "set" / "manifest.csv")} == {"off"}
    path = tmp_path / "off.yaml"
    path.write_text((trained.folder / "config.yaml").read_text().replace("reweight: 'off'", "reweight: off"))
    words = ("--config", path, *trained.words()[2:])
    message = refused(capsys, lambda *more: command(trained.home, *more), "predict", *words)
    assert "model.generation.reweight = False" in message
    assert 'write "off"' in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--model.generation.types", "[dent]"), "'dent' was not learnt; there are crack, hole"),
        (("--model.generation.steps", "7"), "model.init_args.generation.steps = 7: must divide the 1000 steps"),
        (("--model.generation.sampler", "euler"), "sampler"),
        (("--trainer.fast_dev_run", "true"), "set model.init_args.generation.count instead"),
        (("--model.lora", "0"), "lora = 0, but the checkpoint was learnt with 2; take that"),
    ],
    ids=lambda value: value[0].rsplit(".", 1)[-1] if isinstance(value, tuple) else "",
)
def test_options_that_do_not_do(trained, predict, tmp_path, capsys, words, expected):
    message = refused(capsys, predict, "--model.generation.output", tmp_path / "set", *words)
    assert expected in message
    assert not list((tmp_path / "set").rglob("*.png"))


def test_a_base_that_was_trained_again(trained, capsys, tmp_path):
    """The folder has its old name, and other weights."""
    other = make_base(tmp_path / "base", seed=3)
    words = trained.words("--model.base", other, "--model.generation.output", tmp_path / "set")
    message = refused(capsys, lambda *more: command(trained.home, *more), "predict", *words)
    assert "is not the base that this checkpoint was learnt on" in message
    assert not (tmp_path / "set").exists()


# ---- real processes --------------------------------------------------------------------------------------------


def kill_when(ready: Any, folder: Path, *arguments: object) -> None:
    """Start a process and kill it with all its children as soon as `ready()`."""
    process, deadline = start(folder, *arguments), time.monotonic() + LIMIT
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed: " + (folder / "log.txt").read_text()[-2000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_generation_ends_as_an_undisturbed_one(trained, predict, tmp_path):
    more = ("--model.generation.count", "24")
    predict(*more, "--model.generation.output", tmp_path / "whole")
    root = tmp_path / "killed"
    words = trained.words(*more, "--model.generation.output", root)
    for times in range(1, 3):

        def some_are_there(wanted: int = 8 * times) -> bool:
            return len(list(root.rglob("test/*/*.png"))) >= wanted

        kill_when(some_are_there, trained.home, "predict", *words)
    assert 16 <= len(list(root.rglob("test/*/*.png"))) < 48
    assert not (root / "manifest.csv").exists()
    run(trained.home, "predict", *words, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    found = {key: value for key, value in contents(root).items() if not Path(key).name.startswith(".")}
    assert differing(contents(tmp_path / "whole"), found) == []


@pytest.mark.slow
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(trained, tmp_path):
    saving = {"class_path": "lit_defect.callbacks.run.LastCheckpoint", "init_args": {"every_n_steps": 3}}
    config = write_config(tmp_path / "tiny.yaml", trained.root, trained.home / "base",
                          data={"batches_per_epoch": 20}, trainer={"max_epochs": 4, "callbacks": [saving]},
                          **OPTIONS)  # fmt: skip
    words = ("fit", "--config", config, "--run_id")
    run(tmp_path, *words, "whole")
    whole, killed = (tmp_path / "runs" / "tiny" / name for name in ("whole", "killed"))
    for _ in range(2):
        seen = reached(killed)
        kill_when(lambda seen=seen: reached(killed) >= seen + 4, tmp_path, *words, "killed", "--resume")
    assert 0 < reached(killed) < json.loads((whole / "run.json").read_text())["steps"]
    run(tmp_path, *words, "killed", "--resume")
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    exports = [load_file(run_folder / "learnt.safetensors") for run_folder in (whole, killed)]
    assert all(torch.equal(exports[0][key], value) for key, value in exports[1].items())
    assert exports[0].keys() == expected.keys()
