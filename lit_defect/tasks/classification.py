"""Transfer classification of good and defective products: a pretrained network with a new head.

Source: Zheng & Nagata (VGG19, all of it in `experiments/classification/crops_vgg19_*.yaml`), on any timm
network, with what a factory asks beside the accuracy: escapes and overkill at a threshold that was chosen
on validation data, intervals for every figure, and pictures of the worst mistakes.
"""

from __future__ import annotations

import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import dropout

from lit_defect.anomalies import PseudoAnomaly
from lit_defect.errors import UserError
from lit_defect.losses.imbalance import make_loss
from lit_defect.metrics.classification import defect_score, threshold_for_recall
from lit_defect.nets.backbones import Backbone, Part
from lit_defect.nets.features import FeatureStore
from lit_defect.nets.gradcam import grad_cam
from lit_defect.tasks.base import Batch, DefectTask
from lit_defect.tasks.evaluation import Evaluation, check_watched, to_log
from lit_defect.tasks.frozen import cached_features
from lit_defect.tasks.pseudo import Preview, share_of, sizes_with_anomalies, with_anomalies
from lit_defect.tasks.views import VIEWS, Augment, random_views, resize, unit_range, view
from lit_defect.transfer import sent

Pixels = npt.NDArray[np.uint8]
Heat = npt.NDArray[np.float32]


class DefectClassifier(DefectTask):
    """Classifies pictures, transferring a pretrained network to the classes of the data module.

    Args:
        backbone: timm name of the network.
        weights: `hub`, `hub:TAG`, a file, `package:NAME`, or null for random ones (see `nets/weights.py`).
        transfer: what is trained: the `head` on frozen features, the `last_block` too, or `all`.
        image_size: side or (height, width) that pictures are resized to on the device; null takes them as
            the data module gives them.
        augment: views that training draws from: `none`, `flip` (left-right), `flips` (both ways),
            `dihedral` (and quarter turns), `strong` (and small affine and light changes): classical augmentation.
        average_views: predict by the mean probability over the listed views instead of the plain picture.
        cache_features: with `transfer: head`, compute the features once per picture and view and keep
            them in the data module's cache folder, for all epochs, seeds and trials.
        anomaly: makes pseudo-anomalies of normal training pictures, anew in each step, which then count as
            defective; null makes none. Needs two classes, and features that are not cached.
        anomaly_share: share of the pictures of each batch that they are; at most every other normal one changes.
        loss: `plain`, `weighted`, `focal` or `logit_adjusted` (see `losses/imbalance.py`).
        label_smoothing: share of the label that is spread over all classes.
        layer_decay: factor of the learning rate from each layer to the one before it.
        drop_rate: dropout before the classifier.
        required_recall: share of the defects that must be found on validation data; sets the threshold
            for the escape and the overkill rate.
        channels_last: memory format of the network; faster convolutions on most devices.
        compile: compile the network with torch.compile; of no use to a frozen one, whose head alone is trained.
        class_names: names of the classes; null takes them from the data module.
        normal_class: index of the good class; null takes it from the data module.
        optimizer, lr, weight_decay, schedule, warmup, monitor: see `DefectTask`.
    """

    threshold: Tensor

    def __init__(
        self,
        backbone: str = "vgg19",
        weights: str | None = "hub",
        transfer: Part = "head",
        image_size: int | tuple[int, int] | None = None,
        augment: Augment = "none",
        average_views: bool = False,
        cache_features: bool = True,
        anomaly: PseudoAnomaly | None = None,
        anomaly_share: float = 0.25,
        loss: Literal["plain", "weighted", "focal", "logit_adjusted"] = "plain",
        label_smoothing: float = 0.0,
        layer_decay: float = 1.0,
        drop_rate: float = 0.0,
        required_recall: float = 0.95,
        channels_last: bool = True,
        compile: bool = False,
        class_names: list[str] | None = None,
        normal_class: int | None = None,
        monitor: str | None = "val/auroc",
        **kwargs: Any,
    ) -> None:
        super().__init__(monitor=monitor, **kwargs)
        self.save_hyperparameters(ignore=["anomaly"], logger=False)
        if not 0 < required_recall <= 1:
            raise UserError(f"model.init_args.required_recall = {required_recall}: expected a share, 0 < r <= 1")
        if not 0 < anomaly_share < 1:
            raise UserError(f"model.init_args.anomaly_share = {anomaly_share}: expected a share, 0 < s < 1")
        self.cached = cache_features and transfer == "head"
        if self.cached and augment == "strong":
            raise UserError(
                "model.init_args.augment = strong draws a new picture each time, so features cannot be "
                "cached: set cache_features to false, or augment to dihedral"
            )
        if self.cached and anomaly is not None:
            raise UserError(
                "model.init_args.anomaly makes new pictures in each step, so features cannot be cached: set "
                "cache_features to false, or transfer to last_block or all"
            )
        self.backbone_name = backbone
        self.weights = weights
        self.transfer = transfer
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.augment: Augment = augment
        self.average_views = average_views
        self.anomaly = anomaly
        self.anomaly_share = anomaly_share
        self.loss_name = loss
        self.label_smoothing = label_smoothing
        self.layer_decay = layer_decay
        self.drop_rate = drop_rate
        self.required_recall = required_recall
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_network = compile
        self.class_names = class_names
        self.normal_class = normal_class
        self.register_buffer("threshold", torch.tensor(float("nan"), dtype=torch.float64))
        self.backbone: Backbone | None = None
        self._features: dict[str, Tensor] = {}
        self._fingerprint: str | None = None
        self._saved_groups: int | None = None  # of parameters, in the state that is gone on with
        self._preview: Preview | None = None
        self._result: dict[str, Any] = {}
        self._evaluation: Evaluation
        self._started = 0.0

    # --- construction ---

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        source = self.weights or "random"
        made = f", {type(self.anomaly).__name__}" if self.anomaly else ""
        return f"DefectClassifier on {self.backbone_name} ({source} weights), trains {self.transfer}{made}"

    def setup(self, stage: str) -> None:
        """Take the classes from the data module, or check that they are the checkpoint's.

        Raises:
            UserError: the model was made for other classes, or the splits do not allow what is asked for.
        """
        super().setup(stage)
        data = self.data
        if data is None:
            raise UserError("DefectClassifier takes its classes and samples from a data module: pass datamodule=")
        names = list(data.class_names)
        if self.class_names is not None and list(self.class_names) != names:
            raise UserError(f"the model's classes are {self.class_names}, the data's are {names}")
        self.class_names = names
        self.normal_class = data.normal_class if self.normal_class is None else self.normal_class
        self.hparams.update(class_names=names, normal_class=self.normal_class)
        counts = data.counts()
        if stage == "fit":
            self._check_training(counts.get("train", {}))
            if "val" in counts and self.trainer.limit_val_batches:
                labels = np.array([sample.label for sample in data.samples["val"]])
                check_watched(self.monitor[0] if self.monitor else "", labels, names, self.normal_class)
        elif stage == "validate" and "val" not in counts:
            raise UserError("there is no validation split: set data.val_fraction, or use `test`")

    def _check_training(self, counts: dict[str, int]) -> None:
        """The loss for classes of these sizes, pseudo-anomalies among them; two of them at least."""
        if self.anomaly is not None:
            counts = sizes_with_anomalies(counts, self.normal_class, self.anomaly_share)
        present = [name for name, count in counts.items() if count]
        if len(present) < 2:
            raise UserError(
                f"the training split has only {', '.join(present) or 'no class'}: a classifier needs two classes; "
                "for MVTecAD set data.setting to few_shot or supervised"
            )
        sizes = [1 if self.loss_name == "plain" else count for count in counts.values()]
        self.loss = make_loss(self.loss_name, sizes, label_smoothing=self.label_smoothing)

    def configure_model(self) -> None:
        """Build the network; weights are fetched only where they will be used."""
        if self.backbone is not None:
            return
        if self.class_names is None:
            raise UserError("the classes are not known: give class_names, or a trainer with a data module")
        needed = self.begins or self.transfer == "head"  # a head's checkpoint holds no frozen weights
        with self.opening("weights"):
            self.backbone = Backbone(
                self.backbone_name,
                weights=self.weights if needed else None,
                num_classes=len(self.class_names),
                image_size=self.image_size,
                drop_rate=self.drop_rate,
            )
        # timm starts EfficientNet's head for 1000 classes; two of them would begin with a loss above 1.
        classifier = self.backbone.model.get_classifier()
        torch.nn.init.normal_(classifier.weight, std=0.01)
        torch.nn.init.zeros_(classifier.bias)
        self.backbone.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.backbone.unfreeze(self.transfer)
        if self.compile_network:
            self.backbone.compile()

    @property
    def network(self) -> Backbone:
        """The network, after `configure_model`."""
        if self.backbone is None:
            raise UserError("the network is not built yet: call configure_model, or load a checkpoint")
        return self.backbone

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Layer-wise learning rates, no decay for norms and biases."""
        make = partial(
            self.network.parameter_groups, lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay
        )
        groups = make()
        if self._saved_groups in (None, sum(bool(group["params"]) for group in groups)):
            return groups
        return make(by_layer=True)  # the run was begun by an earlier version

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen and can be had again, and note which weights it was."""
        if self.transfer != "head" or self.weights is None:
            return
        state = checkpoint["state_dict"]
        for key in self._frozen_keys():
            del state[key]
        checkpoint["frozen"] = {"weights": self.weights, "fingerprint": self.fingerprint()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the classes, and put the frozen weights back in.

        Raises:
            UserError: other classes, or other frozen weights than the head was trained on.
        """
        names = checkpoint.get("hyper_parameters", {}).get("class_names")
        if names is not None and list(names) != list(self.class_names or names):
            raise UserError(f"the checkpoint's classes are {names}, the data's are {self.class_names}")
        if frozen := checkpoint.get("frozen"):
            if frozen["fingerprint"] != self.fingerprint():
                raise UserError(
                    f"the checkpoint's head belongs to other weights: it was trained on {frozen['weights']}, "
                    f"and model.init_args.weights = {self.weights} gives different ones"
                )
            own = self.state_dict()
            checkpoint["state_dict"].update({key: own[key] for key in self._frozen_keys()})
        else:
            self._fingerprint = None  # the checkpoint brings weights of its own
        if states := checkpoint.get("optimizer_states"):
            self._saved_groups = len(states[0]["param_groups"])

    def fingerprint(self) -> str:
        """Identity of the frozen features."""
        if self._fingerprint is None:
            self._fingerprint = self.network.fingerprint()
        return self._fingerprint

    def _frozen_keys(self) -> list[str]:
        body, head = "backbone.model.", f"backbone.model.{self.network.classifier}."
        return [key for key in self.state_dict() if key.startswith(body) and not key.startswith(head)]

    # --- forward ---

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 or float in [0, 1], of any size -> logits (B, C)."""
        return self.network(self._prepare(resize(unit_range(images), self.image_size)))

    def _prepare(self, images: Tensor) -> Tensor:
        return self.network.normalise(images).contiguous(memory_format=self.memory_format)

    def _probabilities(self, batch: Batch, split: str) -> Tensor:
        """(B, C) float64, of the plain picture or averaged over the views."""
        numbers = range(VIEWS[self.augment] if self.average_views else 1)
        if split in self._features:
            rows = self._features[split][batch["index"]]  # (B, V, D)
            return _mean_probability([self.network.head(rows[:, number]) for number in numbers])
        images = resize(unit_range(batch["image"]), self.image_size)
        return _mean_probability([self.network(self._prepare(view(images, number))) for number in numbers])

    # --- for the factory ---

    def for_factory(self, images: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Probabilities and class; with a good class also the defect score, and whether it reaches the threshold."""
        probability = self._probabilities({"image": images}, "factory")
        said = {"probabilities": probability.float(), "predicted": probability.argmax(1)}
        if self.normal_class is None:
            return said
        others = [number for number in range(probability.shape[1]) if number != self.normal_class]
        score = probability[:, others].sum(1)
        return {**said, "score": score.float(), "defective": score >= self.threshold}

    def factory_facts(self) -> dict[str, Any]:
        """Classes and threshold."""
        threshold = float(self.threshold)
        return {
            "class_names": list(self.class_names or ()),
            "normal_class": self.normal_class,
            "threshold": threshold if math.isfinite(threshold) else None,
        }

    def decide_at(self, threshold: float) -> None:
        """Reject from this defect score on."""
        if self.normal_class is None:
            raise UserError("--threshold: none of the classes is the good one, so there is no defect score")
        self.threshold.fill_(threshold)

    # --- cached features ---

    def on_fit_start(self) -> None:
        """Compute or read the features of a frozen network, look at pseudo-anomalies, before the first epoch."""
        if self.anomaly is not None:
            self._preview = Preview(self.anomaly, self.data, lambda images: unit_range(images.to(self.device)))
        self._cache_features("train", VIEWS[self.augment])
        if self.trainer.limit_val_batches:
            self._cache_features("val", VIEWS[self.augment] if self.average_views else 1)

    def on_test_start(self) -> None:
        """Features of the test split."""
        self._cache_features("test", VIEWS[self.augment] if self.average_views else 1)
        self._started = time.monotonic()

    def on_validation_start(self) -> None:
        """Features of the validation split, where `validate` runs without `fit`."""
        if self.trainer.state.fn == "validate":
            self._cache_features("val", VIEWS[self.augment] if self.average_views else 1)
            self._started = time.monotonic()

    def _cache_features(self, split: str, views: int) -> None:
        """Fill `self._features[split]` (n, V, D)."""
        if not self.cached or not hasattr(self.data, "sample_key"):
            return
        scale = [self.network.mean.flatten().tolist(), self.network.std.flatten().tolist()]
        setting = f"{self.fingerprint()} {scale} {self.image_size} {self.trainer.precision}"
        store = FeatureStore(self.data.cache_dir, setting, num_features=self.network.num_features)
        features = cached_features(self.trainer, self.data, split, views, store, self._features_of_view)
        self._features[split] = features.to(self.device)
        self.data.serve_images = False  # batches need identity and labels only

    @torch.no_grad()
    def _features_of_view(self, images: Tensor, number: int) -> Tensor:
        """Pictures (B, 3, H, W) uint8 -> features (B, D) float32 of one view."""
        self.network.eval()
        images = resize(unit_range(images.to(self.device)), self.image_size)
        with self.trainer.precision_plugin.forward_context():
            features = self.network.features(self._prepare(view(images, number)))
        self.network.train(self.training)
        return features.float().cpu()

    # --- training and evaluation ---

    def write_preview(self, folder: Path) -> None:
        """The first pseudo-anomalies and what the gate discards, before the training; rank 0 only."""
        if self._preview is not None:
            self._preview.write(folder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, some of whose normal pictures may be made defective, each picture in a random view."""
        batch = batch if self.anomaly is None else self._with_pseudo_anomalies(batch, self.anomaly)
        size = len(batch["label"])
        numbers = torch.randint(VIEWS[self.augment], (size,))
        if "train" in self._features:
            features = self._features["train"][batch["index"], sent(numbers, self.device)]
        elif self.transfer == "head":
            features = self.network.features(self._random_pixels(batch, numbers))
        if self.transfer == "head":  # a frozen network is in eval mode, where its own dropout rests
            logits = self.network.head(dropout(features, self.drop_rate))
        else:
            logits = self.network(self._random_pixels(batch, numbers))
        loss = self.loss(logits, batch["label"])
        self.log("train/loss", loss, batch_size=size, prog_bar=True)
        return loss

    def _with_pseudo_anomalies(self, batch: Batch, maker: PseudoAnomaly) -> Batch:
        """The batch with a share of its normal pictures made defective; one whose anomaly is rejected stays good."""
        assert self.normal_class is not None  # `setup` has looked
        rows = share_of(batch, self.normal_class, self.anomaly_share)
        changed = rows
        if len(rows):
            images, changed, _ = with_anomalies(unit_range(batch["image"]), rows, maker)
            self.log("train/rejected", 1 - len(changed) / len(rows), batch_size=len(rows))
            labels = batch["label"].index_fill(0, changed, 1 - self.normal_class)
            batch = {**batch, "image": images, "label": labels}
        self.log("train/pseudo_anomalies", len(changed) / len(batch["label"]), batch_size=len(batch["label"]))
        return batch

    def _random_pixels(self, batch: Batch, numbers: Tensor) -> Tensor:
        images = resize(unit_range(batch["image"]), self.image_size)
        return self._prepare(random_views(images, self.augment, numbers))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the probabilities."""
        self.collect(index=batch["index"], label=batch["label"], probability=self._probabilities(batch, "val"))

    def on_validation_epoch_end(self) -> None:
        """Choose the threshold and log the figures of the whole split."""
        evaluation = self._evaluation_of("val")
        if self.trainer.state.fn == "fit":
            self._choose_threshold(evaluation)
            # Every process holds the same figures of the whole split; the sync only tells Lightning so.
            self.log_dict(evaluation.watched("val", float(self.threshold)), sync_dist=True)
        else:
            self._keep_result("val", evaluation)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the probabilities."""
        self.collect(index=batch["index"], label=batch["label"], probability=self._probabilities(batch, "test"))

    def on_test_epoch_end(self) -> None:
        """All figures with their intervals, at the threshold that validation chose."""
        self._keep_result("test", self._evaluation_of("test"))
        self.log_dict(to_log(self.results_name("test"), self._result), sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities (B, C) of a batch; they are also kept for the file of predictions."""
        probability = self._probabilities(batch, "predict")
        self.collect(index=batch["index"], label=batch["label"], probability=probability)
        return probability

    def on_predict_start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_predict_epoch_end(self) -> None:
        """Keep the predictions of all processes."""
        self._keep_result("predict", self._evaluation_of("predict"))

    def _evaluation_of(self, stage: str) -> Evaluation:
        """The predictions of all processes for a whole split."""
        data = self.gathered()
        samples = self.data.samples[stage]
        return Evaluation(
            samples=[samples[position] for position in data["index"].tolist()],
            positions=data["index"].tolist(),
            probabilities=data["probability"].numpy(),
            labels=data["label"].numpy(),
            class_names=list(self.class_names or ()),
            normal_class=self.normal_class,
        )

    def _choose_threshold(self, evaluation: Evaluation) -> None:
        defective = evaluation.labels != self.normal_class
        if self.normal_class is None or not defective.any():
            return
        score = defect_score(evaluation.probabilities, self.normal_class)
        self.threshold.fill_(threshold_for_recall(score, defective, self.required_recall))

    def _keep_result(self, stage: str, evaluation: Evaluation) -> None:
        """The predictions, and their figures where the labels are known."""
        self._evaluation, self._result = evaluation, {}
        if not (evaluation.labels >= 0).all():
            return
        leaked = {leak.name_b for leak in getattr(self.data, "leaks", ()) if leak.split_b == stage}
        self._result = evaluation.result(float(self.threshold), leaked)
        self._result["required_recall"] = self.required_recall
        self._result["training_seed"] = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._result["split_seed"] = getattr(self.data, "seed", None)
        if stage not in self._features:  # features from the disk say nothing about the network's speed
            seconds = max(1e-9, time.monotonic() - self._started)
            self._result["images_per_second"] = round(len(evaluation.labels) / seconds, 1)

    def write_results(self, folder: Path, stage: str) -> None:
        """Figures, predictions and pictures of the last evaluation, in the run folder; rank 0 only."""
        from lit_defect.tasks.classification_report import write_report  # draws: not needed to train

        self.data.serve_images = True  # the pictures of the mistakes
        loader = self.data.loader(stage)

        def look(position: int, predicted: int) -> tuple[Pixels, Heat | None]:
            image = loader.batch([position])["image"].to(self.device)  # (1, 3, H, W)
            return image[0].permute(1, 2, 0).cpu().numpy(), self._activation(image, predicted)

        write_report(folder, self.results_name(stage), self._result, self._evaluation, look)

    def _activation(self, image: Tensor, target: int) -> Heat | None:
        """Class-activation map (H, W) of a picture (1, 3, H, W); None where the network has no map in space."""
        pixels = self._prepare(resize(unit_range(image), self.image_size))
        try:
            heat = grad_cam(self.network, pixels, torch.tensor([target], device=pixels.device))
        except UserError:
            return None
        return heat[0].cpu().numpy()


def _mean_probability(logits: list[Tensor]) -> Tensor:
    """(B, C) of each view -> (B, C) float64."""
    return torch.stack([part.double().softmax(1) for part in logits]).mean(0)
