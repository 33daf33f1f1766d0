"""`sssd publish-labels`: pseudo labels on the Hub."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from sssd_zoo.configs import PublishLabelsArgs
from sssd_zoo.evaluation.reports.early_exit import network_source
from sssd_zoo.files import (
    atomic_write_text,
    disk_errors,
    sha256_of,
    write_json,
)
from sssd_zoo.files.run_folder import LABEL_ARRAYS, kind_of
from sssd_zoo.files.untrusted import copy_files
from sssd_zoo.hub.publish import check_repo, labels_card, send, verify_labels
from sssd_zoo.labels.pseudo_labels import PseudoLabels


def publish_labels(args: PublishLabelsArgs) -> None:
    """`sssd publish-labels`."""
    check_repo(args)
    source = Path(args.labels)
    if kind_of(source) == "fit":
        source /= "labels"
    labels = PseudoLabels.load(source)
    with TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        folder = Path(scratch)
        copy_files(source, LABEL_ARRAYS, folder)
        leave_out_paths(folder / "labels.parquet")
        meta = {
            **labels.meta,
            # A folder's path means nothing on another machine; hf-hub:ORG/NAME does.
            "model": network_source(labels.meta["model"]),
            "sha256": sha256_of(folder, folder.iterdir()),
        }
        write_json(folder / "pseudo_labels.json", meta)
        atomic_write_text(folder / "README.md", labels_card(meta, args.repo, args.license))
        send(args, folder, "dataset", verify_labels)


def leave_out_paths(labels: Path) -> None:
    """Drops the column of file names, which can say more than their owner wants: rows tell which image is meant."""
    table = pq.read_table(labels)
    if "path" in table.column_names:
        pq.write_table(table.drop_columns(["path"]), labels)
