"""What `sssd fit` and `sssd compare` check before they decode an image: all that would fail later, told at once."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sssd_zoo.configs import AnchoredConfig, DataConfig, FitArgs, OptimConfig
from sssd_zoo.data.inputs import InputSpec, input_spec, storage_default
from sssd_zoo.data.loading import ImageData, OpenedImages, open_images
from sssd_zoo.data.sources import is_local
from sssd_zoo.distributed import rank
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plain
from sssd_zoo.labels.kmeans import check_clusters
from sssd_zoo.models import feature_width
from sssd_zoo.models.cost import multiply_adds
from sssd_zoo.models.maps import shared_map
from sssd_zoo.models.networks import (
    check_channels,
    check_sizes,
    choose_model,
    choose_size,
    load_encoder,
    load_network,
    load_trunk,
    load_trunk_of,
    new_network,
    new_trunk,
    weights_digest,
)
from sssd_zoo.pipeline.defaults import Scale
from sssd_zoo.pipeline.distill import new_student
from sssd_zoo.pipeline.mistakes import Mistakes
from sssd_zoo.pipeline.pretrain import note_training

Trained = Callable[[Any], Mapping[str, OptimConfig]]  # see `Preflight`


class Networks(NamedTuple):
    """The timm names of the student and of the pretext, and the digest of the weights that the latter starts from."""

    student: str
    pretext: str
    start: str


class Opened(NamedTuple):
    """The images, D_tar, and D_pre where it is another; and the side of the views in pixels."""

    images: OpenedImages
    other: OpenedImages | None
    size: int


class Preflight:
    """The checks of a command's arguments; `settle` tells all mistakes.

    Args:
        args: of `sssd fit` or `sssd compare`.
        trained: gives the settings of the trainings on D_tar after the pretext, by their names in the arguments.
        warm: whether a student is to start from M_ssl's weights.
        anchored: the settings of the trainings that have an anchor, by their names in the arguments.
        pretext: whether a training needs M_ssl.
        complete: gives the arguments, where some of them depend on the images and on the device.
        mistakes: what is wrong already.
    """

    def __init__(
        self,
        args: Any,
        trained: Trained,
        *,
        warm: bool,
        anchored: Mapping[str, AnchoredConfig],
        pretext: bool,
        complete: Callable[[Scale], Any] | None,
        mistakes: Mistakes,
    ) -> None:
        self.args, self.trained, self.warm, self.complete, self.mistakes = args, trained, warm, complete, mistakes
        self.anchored, self.pretext = anchored, pretext
        self._check_choices()

    def _check_choices(self) -> None:
        """Notes choices of the pretext that exclude one another."""
        args, mistakes = self.args, self.mistakes
        if args.features is None:
            if args.teacher_size is not None:
                mistakes.note("--teacher_size needs --features: add --features, or drop --teacher_size")
            if args.pretrain_split is not None and args.pretrain_data is None:
                mistakes.note("--pretrain_split selects a split of --pretrain_data: give that too, or use --split")
            return
        given = [name for name in ("pretrain_model", "pretrain_data", "pretrain_split") if getattr(args, name)]
        for name in [*given, *(["pretrain.init"] if args.pretrain.init is not None else [])]:
            mistakes.note(f"--features uses a network without pretraining it: remove --{name}")

    def open(self, *, require_labels: bool) -> Opened:
        """Opens the data, which counts the images.

        Args:
            require_labels: see `load_images`.

        Raises:
            UserError: with all mistakes so far, if the data cannot be opened, or would have to be downloaded first.
        """
        args, mistakes, config = self.args, self.mistakes, DataConfig.of(self.args)
        if not all(map(is_local, [config.data] if isinstance(config.data, str) else config.data)):
            mistakes.tell()
        with mistakes.noted():
            images = open_images(
                config, default_size=self._storage_size(), require_labels=require_labels, progress=rank() == 0
            )
            if args.test_split is not None:
                with mistakes.noted():
                    open_images(replace(config, split=args.test_split))
            other = self._open_other(config, images.size)
            self.opened = Opened(images, other, choose_size(images, args.image_size))
            return self.opened
        mistakes.tell()
        raise AssertionError("a mistake was noted")

    def _storage_size(self) -> int:
        """The side of larger images as stored, for the student and a network that is to look at them as it is."""
        size = storage_default(self.args.image_size)
        if self.args.features is not None:
            with self.mistakes.noted():
                encoder = load_encoder(self.args.features, self.args.teacher_size)
                size = max(size, storage_default(input_spec(encoder).size))
        return size

    def _open_other(self, config: DataConfig, size: int) -> OpenedImages | None:
        """D_pre, where it is another; columns and revision are D_tar's, larger images are made as small as its."""
        args = self.args
        if args.pretrain_data is None or args.features is not None:
            return None
        theirs: dict[str, Any] = {"image_column": None, "label_column": None, "unlabelled": True, "revision": None}
        config = replace(config, data=args.pretrain_data, split=args.pretrain_split, **theirs)
        return open_images(config, default_size=size, progress=rank() == 0)

    def settle(
        self, size: int, *, images: int, pretrain_images: int, device: str, processes: int
    ) -> tuple[Networks, Any]:
        """Chooses the networks and the settings that depend on the images, and checks whether all of it can train.

        Args:
            size: side of the views in pixels.
            images: see `Scale`.
            pretrain_images: see `Scale`.
            device: see `Scale`.
            processes: see `Scale`.

        Returns:
            The networks, and the arguments, complete.

        Raises:
            UserError: with all mistakes.
        """
        args, mistakes, data = self.args, self.mistakes, self.opened.images
        for opened in (data, self.opened.other):
            if opened is not None and len(opened) < 2:
                mistakes.note(
                    f"{opened.name} has {len(opened)} image, and training needs at least 2; `sssd embed` and `sssd "
                    "predict` use a network as it is"
                )
                mistakes.tell()
        with mistakes.noted():
            student = choose_model(args.model, size, exits=True)
            check_sizes(student, [size])
            pretext = choose_model(args.pretrain_model or student, size)
            if self.complete is not None:
                macs = multiply_adds(new_student(student, 2, "sssd", "plain", data), (data.channels, size, size))["4"]
                args = self.complete(Scale(images, pretrain_images, macs, device, processes))
            networks = Networks(student, pretext, self._start(pretext))
            self._check_trainings(args, networks, size, (images, pretrain_images), processes)
        mistakes.tell()
        return networks, args

    def _start(self, pretext: str) -> str:
        """Whether the networks can start from the weights asked for; the digest of the pretext's."""
        if self.args.features is not None or self.args.pretrain.init is None:
            return ""
        with self.mistakes.noted():
            return check_start(self.args.pretrain.init, pretext, self.opened.other or self.opened.images)
        return ""

    def _check_trainings(
        self, args: Any, networks: Networks, size: int, counts: tuple[int, int], processes: int
    ) -> None:
        """Notes what cannot train; `counts` are those of D_tar and D_pre."""
        mistakes, moco, data = self.mistakes, args.pretrain, self.opened.images
        schedule = getattr(args, "budget", None) is None  # else the epochs are yet to be chosen
        self._check_augment(args, data)
        if args.features is not None:
            with mistakes.noted():
                check_channels(args.features, load_network(args.features, num_classes=0), data)
        elif self.pretext:
            with mistakes.noted("pretrain"):
                check_sizes(networks.pretext, [size, *moco.sizes])
            note_training(mistakes, moco, processes, counts[1], "pretrain", schedule=schedule)
        for name, config in self._trained(args).items():
            note_training(mistakes, config, processes, counts[0], name, schedule=schedule)
            with mistakes.noted(name):
                check_sizes(networks.student, [size, *config.sizes])
        self._check_anchors(args, networks, size, counts[0])
        if self.warm:
            with mistakes.noted():
                named = args.features
                source = new_trunk(networks.pretext, data=data) if named is None else load_trunk_of(named)
                load_trunk(new_network(networks.student, data), source)
        if getattr(args, "init", None) is not None:
            with mistakes.noted():
                check_start(args.init, networks.student, data)
        with mistakes.noted():
            check_clusters(args.cluster.k, counts[0], "--cluster.k")

    def _trained(self, args: Any) -> Mapping[str, Any]:
        """What `trained` gives; nothing of settings that contradict one another, which is noted."""
        with self.mistakes.noted():
            return self.trained(args)
        return {}

    def _check_anchors(self, args: Any, networks: Networks, size: int, images: int) -> None:
        """Notes feature maps that cannot be learnt, and views that cannot be kept."""
        encoder = None
        if any(config.dense or config.cached_views for config in self.anchored.values()):
            with self.mistakes.noted():
                encoder, spec = encoder_like(
                    args.features, args.teacher_size, networks.pretext, self.opened.images, size
                )
        if encoder is None:
            return
        for name, config in self.anchored.items():
            numbers = feature_width(encoder)
            with self.mistakes.noted(name):
                if config.dense:
                    student = new_network(networks.student, self.opened.images)
                    numbers += shared_map(student, [size, *config.sizes], encoder, spec.size).numbers
                if args.overwrite or not (Path(args.out) / "config.yaml").exists():  # the views may be there already
                    check_space(Path(args.out), config, images, numbers)

    def _check_augment(self, args: Any, data: OpenedImages) -> None:
        """Notes augmentations that have no meaning for these images."""
        pretrained = {"pretrain": args.pretrain} if self.pretext and args.features is None else {}
        for name, config in {**pretrained, **self._trained(args)}.items():
            blur = getattr(config, "blur", None)
            with self.mistakes.noted(name):
                config.augment.resolved(contrastive=blur is not None, channels=data.channels, blur=blur or 0.0)


def encoder_like(
    features: str | None, teacher_size: int | None, arch: str, data: ImageData | OpenedImages | None, size: int
) -> tuple[Any, InputSpec]:
    """M_ssl, or, where it is yet to be pretrained, a network of its kind with new weights.

    Args:
        features: run folder or timm name of M_ssl; None where it is pretrained.
        teacher_size: side in pixels of the images that `features` looks at, where it is not the network's own.
        arch: timm name of the network to pretrain.
        data: the images that it is made for.
        size: side in pixels of its images.

    Returns:
        The network, without a classifier, and the spec of its inputs.

    Raises:
        UserError: if `features` cannot be loaded, or does not take images of that size.
    """
    if features is not None:
        network = load_encoder(features, teacher_size)
        return network, input_spec(network)
    network = new_trunk(arch, data=data)
    return network, input_spec(network, size)


def check_space(out: Path, config: AnchoredConfig, images: int, numbers: int) -> None:
    """Refuses cached views that do not fit on the disk.

    Args:
        out: the run's folder.
        config: how many views.
        images: number of them.
        numbers: that are kept of each view, in 2 bytes each.
    """
    needed = 2 * numbers * images * config.cached_views
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"cached_views {config.cached_views} needs {needed / 1e9:.1f} GB, and {out} has {free / 1e9:.1f} GB free: "
            "give fewer, or another --out"
        )


def size_note(args: FitArgs, size: int) -> str | None:
    """What to know about the views of `size` px that were chosen, where the weights to start from are of others."""
    start = args.init or args.pretrain.init
    if args.image_size is not None or start is None:
        return None
    own = input_spec(load_network(start, pretrained=False, num_classes=0)).size
    if own == size:
        return None
    return (
        f"the views are {size} px, and {plain(start)} was trained at {own} px: --image_size {own} trains at that size, "
        f"at {own * own / size / size:.2g} times the cost of a step"
    )


def check_start(name: str, arch: str, data: ImageData | OpenedImages) -> str:
    """The digest of the weights of a network, whose trunk a network of `arch` for these images can start from.

    Raises:
        UserError: if it cannot.
    """
    network = load_trunk_of(name)
    load_trunk(new_trunk(arch, data=data), network)
    return weights_digest(network)
