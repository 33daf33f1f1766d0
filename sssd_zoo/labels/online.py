"""DACSD's pseudo labels: clusters of the features that the network itself has before each epoch."""

import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sssd_zoo.configs import RuntimeConfig
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.data.loading import ImageData
from sssd_zoo.distributed import rank, world_size
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.features import read_batches, stack_features
from sssd_zoo.files import atomic_write_bytes, atomic_write_text
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.files.run_folder import checkpoints_in
from sssd_zoo.labels.kmeans import IntArray, check_clusters, kmeans, normalise
from sssd_zoo.labels.pseudo_labels import match_labels

LOG = "own_labels.jsonl"


def epochs_to_keep(runtime: RuntimeConfig) -> int:
    """Epochs whose labels a resume from one of the last checkpoints may need: back to the one before the oldest."""
    return max(1, runtime.checkpoint_epochs) * max(1, runtime.keep_last) + 1


class OnlineLabels:
    """The labels of each epoch: k-means of the network's own features, renumbered to agree with those of the last.

    DACSD ("[1]" of the SSSD paper, its table 3) learns, clusters and self-distils with one network. Clusters have no
    order, so each clustering is renumbered to agree with the labels of the epoch before as far as any renumbering can:
    else the classifiers would have to begin again at every epoch.

    Args:
        data: the images.
        k: number of clusters.
        seed: of k-means.
        autocast: precision of the forward pass, or none.
        kept: epochs whose labels stay on disk, see `epochs_to_keep`.

    Raises:
        UserError: if so many images do not make so many clusters.
    """

    def __init__(
        self,
        data: ImageData,
        k: int,
        seed: int,
        *,
        autocast: torch.dtype | None = None,
        kept: int = 3,
    ) -> None:
        check_clusters(k, len(data))
        self.data, self.seed, self.autocast = data, seed, autocast
        self.kept = kept
        self.num_classes = k
        self.identity = f"own, K = {k}"

    def attach(self, network: nn.Module, out: Path, spec: InputSpec, steps_per_epoch: int) -> None:
        """Says whose features are clustered, and where the labels are kept: own_labels/ and own_labels.jsonl of `out`.

        Args:
            network: the one in training, neither wrapped nor compiled.
            out: the run folder.
            spec: what it wants of its images.
            steps_per_epoch: of the training; tells which labels a checkpoint needs.
        """
        self.network, self.out, self.spec, self.steps_per_epoch = network, out, spec, steps_per_epoch

    def for_epoch(self, epoch: int, step: int = 0) -> Tensor:
        """The labels of an epoch, int64 [N] in 0..k-1, the same in every process.

        Args:
            epoch: its number, from 0.
            step: the step in it that training is at; after the first the labels are those made before it.

        Raises:
            UserError: if a resume does not find those that it needs.
        """
        labels = torch.zeros(len(self.data), dtype=torch.long)
        if rank() == 0:
            labels = torch.from_numpy(self._load(epoch, "in the middle") if step else self._make(epoch))
        if world_size() > 1:
            shared = labels.to(self._device)
            dist.broadcast(shared, 0)
            labels = shared.cpu()
        return labels

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _file(self, epoch: int) -> Path:
        return self.out / "own_labels" / f"epoch-{epoch:04}.npy"

    def _load(self, epoch: int, place: str) -> IntArray:
        """The labels of an epoch, which are needed at this place in the training."""
        try:
            content = self._file(epoch).read_bytes()
            recorded = next((line.get("sha256") for line in self._lines() if line["epoch"] == epoch), None)
            if recorded is not None and hashlib.sha256(content).hexdigest() != recorded:
                raise ValueError("it is not as it was written (its sha256 differs)")
            labels: IntArray = np.load(BytesIO(content))
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot resume {place} of epoch {epoch} without its labels, {self._file(epoch)}: {error}; start again "
                "with --overwrite"
            ) from error
        return labels

    def _make(self, epoch: int) -> IntArray:
        batches = self.data.batches(torch.arange(len(self.data)).split(256))
        read = read_batches(self.network, batches, self.spec, autocast=self.autocast)
        features = stack_features(read, len(self.data))[-1]
        k, seed = self.num_classes, self.seed + epoch
        labels = kmeans(normalise(features.numpy()), k, seed=seed).labels
        line: dict[str, Any] = {"epoch": epoch, "clusters": len(np.unique(labels))}
        if epoch:
            last = self._load(epoch - 1, "at the end")
            labels = match_labels(labels, last, k)
            line["kept"] = float((labels == last).mean())
        if self.data.labels is not None:
            from sklearn.metrics import normalized_mutual_info_score  # takes a second to import

            line["nmi"] = float(normalized_mutual_info_score(self.data.labels, labels))
        self._save(epoch, labels, line)
        return labels

    def _save(self, epoch: int, labels: IntArray, line: dict[str, Any]) -> None:
        buffer = BytesIO()
        np.save(buffer, labels)
        content = buffer.getvalue()
        atomic_write_bytes(self._file(epoch), content)
        self._remove_superseded(epoch)
        line["sha256"] = hashlib.sha256(content).hexdigest()
        lines = [kept for kept in self._lines() if kept["epoch"] < epoch]  # a resume may make an epoch's again
        atomic_write_text(self.out / LOG, "".join(json.dumps(kept) + "\n" for kept in [*lines, line]))

    def _remove_superseded(self, epoch: int) -> None:
        """Removes the labels that no resume needs, once those of an epoch are written."""
        # A checkpoint, such as one of the best, needs those of its epoch; at the end of an epoch they are still its.
        steps = [int(path.name.removeprefix("step-")) for path in checkpoints_in(self.out / "checkpoints")]
        needed = {(step - 1) // self.steps_per_epoch for step in steps}
        for number in range(epoch - self.kept + 1):
            if number not in needed:
                self._file(number).unlink(missing_ok=True)

    def _lines(self) -> list[dict[str, Any]]:
        """What own_labels.jsonl tells of each epoch so far."""
        return read_metrics(self.out / LOG, "epoch")
