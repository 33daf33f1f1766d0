"""To the Hub and back: `sssd publish`, `sssd publish-labels` and `sssd pull`.

Only listed files are copied to a temporary folder, so a run's other files (checkpoints, a .env) and the targets of
links cannot slip in. That folder is uploaded in one commit, whole or not at all, then fetched from the Hub again and
compared. huggingface_hub checks only the size of a download, so downloads are compared with the sha256 in the
repository's metrics.json or pseudo_labels.json. Tokens are left to huggingface_hub: its login or HF_TOKEN.
"""

import glob
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

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

from sssd_zoo.configs import RepoConfig
from sssd_zoo.errors import UserError, causes
from sssd_zoo.errors.text import code, listed, markdown, plain
from sssd_zoo.evaluation.embeddings import is_embeddings, is_found
from sssd_zoo.files import (
    RUN_MARK,
    atomic_write_bytes,
    read_json,
    sha256,
)
from sssd_zoo.files.bundled import cards_folder
from sssd_zoo.files.hub_client import SilentHubError, limited_waiting
from sssd_zoo.files.lock import LOCK
from sssd_zoo.files.run_folder import (
    CARD_FIGURES,
    CORRUPT,
    EARLY_EXIT,
    EVAL_RESULTS,
    LABEL_ARRAYS,
    LABELS,
    NETWORK,
    TRACKERS,
    kind_of,
)
from sssd_zoo.files.untrusted import copy_files, files_below, fits, hidden, read_inside
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models.bundled import bundled_weights
from sssd_zoo.models.networks import load_network

CARD_FILES = (
    *("README.md", "metrics.json", "recipe.yaml", "pretrain.jsonl", "distill.jsonl", *NETWORK, *CARD_FIGURES),
    *(*EVAL_RESULTS, *EARLY_EXIT),
)

PICTURES = "clusters.png"  # a figure of thumbnails of the run's images, which nobody publishes unasked

IMAGES_SHOWN = (PICTURES, "report.html", "views.png", "detections.png")  # the files of a run that show its images

# The files and folders of a run, as patterns, that name its images or folders of this machine.
NAMES_SHOWN = (
    *("config.yaml", "metrics.json", "report.md", CORRUPT, "traceback*.txt", "labels.parquet", "pseudo_labels.json"),
    *("views.json", "steps", "tensorboard", *TRACKERS),
)

LABEL_FILES = ("README.md", *LABELS)

TIMEOUT = 10  # seconds until the Hub's first response


class Weights(TypedDict, total=False):
    """What a published metrics.json records about the weights."""

    sha256: str


class Metrics(TypedDict, total=False):
    """What is read of a published metrics.json."""

    weights: Weights


class LabelsMeta(TypedDict, total=False):
    """What is read of a published pseudo_labels.json."""

    sha256: dict[str, str]


def send(config: RepoConfig, folder: Path, repo_type: str, compare: Callable[[Path, str], None]) -> None:
    """Lists a folder's files, commits them, fetches them again, compares them, and tags the commit.

    Args:
        config: where to.
        folder: that holds nothing else.
        repo_type: 'model' or 'dataset'.
        compare: takes the folder of the fetched files and what to call their origin; raises if they differ.

    Raises:
        UserError: if any step fails.
    """
    files = announce(config.repo, folder)
    if config.dry_run:
        print("dry run: nothing was uploaded")
        return
    if not get_token():
        raise UserError("publishing needs a Hub login: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with hub_errors(config.repo, "nothing was committed"):
        head, tagged = prepare(api, config, repo_type)
        done = commit(api, config, repo_type, files)
    if done.oid == head:
        print(f"{config.repo}: unchanged, nothing was uploaded")
    where = f"{config.repo} at commit {done.oid[:12]}"
    with TemporaryDirectory() as back:
        with hub_errors(config.repo, f"commit {done.oid[:12]} was made, but not compared"):
            fetch(config.repo, repo_type, done.oid, [glob.escape(name) for name in files], Path(back))
        compare(Path(back), where)
    if config.tag is not None and tagged != done.oid:
        if tagged is not None:
            raise UserError(f"{where} is published, but tag {config.tag} is on an older commit; give another --tag")
        with hub_errors(config.repo, f"commit {done.oid[:12]} was made, without tag {config.tag}"):
            api.create_tag(config.repo, tag=config.tag, revision=done.oid, repo_type=repo_type)
    print(f"done: {done.pr_url or done.commit_url}, fetched again and compared")


def announce(repo: str, folder: Path) -> dict[str, Path]:
    """Prints which files are about to go to a repository.

    Args:
        repo: its name.
        folder: that holds nothing else.

    Returns:
        Its files, by their paths in the repository.

    Raises:
        UserError: if one is not a regular file, has an invalid name, or contains the login's token.
    """
    contents = {name: read_inside(folder, name) for name in files_below(folder)}
    print(f"{repo}: {len(contents)} files, {sum(map(len, contents.values())):,} bytes")
    for name, content in contents.items():
        print(f"{len(content):14,}  {name}")
    token = get_token()
    for name, content in contents.items():
        if plain(name) != name:
            raise UserError(f"{name} is not a file name for the Hub: rename it; nothing was uploaded")
        if token and token.encode() in content:
            raise UserError(f"{name} contains your Hub token: remove it and renew the token; nothing was uploaded")
    return {name: folder / name for name in contents}


def prepare(api: HfApi, config: RepoConfig, repo_type: str) -> tuple[str | None, str | None]:
    """Creates the repository and the branch if they do not exist.

    Returns:
        The commits of the branch and of the tag; None for one that does not exist yet.

    Raises:
        UserError: if the repository is public and should be private, or the tag is on another commit.
    """
    try:
        private = api.repo_info(config.repo, repo_type=repo_type, timeout=TIMEOUT).private
    except RepositoryNotFoundError:
        private = None
    if private is None:
        api.create_repo(config.repo, repo_type=repo_type, private=config.private or None)
    elif config.private and not private:
        raise UserError(f"{config.repo} is already public: make it private on the Hub, or drop --private")
    refs = api.list_repo_refs(config.repo, repo_type=repo_type)
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    branch = config.revision or constants.DEFAULT_REVISION
    head = branches.get(branch)
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(config.tag or "")
    if tagged is not None and tagged != head:
        raise UserError(f"{config.repo} has a tag {config.tag} on another commit, which stays; give another --tag")
    if head is None and not branch.startswith("refs/"):
        api.create_branch(config.repo, branch=branch, repo_type=repo_type)
    return head or branches.get(constants.DEFAULT_REVISION), tagged


def commit(api: HfApi, config: RepoConfig, repo_type: str, files: dict[str, Path]) -> CommitInfo:
    """Commits files, by their paths in the repository, in one commit; those unchanged are not sent."""

    def create() -> CommitInfo:
        return api.create_commit(
            config.repo,
            [CommitOperationAdd(name, str(path)) for name, path in files.items()],
            commit_message=config.commit_message or "Publish by sssd-zoo",
            repo_type=repo_type,
            revision=config.revision,
            create_pr=config.pull_request,
        )

    try:
        return create()
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError) or config.pull_request:
            raise
        # The connection broke, perhaps after the commit: this sends whatever is still missing.
        return create()


def fetch(repo: str, repo_type: str, commit_id: str, patterns: tuple[str, ...] | list[str], folder: Path) -> None:
    """Downloads files of a commit into an empty folder, past the cache, whose files may be damaged."""
    snapshot_download(repo, repo_type=repo_type, revision=commit_id, allow_patterns=list(patterns), local_dir=folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def copy_card(card: Path, folder: Path) -> None:
    """Copies a folder that `sssd card` wrote, with the bundled weights if it is about those."""
    copy_files(card, CARD_FILES, folder, follow_links=card.parent == cards_folder())
    (folder / "figures" / PICTURES).unlink(missing_ok=True)  # of an earlier version
    if not (folder / "model.safetensors").exists() and (weights := bundled_weights(card.name)) is not None:
        if not weights.is_file():
            raise UserError(f"the weights of {card.name} are missing: reinstall sssd-zoo")
        shutil.copyfile(weights, folder / "model.safetensors")


def include(run: Path, folder: Path, patterns: list[str] | str) -> None:
    """Copies further files of a run that the user named, and prints how many were left out. Hidden files never go.

    A `*` matches no '/'. Files that show the run's images, or name them or its folders, which may be private, go only
    if they are named exactly; what `sssd clusters`, `embed` and `search` wrote is among them.

    Raises:
        UserError: if a pattern matches no such file, or a link.
    """
    recorded = (RUN_MARK, LOCK)
    others = [name for name in files_below(run) if Path(name).name not in recorded and not (folder / name).exists()]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = [name for name in others if fits(name, pattern) and not hidden(name)]
        if not matching:
            raise UserError(f"--include {pattern} matches no further file of {run}; hidden files are never published")
        unnamed = [name for name in matching if name != pattern]
        shown = [name for name in unnamed if Path(name).name in IMAGES_SHOWN or copied_image(run, name)]
        named = [name for name in unnamed if name not in shown and names_images(run, name)]
        for private, why in ((shown, "shows images of the run"), (named, "names images or folders of this machine")):
            if private:
                print(f"{listed(private)}: {why}, so --include {pattern} leaves it out; give its name")
        for name in sorted({*matching} - {*shown, *named}):
            atomic_write_bytes(folder / name, read_inside(run, name))
            others.remove(name)
    if others:
        examples = ", ".join(others[:3])
        rest = ", ..." if len(others) > 3 else ""
        print(f"left out without --include: {len(others)} other files of {run} ({examples}{rest})")


def copied_image(run: Path, name: str) -> bool:
    """Whether a file of a run lies in a folder of `sssd clusters`, which has copies of images and a list of them."""
    return any(kind_of(run / folder) == "clusters" for folder in Path(name).parents[:-1])


def names_images(run: Path, name: str) -> bool:
    """Whether a file of a run names its images or folders of this machine."""
    if any(fits(part, each) for each in NAMES_SHOWN for part in Path(name).parts):
        return True
    path = run / name
    written = {path.with_name(path.name.removesuffix(ending)) for ending in ("", ".json", ".csv")}
    return any(file.is_file() and (is_embeddings(file) or is_found(file)) for file in written)


def verify_network(folder: Path, where: str) -> None:
    """Compares the weights of a folder with the sha256 in its metrics.json.

    Args:
        folder: of a published network.
        where: what to call it in errors.

    Raises:
        UserError: if a file is missing, or the weights differ.
    """
    missing = [name for name in ("config.json", "metrics.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{where} holds no network with a card: {', '.join(missing)} missing")
    recorded = read_json(folder / "metrics.json", Metrics).get("weights", {}).get("sha256")
    if recorded is None:
        raise UserError(f"the metrics.json of {where} has no sha256 of the weights: they cannot be trusted")
    check_sha256(folder / "model.safetensors", recorded, where)


def verify_labels(folder: Path, where: str) -> None:
    """Compares pseudo labels with the sha256 in their pseudo_labels.json.

    Args:
        folder: of published pseudo labels.
        where: what to call it in errors.

    Raises:
        UserError: if a file is missing or differs.
    """
    missing = [name for name in LABEL_FILES if not (folder / name).is_file()]
    recorded = {} if missing else read_json(folder / "pseudo_labels.json", LabelsMeta).get("sha256", {})
    if not recorded:
        raise UserError(f"{where} holds no labels of `sssd publish-labels`: {', '.join(missing) or 'sha256'} missing")
    for name in LABEL_ARRAYS:
        check_sha256(folder / name, recorded.get(name), where)
    PseudoLabels.load(folder)


def check_sha256(path: Path, recorded: str | None, where: str) -> None:
    """Refuses a file whose sha256 differs from the recorded one.

    Raises:
        UserError: that names both.
    """
    if (actual := sha256(path)) != recorded:
        raise UserError(
            f"{path.name} of {where} is damaged: its sha256 is {actual[:12]}..., "
            f"not {str(recorded)[:12]}...; run the command again"
        )


@torch.inference_mode()
def logits_on_noise(folder: Path) -> Tensor:
    """The logits of a folder's network on a fixed random batch, [4, num_classes]; without classes, its features."""
    model: Any = load_network(str(folder)).eval()
    shape = model.pretrained_cfg["input_size"]
    logits: Tensor = model(torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))
    return logits


def labels_card(meta: dict[str, Any], repo: str, license_name: str | None) -> str:
    """The card of a data set of pseudo labels, from its pseudo_labels.json."""
    data = DatasetCardData(
        license=license_name,
        task_categories=["image-classification"],
        tags=["sssd", "pseudo-labels"],
        source_datasets=[plain(meta["data"]).partition(":")[0]] if "/" in meta["data"] else None,
        pretty_name=f"Pseudo labels of {plain(meta['data'])}",
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "labels.parquet"}]}],
    )
    template = (cards_folder() / "labels_card.md.jinja").read_text(encoding="utf-8")
    filters: Any = {"plain": plain, "markdown": markdown, "code": code, "quote": lambda name: shlex.quote(plain(name))}
    return str(DatasetCard.from_template(data, template_str=template, meta=meta, repo=repo, **filters)).rstrip() + "\n"


def check_repo(config: RepoConfig) -> None:
    """Refuses options that cannot be published with.

    Raises:
        UserError: that says which.
    """
    check_name(config.repo)
    if config.pull_request and (config.revision or config.tag):
        raise UserError(
            "--pull_request goes to the branch 'main' and has no tag: drop --revision and --tag, or --pull_request"
        )


def check_name(repo: str) -> None:
    """Refuses an invalid repository name.

    Raises:
        UserError: that says why.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"'{repo}' is not a repository name, ORG/NAME: {error}") from error
    if "/" not in repo:
        raise UserError(f"'{repo}' is not a repository name, ORG/NAME: the owner is missing")


@contextmanager
def hub_errors(repo: str, state: str) -> Iterator[None]:
    """Turns errors of the Hub, the network and the client into one line that says what to do.

    Args:
        repo: the repository.
        state: what an error leaves behind, in words.

    Raises:
        UserError: for any of them; disk errors pass through.
    """
    try:
        with limited_waiting():
            yield
    except UserError:
        raise
    except Exception as error:  # the Hub's responses can have any shape, and the client raises accordingly
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{repo}: {reason(error)}; {state}") from error


def reason(error: BaseException) -> str:
    """What went wrong and what to do, from an error or its cause."""
    chain = list(causes(error))
    for each in chain:
        if isinstance(each, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it, or use a folder that was pulled before"
        if isinstance(each, SilentHubError):
            return f"{each}, at {constants.ENDPOINT}: check the network and run the command again"
        if isinstance(each, HfHubHTTPError):
            todo = {
                401: "the Hub does not know this token or repository: run `hf auth login`, or set HF_TOKEN",
                403: "your token lacks write access: use one that has it",
                404: "there is no such repository, revision or file, or your token has no access to it",
                409: "it exists already",
                412: "another commit came first: run the command again",
                429: "too many requests: run the command again later",
            }
            status = each.response.status_code
            return f"{todo.get(status, 'the Hub failed: run the command again later')} (status {status})"
        if isinstance(each, HTTPError):
            kind = type(each).__name__
            return (
                f"the Hub cannot be reached at {constants.ENDPOINT} ({kind}): check the network and run the command "
                "again"
            )
    return f"the Hub's client failed ({' '.join(str(error).split())[:200]}): run the command again"
