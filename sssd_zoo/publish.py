"""To the Hub and back: `sssd publish`, `sssd publish-labels` and `sssd pull`.

What goes up is assembled in a folder of its own, so a run's other files (checkpoints, a .env) cannot slip in; it goes
in one commit, whole or not at all, and is then fetched from there and compared. huggingface_hub checks only the size of
a download: what comes down is compared with the sha256 in the repository's metrics.json or pseudo_labels.json. Tokens
are huggingface_hub's business: its login or HF_TOKEN.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import timm
import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    DatasetCard,
    DatasetCardData,
    HfApi,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's or httpx2's, by the version; of connections too
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.cards import check_calibrated, write_card
from sssd_zoo.clustering import PseudoLabels
from sssd_zoo.config import PublishArgs, PublishLabelsArgs, PullArgs, RepoConfig
from sssd_zoo.errors import UserError
from sssd_zoo.files import atomic_dir, atomic_write_bytes, atomic_write_text, disk_errors, read_json, write_json
from sssd_zoo.hub import hub_cards
from sssd_zoo.networks import load_network

NETWORK_FILES = (
    *("README.md", "config.json", "metrics.json", "recipe.yaml", "pretrain.jsonl", "distill.jsonl"),
    *("model.safetensors", "figures/*.png", ".eval_results/*.yaml", "early_exit/*"),
)
LABEL_FILES = ("README.md", "labels.parquet", "centroids.safetensors", "pseudo_labels.json")
TIMEOUT = 10  # seconds that the Hub's first answer may take


class Weights(TypedDict, total=False):
    """What a published metrics.json says of the weights."""

    sha256: str


class Metrics(TypedDict, total=False):
    """What a published metrics.json says that is compared."""

    weights: Weights


class LabelsMeta(TypedDict, total=False):
    """What a published pseudo_labels.json says that is compared."""

    sha256: dict[str, str]


def publish(args: PublishArgs) -> None:
    """`sssd publish`."""
    check_repo(args)
    run = Path(args.run)
    if not run.is_dir():
        raise UserError(f"there is no folder {run}; give a run folder of `sssd fit` or a folder of `sssd card`")
    with TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        folder = Path(scratch)
        if (run / "README.md").is_file() and (run / "config.json").is_file():
            if args.calibrated is not None:
                raise UserError(f"{run} is a folder of `sssd card`: give --calibrated to that command")
            copy_card(run, folder)
        else:
            calibrated = check_calibrated(run, args.calibrated)
            weights = write_card(
                run, folder, calibrated=calibrated, repo=args.repo, license_name=args.license, out=scratch
            )
            atomic_write_bytes(folder / "model.safetensors", weights)
        include(run, folder, args.include)
        verify_network(folder, str(run))

        def compare(fetched: Path, where: str) -> None:
            verify_network(fetched, where)
            if sha256(fetched / "model.safetensors") != sha256(folder / "model.safetensors"):
                raise UserError(f"the weights of {where} are not those that were sent: publish them again")
            difference = float((answers(fetched) - answers(folder)).abs().max())
            if not difference <= 1e-5:
                raise UserError(f"the network of {where} answers otherwise than the one sent, by {difference:.2g}")

        send(args, folder, "model", compare)


def publish_labels(args: PublishLabelsArgs) -> None:
    """`sssd publish-labels`."""
    check_repo(args)
    source = Path(args.labels)
    labels = PseudoLabels.load(source)
    with TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        folder = Path(scratch)
        for name in ("labels.parquet", "centroids.safetensors"):
            shutil.copyfile(source / name, folder / name)
        model = labels.meta["model"]
        meta = {
            **labels.meta,
            # A folder's path means nothing elsewhere; hf-hub:ORG/NAME does.
            "model": model if ":" in model else Path(model).name,
            "sha256": {name: sha256(folder / name) for name in ("labels.parquet", "centroids.safetensors")},
        }
        write_json(folder / "pseudo_labels.json", meta)
        atomic_write_text(folder / "README.md", labels_card(meta, args.repo, args.license))
        send(args, folder, "dataset", verify_labels)


def pull(args: PullArgs) -> None:
    """`sssd pull`."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} is there already; give --overwrite to replace it")
    with atomic_dir(out) as folder:
        if "/" not in args.name:
            copy_card(hub_cards() / shipped_name(args.name), folder)
            verify_network(folder, args.name)
        else:
            check_name(args.name)
            kind, patterns = ("dataset", LABEL_FILES) if args.labels else ("model", NETWORK_FILES)
            with hub_errors(args.name, "nothing was written"):
                # The client tries downloads again for half a minute when there is no network: this fails at once.
                info = HfApi().repo_info(args.name, repo_type=kind, revision=args.revision, timeout=TIMEOUT)
                fetch(args.name, kind, str(info.sha), patterns, folder)
            (verify_labels if args.labels else verify_network)(folder, args.name)
    what = "pseudo labels" if args.labels else f"for timm.create_model('local-dir:{out}', pretrained=True)"
    print(f"{out}: {args.name}, sha256 as its card says; {what}")


def send(config: RepoConfig, folder: Path, repo_type: str, compare: Callable[[Path, str], None]) -> None:
    """Lists a folder's files, commits them, fetches them from there, compares, and tags the commit.

    Args:
        config: where to.
        folder: that holds nothing else.
        repo_type: 'model' or 'dataset'.
        compare: is given the folder of what was fetched and words for where it comes from; raises if it is not right.

    Raises:
        UserError: if any of that fails.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    sizes = [path.stat().st_size for path in files]
    print(f"{config.repo}: {len(files)} files, {sum(sizes):,} bytes")
    for name, size in zip(names, sizes, strict=True):
        print(f"{size:14,}  {name}")
    token = get_token()
    for name, path in zip(names, files, strict=True):
        if token and token.encode() in path.read_bytes():
            raise UserError(f"{name} holds your Hub token: remove it there, and renew the token; nothing was uploaded")
    if config.dry_run:
        print("dry run: nothing was uploaded")
        return
    if not token:
        raise UserError("publishing needs a login of the Hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with hub_errors(config.repo, "nothing was committed"):
        head, tagged = prepare(api, config, repo_type)
        done = commit(api, config, repo_type, dict(zip(names, files, strict=True)))
    if done.oid == head:
        print(f"{config.repo}: unchanged, nothing was uploaded")
    where = f"{config.repo} at commit {done.oid[:12]}"
    with TemporaryDirectory() as back:
        with hub_errors(config.repo, f"commit {done.oid[:12]} is there, but was not compared"):
            fetch(config.repo, repo_type, done.oid, names, Path(back))
        compare(Path(back), where)
    if config.tag is not None and tagged != done.oid:
        if tagged is not None:
            raise UserError(f"{where} is published, but tag {config.tag} is of an older commit; give another --tag")
        with hub_errors(config.repo, f"commit {done.oid[:12]} is there, without tag {config.tag}"):
            api.create_tag(config.repo, tag=config.tag, revision=done.oid, repo_type=repo_type)
    print(f"done: {done.pr_url or done.commit_url}, fetched again and compared")


def prepare(api: HfApi, config: RepoConfig, repo_type: str) -> tuple[str | None, str | None]:
    """Makes the repository and the branch where they are not there.

    Returns:
        The commits that the branch and the tag name; None for those that are not there yet.

    Raises:
        UserError: if the repository is public and should be private, or the tag is of another commit.
    """
    try:
        private = api.repo_info(config.repo, repo_type=repo_type, timeout=TIMEOUT).private
    except RepositoryNotFoundError:
        private = None
    if private is None:
        api.create_repo(config.repo, repo_type=repo_type, private=config.private or None)
    elif config.private and not private:
        raise UserError(f"{config.repo} is public already: make it private on the Hub, or drop --private")
    refs = api.list_repo_refs(config.repo, repo_type=repo_type)
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    branch = config.revision or constants.DEFAULT_REVISION
    head = branches.get(branch)
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(config.tag or "")
    if tagged is not None and tagged != head:
        raise UserError(f"{config.repo} has a tag {config.tag} of another commit, which stays; give another --tag")
    if head is None and not branch.startswith("refs/"):
        api.create_branch(config.repo, branch=branch, repo_type=repo_type)
    return head or branches.get(constants.DEFAULT_REVISION), tagged


def commit(api: HfApi, config: RepoConfig, repo_type: str, files: dict[str, Path]) -> CommitInfo:
    """Commits files, by their paths in the repository, in one commit; those unchanged are not sent."""

    def ask() -> CommitInfo:
        return api.create_commit(
            config.repo,
            [CommitOperationAdd(name, str(path)) for name, path in files.items()],
            commit_message=config.commit_message or "Publish by sssd-zoo",
            repo_type=repo_type,
            revision=config.revision,
            create_pr=config.pull_request,
        )

    try:
        return ask()
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError) or config.pull_request:
            raise
        # The connection broke, perhaps after the Hub had committed: this sends what is still missing, if anything.
        return ask()


def fetch(repo: str, repo_type: str, commit_id: str, patterns: tuple[str, ...] | list[str], folder: Path) -> None:
    """Downloads files of a commit into an empty folder, past the cache, whose files may be damaged."""
    snapshot_download(repo, repo_type=repo_type, revision=commit_id, allow_patterns=list(patterns), local_dir=folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def copy_card(card: Path, folder: Path) -> None:
    """Copies a folder of `sssd card`, and where its weights ship with the package, those."""
    for path in sorted(card.rglob("*")):
        name = path.relative_to(card).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in NETWORK_FILES):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    if not (folder / "model.safetensors").exists() and card.name in timm.list_pretrained("sssd_*"):
        weights = Path(getattr(timm.get_pretrained_cfg(card.name), "file", None) or "")
        if not weights.is_file():
            raise UserError(f"the weights of {card.name} are not where they should be: reinstall sssd-zoo")
        shutil.copyfile(weights, folder / "model.safetensors")


def shipped_name(name: str) -> str:
    """The name and tag of weights that ship, from those or from the name alone.

    Raises:
        UserError: if there are none.
    """
    known = timm.list_pretrained("sssd_*")
    found = [own for own in known if name in (own, own.split(".")[0])]
    if not found:
        raise UserError(f"no weights ship as '{name}': there are {', '.join(known)}, and ORG/NAME names one of the Hub")
    return str(found[0])


def include(run: Path, folder: Path, patterns: list[str] | str) -> None:
    """Copies other files of a run that the user named, and says how many were left out.

    Raises:
        UserError: if a pattern fits none.
    """
    wanted = [patterns] if isinstance(patterns, str) else patterns
    others = {path.relative_to(run).as_posix(): path for path in sorted(run.rglob("*")) if path.is_file()}
    others = {name: path for name, path in others.items() if not (folder / name).exists()}
    for pattern in wanted:
        named = [name for name in others if fnmatch(name, pattern)]
        if not named:
            raise UserError(f"--include {pattern} fits no file of {run} that would not go anyway")
        for name in named:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(others.pop(name), folder / name)
    if others:
        some = ", ".join(list(others)[:3])
        print(f"left out, for want of --include: {len(others)} other files of {run} ({some}{', ...'[: len(others)]})")


def verify_network(folder: Path, where: str) -> None:
    """Compares the weights of a folder with what its metrics.json says of them.

    Args:
        folder: of a published network.
        where: what to call it in errors.

    Raises:
        UserError: if a file is missing, or the weights are others.
    """
    missing = [name for name in ("config.json", "metrics.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{where} holds no network with its card: {', '.join(missing)} missing")
    said = read_json(folder / "metrics.json", Metrics).get("weights", {}).get("sha256")
    if said is None:
        raise UserError(f"the metrics.json of {where} tells no sha256 of the weights: they cannot be trusted")
    check_sha256(folder / "model.safetensors", said, where)


def verify_labels(folder: Path, where: str) -> None:
    """Compares pseudo labels with what their pseudo_labels.json says of them.

    Args:
        folder: of published pseudo labels.
        where: what to call it in errors.

    Raises:
        UserError: if a file is missing or another.
    """
    missing = [name for name in LABEL_FILES if not (folder / name).is_file()]
    said = {} if missing else read_json(folder / "pseudo_labels.json", LabelsMeta).get("sha256", {})
    if not said:
        raise UserError(f"{where} holds no labels of `sssd publish-labels`: {', '.join(missing) or 'sha256'} missing")
    for name in ("labels.parquet", "centroids.safetensors"):
        check_sha256(folder / name, said.get(name), where)
    PseudoLabels.load(folder)


def check_sha256(path: Path, said: str | None, where: str) -> None:
    """Refuses a file whose sha256 is another than the one said.

    Raises:
        UserError: that names both.
    """
    if (found := sha256(path)) != said:
        raise UserError(
            f"{path.name} of {where} is damaged: its sha256 is {found[:12]}..., "
            f"not {str(said)[:12]}...; run the command again"
        )


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.inference_mode()
def answers(folder: Path) -> Tensor:
    """What a folder's network says to a fixed batch, [4, num_classes]; its features where it has no classes."""
    model: Any = load_network(str(folder)).eval()
    shape = model.pretrained_cfg["input_size"]
    result: Tensor = model(torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))
    return result


def labels_card(meta: dict[str, Any], repo: str, license_name: str) -> str:
    """The card of a data set of pseudo labels, from its pseudo_labels.json."""
    data = DatasetCardData(
        license=license_name,
        task_categories=["image-classification"],
        tags=["sssd", "pseudo-labels"],
        source_datasets=[meta["data"]] if "/" in meta["data"] else None,
        pretty_name=f"Pseudo labels of {meta['data']}",
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "labels.parquet"}]}],
    )
    template = (hub_cards() / "labels_card.md.jinja").read_text(encoding="utf-8")
    return str(DatasetCard.from_template(data, template_str=template, meta=meta, repo=repo)).rstrip() + "\n"


def check_repo(config: RepoConfig) -> None:
    """Refuses what could not be published.

    Raises:
        UserError: that says what.
    """
    check_name(config.repo)
    if config.pull_request and (config.revision or config.tag):
        raise UserError("--pull_request goes to the branch 'main' and has no tag: drop --revision and --tag, or it")


def check_name(repo: str) -> None:
    """Refuses what is no name of a repository.

    Raises:
        UserError: that says why.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"'{repo}' is no repository's name, ORG/NAME: {error}") from error
    if "/" not in repo:
        raise UserError(f"'{repo}' is no repository's name, ORG/NAME: whose is it?")


@contextmanager
def hub_errors(repo: str, state: str) -> Iterator[None]:
    """Turns what the Hub, the network and the client raise into one line that says what to do.

    Args:
        repo: what was asked for.
        state: how an error leaves things.

    Raises:
        UserError: for any of them; errors of the disk pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its answers can be of any shape, and what the client makes of them
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{repo}: {reason(error)}; {state}") from error


def reason(error: BaseException) -> str:
    """What went wrong, and what to do, from an error or the one that it came of."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for own in chain:
        if isinstance(own, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE keeps the Hub away: unset it, or use a folder that was pulled before"
        if isinstance(own, HfHubHTTPError):
            todo = {
                401: "the Hub knows no such token, or no such repository: run `hf auth login`, or set HF_TOKEN",
                403: "your token may not do that: take one that may write to it",
                404: "there is no such repository, revision or file, or your token may not see it",
                409: "it is there already",
                412: "another commit came between: run the command again",
                429: "the Hub wants fewer requests: run the command again later",
            }
            status = own.response.status_code
            return f"{todo.get(status, 'the Hub failed: run the command again later')} (status {status})"
        if isinstance(own, HTTPError):
            kind = type(own).__name__
            return (
                f"the Hub cannot be reached at {constants.ENDPOINT} ({kind}): check the network, run the command again"
            )
    return f"the Hub's client failed ({' '.join(str(error).split())[:200]}): run the command again"
