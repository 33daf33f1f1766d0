"""`sssd report`: the page of a finished run, RUN/report.html, which `sssd fit` writes at its end, too."""

from dataclasses import replace
from pathlib import Path

from sssd_zoo.configs import ForwardConfig, ReportArgs
from sssd_zoo.data.inputs import storage_default
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.evaluation.reports.html.gallery import Clusters, gallery
from sssd_zoo.evaluation.reports.html.page import TRAININGS, write_page
from sssd_zoo.evaluation.reports.markdown import config_of, read_results
from sssd_zoo.files import sha256
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.files.run_folder import check_writable, claim
from sssd_zoo.hub.cards import check_run
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models.networks import load_network
from sssd_zoo.pipeline.mistakes import images_of_a_run
from sssd_zoo.pipeline.rename import cluster_names


def report(args: ReportArgs) -> None:
    """`sssd report`."""
    tune_cpu()
    run = Path(args.run)
    check_run(run)
    check_writable(run, "fit")
    _, config = config_of(run)
    if args.data is not None:
        config = replace(config, data=args.data)
    pseudo = PseudoLabels.load(run / "labels")
    claim(run, "fit")
    results = read_results(run)
    # Only the images that are shown are decoded; the run has found the corrupt ones.
    with images_of_a_run(args.data):
        data = load_images(
            replace(config, in_memory=False), default_size=storage_default(results.get("image_size")), verify=False
        )
    pseudo.check(data.fingerprint, len(data))
    path = write_run_page(run, data, ForwardConfig.of(args), args.images)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


def write_run_page(run: Path, data: ImageData, forward: ForwardConfig, limit: int = ReportArgs.images) -> Path:
    """Writes report.html of a run whose other results are all there.

    Args:
        run: run folder of `sssd fit`.
        data: the images that it was trained on.
        forward: how to run its network.
        limit: number of images to show at most.

    Returns:
        The page.
    """
    results, pseudo = read_results(run), PseudoLabels.load(run / "labels")
    clusters = Clusters(
        rows=pseudo.rows,
        labels=pseudo.labels,
        distances=pseudo.distances,
        names=cluster_names(run),
        digest=sha256(run / "labels" / "labels.parquet"),
        nameable=not results.get("accuracy"),
    )
    images = gallery(load_network(str(run / "model")), data, clusters, forward, limit)
    metrics = {name: read_metrics(run / name / "metrics.jsonl") for name in TRAININGS}
    write_page(run / "report.html", str(run), results, metrics, images)
    return run / "report.html"
