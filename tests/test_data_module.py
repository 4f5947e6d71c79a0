"""The base data module: one order of events, the same on every process, with loaders a Trainer can use."""

import csv
from itertools import chain
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from lit_defect.data import guard
from lit_defect.data.loading import TrainBatchSampler
from lit_defect.data.module import DefectDataModule
from lit_defect.data.samples import Sample
from lit_defect.data.settings import share_of_step
from lit_defect.errors import DataError, UserError
from tests.fakes import damage, save, surface


class Folder(DefectDataModule):
    """`good_*.png` and `bad_*.png` of a folder, the latter with masks."""

    def __init__(self, root, **kwargs):
        super().__init__(**kwargs)
        self.root = str(root)
        self.source = "real"

    @property
    def class_names(self):
        return ["good", "bad"]

    @property
    def normal_class(self):
        return 0

    def find_samples(self):
        found = []
        for path in sorted(Path(self.root).glob("*_*.png")):
            bad = path.name.startswith("bad")
            mask = str(path.with_suffix(".mask.png")) if bad else None
            found.append(Sample(path=str(path), name=path.name, label=int(bad), mask=mask, source=self.source))
        return [s for s in found if ".mask." not in s.path]


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        good = surface(rng, (20, 24))
        bad, mask = damage(rng, surface(rng, (20, 24)), 0)
        save(good, tmp_path / "data" / f"good_{i:02d}.png")
        save(bad, tmp_path / "data" / f"bad_{i:02d}.png")
        save(mask, tmp_path / "data" / f"bad_{i:02d}.mask.png")
    return tmp_path / "data"


@pytest.fixture
def make(root, tmp_path):
    def build(stage="fit", **kwargs):
        module = Folder(root, **{"cache_dir": str(tmp_path / "cache"), "leakage": "off", "batch_size": 4} | kwargs)
        module.prepare_data()
        module.setup(stage)
        return module

    return build


def names(loader):
    return [name for batch in loader for name in batch["name"]]


def test_splits_cover_the_data_once_and_counts_say_so(make):
    module = make()
    parts = [{s.name for s in module.samples[split]} for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 24
    counts = module.counts()
    assert set(counts) == {"train", "val", "test"}
    assert counts["test"] == {"good": 3, "bad": 3}
    assert module.samples["predict"] == module.samples["test"]


@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
def test_every_cache_serves_the_pixels_of_the_files(make, root, cache):
    module = make(cache=cache, with_masks=True)
    for split in ("train", "val", "test"):
        for batch in module.loader(split, batch_size=3):
            assert batch["mask"].dtype == torch.uint8
            for image, mask, name in zip(batch["image"], batch["mask"], batch["name"], strict=True):
                stored = np.asarray(Image.open(root / name))
                np.testing.assert_array_equal(image, np.stack([stored] * 3))
                marked = root / name.replace(".png", ".mask.png")
                expected = np.asarray(Image.open(marked)) > 0 if marked.exists() else np.zeros((20, 24))
                np.testing.assert_array_equal(mask[0], expected)


def test_workers_and_sizes(make):
    alone, helped = make(image_size=(8, 10), cache="off"), make(image_size=(8, 10), cache="off", num_workers=2)
    for a, b in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert a["image"].shape == (4, 3, 8, 10)
        assert torch.equal(a["image"], b["image"])
        assert a["name"] == b["name"]
    assert next(iter(make(image_size=16).test_dataloader()))["image"].shape[2:] == (16, 16)


def test_pictures_of_different_sizes_need_a_size_or_batches_of_one(make, root):
    save(np.full((30, 24), 99, np.uint8), root / "good_00.png")
    module = make()
    with pytest.raises(DataError, match=r"data\.image_size"):
        [names(module.loader(split, batch_size=24)) for split in ("train", "val", "test")]
    one = make(batch_size=1)
    assert sum(len(names(one.loader(split))) for split in ("train", "val", "test")) == 24


def test_identity_without_decoding(make, monkeypatch):
    module = make()
    module.serve_images = False
    monkeypatch.setattr("lit_defect.data.cache.read_pixels", None)
    batch = next(iter(module.test_dataloader()))
    assert "image" not in batch
    assert batch["name"] == [s.name for s in module.samples["test"]][:4]


def test_a_loader_made_before_images_are_declined_decodes_nothing(make, monkeypatch):
    module = make(cache="off", num_workers=2)
    loader = module.train_dataloader()  # Lightning makes it before a task computes its features
    module.serve_images = False
    monkeypatch.setattr("lit_defect.data.cache.read_pixels", None)
    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", None)
    assert "image" not in next(iter(loader))


def test_tensors_move_to_the_device_and_strings_stay(make):
    batch = next(iter(make().test_dataloader()))
    moved = make().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert list(moved) == list(batch)
    assert {key for key in moved if getattr(moved[key], "is_meta", False)} == {"image", "label", "index"}
    assert all(moved[key] is batch[key] for key in moved if key not in ("image", "label", "index"))


# ---- pictures at their own size -------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["off", "ram"])
def test_originals_are_the_files_whatever_the_batches_are_scaled_to(make, root, cache):
    save(surface(np.random.default_rng(1), (33, 17)), root / "good_00.png")
    module = make(image_size=8, with_masks=True, cache=cache)
    seen = set()
    for split in ("train", "val", "test"):
        for batch in module.loader(split):
            for index, name in zip(batch["index"].tolist(), batch["name"], strict=True):
                picture, mask = module.original(split, index)
                stored = np.asarray(Image.open(root / name))
                assert picture.dtype == mask.dtype == np.uint8
                np.testing.assert_array_equal(picture, np.stack([stored] * 3, -1))
                marked = root / name.replace(".png", ".mask.png")
                expected = np.asarray(Image.open(marked)) // 255 if marked.exists() else np.zeros_like(stored)
                np.testing.assert_array_equal(mask, expected)
                seen.add(picture.shape)
    assert seen == {(20, 24, 3), (33, 17, 3)}


def test_originals_of_mirrored_pictures_are_mirrored_with_their_masks(make, root):
    with pytest.warns(UserWarning, match="mirrored"):
        module = make(test="mirrored_train", with_masks=True)
    for position, sample in enumerate(module.samples["test"]):
        picture, mask = module.original("test", position)
        np.testing.assert_array_equal(picture[:, ::-1, 0], np.asarray(Image.open(sample.path)))
        if sample.mask:
            np.testing.assert_array_equal(mask[:, ::-1] * 255, np.asarray(Image.open(sample.mask)))


def test_no_masks_is_not_the_same_as_an_empty_mask(make, root, tmp_path):
    assert make().original("test", 0)[1] is None
    masked = make(with_masks=True)
    good = next(i for i, s in enumerate(masked.samples["test"]) if not s.label)
    assert not masked.original("test", good)[1].any()
    save(np.full((9, 7), 7, np.uint8), tmp_path / "new" / "one.png")
    module = Folder(root, cache_dir=str(tmp_path / "cache"), predict_root=str(tmp_path / "new"), with_masks=True)
    module.setup("predict")
    picture, mask = module.original("predict", 0)
    assert picture.shape == (9, 7, 3)
    assert mask is None


def test_originals_are_converted_as_the_batches_are(make, root):
    stored = np.arange(20 * 24, dtype=np.uint8).reshape(20, 24)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned a quarter to the right
    Image.fromarray(stored).save(root / "good_00.png", exif=turned)
    module = make(on_wrong_mode="convert", batch_size=1)
    split, position = next(
        (k, i) for k, v in module.samples.items() for i, s in enumerate(v) if s.name == "good_00.png"
    )
    picture, _ = module.original(split, position)
    np.testing.assert_array_equal(picture[..., 0], np.rot90(stored, -1))
    np.testing.assert_array_equal(picture.transpose(2, 0, 1), module.loader(split).batch([position])["image"][0])


def test_originals_need_a_split_that_is_there(make, root, tmp_path):
    with pytest.raises(DataError, match="no val split before setup"):
        Folder(root).original("val", 0)
    with pytest.raises(DataError, match=r"data\.val_fraction"):
        make(val_fraction=0.0).original("val", 0)


def test_mirrored_test_set_warns_and_shows_mirrored_training_pictures(make, root):
    with pytest.warns(UserWarning, match="mirrored training pictures"):
        module = make(test="mirrored_train")
    assert len(module.samples["train"]) + len(module.samples["val"]) == 24
    assert names(module.test_dataloader()) == [s.name + "#mirrored" for s in module.samples["train"]]
    batch = next(iter(module.test_dataloader()))
    stored = np.asarray(Image.open(batch["path"][0]))
    np.testing.assert_array_equal(batch["image"][0, 0], stored[:, ::-1])
    with pytest.raises(UserError, match="leakage=error"):
        make(test="mirrored_train", leakage="error")


def test_guard_finds_the_mirrored_test_set_and_writes_records(make, tmp_path):
    with pytest.warns(UserWarning, match="near-duplicate"):
        module = make(test="mirrored_train", leakage="warn")
    found = {(leak.name_a, leak.name_b) for leak in module.leaks if leak.orientation == "mirrored"}
    assert found >= {(s.name, s.name + "#mirrored") for s in module.samples["train"]}
    module.write_records(tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"splits.csv", "leakage.csv", "leakage.png"}
    with (tmp_path / "run" / "leakage.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(module.leaks)


@pytest.mark.parametrize("how", ["auto", "written"])
def test_leaks_are_an_error_or_a_group_file_that_mends_them(make, root, tmp_path, how):
    for path in sorted(root.glob("good_0[0-5].png")):  # each part a second time, a little darker
        pixels = np.asarray(Image.open(path))
        save((pixels * 0.97).astype(np.uint8), root / path.name.replace("good_0", "good_5"))
    with pytest.raises(DataError, match=r"data\.group_file"):
        make(leakage="error")
    with pytest.warns(UserWarning, match="near-duplicate"):
        module = make(leakage="warn")
    module.write_records(tmp_path / "run")
    written = tmp_path / "run" / "groups.csv"
    mended = make(leakage="error", group_file="auto" if how == "auto" else str(written))
    assert mended.leaks == []
    with written.open() as stream:
        groups = {row["path"]: row["group"] for row in csv.DictReader(stream)}
    assert {s.name: s.group for samples in mended.samples.values() for s in samples} == groups
    for i in range(6):
        pair = {f"good_0{i}.png", f"good_5{i}.png"}
        assert any(pair <= {s.name for s in samples} for samples in mended.samples.values())


def test_split_file_repeats_a_split(make, tmp_path):
    first = make(seed=5)
    first.write_records(tmp_path / "run")
    again = make(seed=6, split_file=str(tmp_path / "run" / "splits.csv"))
    assert {k: {s.name for s in v} for k, v in again.samples.items()} == {
        k: {s.name for s in v} for k, v in first.samples.items()
    }


def test_bad_files_stop_the_run_or_are_skipped_and_listed(make, root, tmp_path):
    (root / "good_03.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"good_03\.png"):
        make()
    with pytest.warns(UserWarning, match="Left out of the data set: unreadable 1"):
        module = make(on_bad_file="skip")
    assert "good_03.png" not in {s.name for samples in module.samples.values() for s in samples}
    module.write_records(tmp_path / "run")
    assert "good_03.png,unreadable," in (tmp_path / "run" / "skipped.csv").read_text()


def test_generated_pictures_may_not_validate_or_test(make, root, tmp_path):
    given = "".join(f"{s.name},{'val' if s.label else 'train'}\n" for s in make()._divided)
    (tmp_path / "s.csv").write_text(f"name,split\n{given}")
    module = Folder(root, cache_dir=str(tmp_path / "cache"), leakage="off", split_file=str(tmp_path / "s.csv"))
    module.source = "stable-diffusion"
    with pytest.raises(DataError, match="generated pictures are in the val split"):
        module.setup("fit")


def test_predict_root_needs_no_training_data(root, tmp_path):
    save(np.full((9, 9), 7, np.uint8), tmp_path / "new" / "a" / "one.png")
    save(np.full((8, 8), 7, np.uint8), tmp_path / "new" / "two.png")
    module = Folder("/nowhere", cache_dir=str(tmp_path / "cache"), predict_root=str(tmp_path / "new"), image_size=4)
    module.setup("predict")
    (batch,) = module.predict_dataloader()
    assert batch["name"] == ["a/one.png", "two.png"]
    assert batch["label"].tolist() == [-1, -1]
    assert batch["image"].shape == (2, 3, 4, 4)
    assert len({module.sample_key(sample) for sample in module.samples["predict"]}) == 2


@pytest.mark.parametrize(
    ("split", "shown"), [("test", ["test"]), ("val", ["val"]), ("train", ["train"]), ("all", ["train", "val", "test"])]
)
def test_predict_runs_over_the_split_that_was_asked_for_in_its_order(make, split, shown):
    module = make("predict", predict_split=split, with_masks=True)
    assert names(module.predict_dataloader()) == [s.name for part in shown for s in module.samples[part]]
    assert all("mask" in batch for batch in module.predict_dataloader())
    assert module.predict_split == module.hparams["predict_split"] == split


def test_new_pictures_go_before_the_split_to_predict(make, tmp_path):
    save(np.full((9, 9), 7, np.uint8), tmp_path / "new" / "one.png")
    module = make("predict", predict_root=str(tmp_path / "new"), predict_split="all")
    assert names(module.predict_dataloader()) == ["one.png"]


def test_an_empty_split_to_predict_is_called_by_its_name(make):
    with pytest.raises(DataError, match=r"no samples in the val split: set data\.val_fraction"):
        make("predict", predict_split="val", val_fraction=0.0).predict_dataloader()


def test_sample_key_changes_with_whatever_changes_the_pixels(make, root):
    plain = make()
    sample = plain.samples["train"][0]
    key = plain.sample_key(sample)
    assert make().sample_key(sample) == key
    assert make(image_size=8).sample_key(sample) != key
    scaled = make(image_size=8).sample_key(sample)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("PIL.__version__", "0.1")
        assert make(image_size=8).sample_key(sample) != scaled, "another Pillow scales otherwise"
        assert make().sample_key(sample) == key
    with pytest.warns(UserWarning, match="mirrored"):
        mirrored = make(test="mirrored_train").samples["test"][0]
    assert plain.sample_key(mirrored) != plain.sample_key(
        next(s for samples in plain.samples.values() for s in samples if s.path == mirrored.path)
    )
    Image.open(sample.path).rotate(90).save(sample.path)
    assert make().sample_key(sample) != key


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"global_batch_size": 0},
        {"eval_batch_size": 0},
        {"batches_per_epoch": 0},
        {"image_size": 0},
        {"num_workers": -1},
    ],
)
def test_settings_out_of_range_are_named(root, setting):
    with pytest.raises(UserError, match=rf"data\.{next(iter(setting))}"):
        Folder(root, **setting)


def test_missing_split_says_what_to_set(make):
    module = make(test_fraction=0.0)
    with pytest.raises(DataError, match=r"data\.test_fraction"):
        module.test_dataloader()
    assert make(val_fraction=0.0).val_dataloader() == []


class GoodOnly(Folder):
    """The same folder for a task that learns from good pictures only."""

    good_only = True


def test_a_module_of_good_only_neither_trains_nor_validates_on_defects(root, make, tmp_path):
    plain = make(seed=2)
    module = GoodOnly(root, cache_dir=str(tmp_path / "cache"), leakage="off", batch_size=4, seed=2)
    module.setup("fit")
    good = {split: [s for s in plain.samples[split] if not s.label] for split in ("train", "val")}
    assert {split: module.samples[split] for split in ("train", "val")} == good
    assert module.samples["test"] == plain.samples["test"]
    assert module.counts()["val"] == {"good": len(good["val"]), "bad": 0}
    assert sorted(names(module.val_dataloader())) == sorted(s.name for s in good["val"])
    assert {label for batch in module.train_dataloader() for label in batch["label"].tolist()} == {0}


class Recorder(pl.LightningModule):
    """Notes which samples each process gets; `folder` collects them."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.seen, self.layer = str(folder), [], torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.seen += batch["index"].tolist()
        return self.layer(batch["label"].float()[:, None]).mean()

    def test_step(self, batch, batch_idx):
        self.seen += batch["index"].tolist()

    def on_test_epoch_end(self):
        Path(self.folder, f"{self.global_rank}.txt").write_text(" ".join(map(str, self.seen)))

    def on_train_epoch_end(self):
        Path(self.folder, f"{self.global_rank}.txt").write_text(" ".join(map(str, self.seen)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", logger=False, barebones=False, **quiet, **kwargs)


@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_test_and_training_without_repeats(root, tmp_path):
    data = Folder(
        root, cache_dir=str(tmp_path / "cache"), leakage="off", batch_size=4, test_fraction=0.3, val_fraction=0.0
    )
    data.setup("fit")
    tested, trained = len(data.samples["test"]), len(data.samples["train"])
    assert tested % 2 == 1  # an odd number, which a padding sampler would repeat
    runs = {"test": (tmp_path / "test", tested, tested), "fit": (tmp_path / "fit", trained, trained // 8 * 8)}
    for verb, (folder, count, expected) in runs.items():
        folder.mkdir()
        run = trainer(devices=2, strategy="ddp_fork", max_epochs=1)
        getattr(run, verb)(Recorder(folder), data)
        shares = [[int(i) for i in (folder / f"{rank}.txt").read_text().split()] for rank in (0, 1)]
        assert len(shares[0] + shares[1]) == len(set(shares[0] + shares[1])) == expected
        assert max(shares[0] + shares[1]) < count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("devices", [1, 2])
def test_epochs_have_the_steps_that_were_asked_for(root, tmp_path, devices):
    data = Folder(
        root, cache_dir=str(tmp_path / "cache"), leakage="off", batch_size=4 // devices, val_fraction=0.0,
        batches_per_epoch=11, image_size=8,
    )  # fmt: skip
    strategy = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {"devices": 1}
    run = trainer(max_epochs=1, **strategy)
    run.fit(Recorder(tmp_path), data)
    shares = [[int(i) for i in (tmp_path / f"{rank}.txt").read_text().split()] for rank in range(devices)]
    assert [len(share) for share in shares] == [11 * 4 // devices] * devices
    size = 4 // devices
    steps = [{i for share in shares for i in share[k * size : (k + 1) * size]} for k in range(11)]
    assert all(len(step) == 4 for step in steps)
    assert set.union(*steps[:4]) <= set(range(18))
    assert sum(map(len, steps[:4])) == len(set.union(*steps[:4])) == 16  # the first pass: 18 samples, 2 left out


@pytest.mark.filterwarnings("ignore")
def test_the_length_of_training_counts_the_steps_that_were_asked_for(make, tmp_path):
    module = make(batches_per_epoch=7, image_size=8)
    run = trainer(max_epochs=2)
    run.fit(Recorder(tmp_path), module)
    assert run.global_step == run.estimated_stepping_batches == 14


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_open_with_weights_only_and_overfitting_repeats_its_batches(make, tmp_path):
    module = make(image_size=(8, 8))
    task = Recorder(tmp_path)
    run = trainer(max_epochs=2, overfit_batches=2)
    run.fit(task, module)
    assert task.seen[:8] == task.seen[8:]
    run.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert stored["datamodule_hyper_parameters"]["image_size"] == (8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "disc"}, r"data.cache is 'disc'; expected 'off' or 'ram' or 'disk'"),
        ({"test": "train"}, r"data.test is 'train'"),
        ({"predict_split": "training"}, r"data.predict_split is 'training'; expected 'test' or 'val' or"),
        ({"image_size": (8, 8, 3)}, r"expected a side or \[height, width\]"),
        ({"split_file": "s.csv", "folds": 3}, r"leave data.folds, data.shots and data.val_seed out"),
        ({"split_file": "s.csv", "val_seed": 1}, r"leave data.folds, data.shots and data.val_seed out"),
    ],
)
def test_settings_from_python_are_checked_as_those_of_the_command_line(root, settings, message):
    with pytest.raises(UserError, match=message):
        Folder(root, **settings)


def test_the_guard_compares_once_and_again_only_when_something_changed(make, root, tmp_path, monkeypatch):
    copied = root / "good_99.png"
    copied.write_bytes((root / "good_00.png").read_bytes())
    asked = []
    for name in ("find_leaks", "propose_groups"):
        plain = getattr(guard, name)
        monkeypatch.setattr(guard, name, lambda *a, name=name, plain=plain: asked.append(name) or plain(*a))

    def start(folder, **settings):
        asked.clear()
        with pytest.warns(UserWarning, match="near-duplicate"):
            module = make(leakage="warn", **settings)
        module.write_records(tmp_path / folder)
        return [(tmp_path / folder / file).read_text() for file in ("leakage.csv", "groups.csv")], list(asked)

    seed = next(
        seed
        for seed in range(20)
        if len({s.split for s in make(seed=seed)._divided if s.name in ("good_00.png", "good_99.png")}) == 2
    )
    first, computed = start("a", seed=seed)
    assert computed == ["find_leaks", "propose_groups"]
    again, computed = start("b", seed=seed)
    assert (again, computed) == (first, [])
    for file in (tmp_path / "cache").glob("guard-*.json"):
        file.write_text("[")
    assert start("c", seed=seed) == (first, ["find_leaks", "propose_groups"])
    copied.write_bytes((root / "good_01.png").read_bytes())
    other = next(
        seed
        for seed in range(20)
        if len({s.split for s in make(seed=seed)._divided if s.name in ("good_01.png", "good_99.png")}) == 2
    )
    changed, computed = start("d", seed=other)
    assert computed == ["find_leaks", "propose_groups"]
    assert "good_01.png" in changed[0]


def test_a_mirrored_test_offers_no_groups(make, tmp_path):
    with pytest.warns(UserWarning, match=r"near-duplicate in train.* leakage.png of this run\.$"):
        module = make(leakage="warn", test="mirrored_train")
    module.write_records(tmp_path / "run")
    assert not (tmp_path / "run" / "groups.csv").exists()


def test_an_empty_training_split_says_where_to_look(make, root, tmp_path):
    module = make()
    text = "name,split\n" + "".join(f"{s.name},test\n" for s in module._divided)
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=r"no samples in the train split: check .*data.split_file"):
        make(split_file=str(tmp_path / "s.csv")).train_dataloader()


@pytest.mark.parametrize(("processes", "accumulated"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_a_step_has_the_same_samples_however_it_is_shared(processes, accumulated):
    """26 samples in steps of 8: three steps a pass, each of the same samples."""

    def steps(rank: int, world_size: int, together: int) -> list[list[int]]:
        share = share_of_step(8, world_size, together)
        order = TrainBatchSampler(
            [0] * 26, batch_size=share, seed=3, rank=rank, world_size=world_size, together=together, batches=4
        )
        found = list(order)
        return [list(chain(*found[i : i + together])) for i in range(0, len(found), together)]

    expected = [set(step) for step in steps(0, 1, 1)]
    shared = [steps(rank, processes, accumulated) for rank in range(processes)]
    assert [set().union(*parts) for parts in zip(*shared, strict=True)] == expected
    assert len(expected) == 4
    assert all(len(step) == 8 for step in expected)


def test_a_step_that_cannot_be_shared_says_what_could_be():
    with pytest.raises(UserError, match=r"global_batch_size = 30 cannot be shared by 4 processes x 2 .*: 32 can"):
        share_of_step(30, 4, 2)
    with pytest.raises(UserError, match=r"3 cannot be shared by 8 processes: 8 can"):
        share_of_step(3, 8, 1)
    assert share_of_step(30, 4, 2, evenly=False) == 3, "an evaluation takes no steps"
