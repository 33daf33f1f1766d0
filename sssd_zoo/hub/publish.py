"""To the Hub and back: `sssd publish`, `sssd publish-labels` and `sssd pull`.

What goes up is copied to a folder of its own by a list of what may go, so a run's other files (checkpoints, a .env) and
what links lead to cannot slip in. It goes from there, in one commit, whole or not at all, and is then fetched from the
Hub and compared. huggingface_hub checks only the size of a download: what comes down is compared with the sha256 in the
repository's metrics.json or pseudo_labels.json. Tokens are huggingface_hub's business: its login or HF_TOKEN.
"""

import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
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

from sssd_zoo.configs import RepoConfig
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code, markdown, plain
from sssd_zoo.files import (
    RUN_MARK,
    atomic_write_bytes,
    read_json,
    sha256,
)
from sssd_zoo.files.hub_client import SilentHubError, limited_waiting
from sssd_zoo.files.lock import LOCK
from sssd_zoo.files.untrusted import copy_files, files_below, hidden, read_inside
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models.networks import hub_cards, load_network

NETWORK_FILES = (
    *("README.md", "config.json", "metrics.json", "recipe.yaml", "pretrain.jsonl", "distill.jsonl"),
    *("model.safetensors", "figures/*.png", ".eval_results/*.yaml"),
    *("early_exit/report.md", "early_exit/report.json", "early_exit/figure.png"),
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
    files = announce(config.repo, folder)
    if config.dry_run:
        print("dry run: nothing was uploaded")
        return
    if not get_token():
        raise UserError("publishing needs a login of the Hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with hub_errors(config.repo, "nothing was committed"):
        head, tagged = prepare(api, config, repo_type)
        done = commit(api, config, repo_type, files)
    if done.oid == head:
        print(f"{config.repo}: unchanged, nothing was uploaded")
    where = f"{config.repo} at commit {done.oid[:12]}"
    with TemporaryDirectory() as back:
        with hub_errors(config.repo, f"commit {done.oid[:12]} is there, but was not compared"):
            fetch(config.repo, repo_type, done.oid, list(files), Path(back))
        compare(Path(back), where)
    if config.tag is not None and tagged != done.oid:
        if tagged is not None:
            raise UserError(f"{where} is published, but tag {config.tag} is of an older commit; give another --tag")
        with hub_errors(config.repo, f"commit {done.oid[:12]} is there, without tag {config.tag}"):
            api.create_tag(config.repo, tag=config.tag, revision=done.oid, repo_type=repo_type)
    print(f"done: {done.pr_url or done.commit_url}, fetched again and compared")


def announce(repo: str, folder: Path) -> dict[str, Path]:
    """Lists what is about to go to a repository.

    Args:
        repo: in words.
        folder: that holds nothing else.

    Returns:
        Its files, by their paths in the repository.

    Raises:
        UserError: if one is no regular file, has no name for a repository, or holds the login's token.
    """
    contents = {name: read_inside(folder, name) for name in files_below(folder)}
    print(f"{repo}: {len(contents)} files, {sum(map(len, contents.values())):,} bytes")
    for name, content in contents.items():
        print(f"{len(content):14,}  {name}")
    token = get_token()
    for name, content in contents.items():
        if plain(name) != name:
            raise UserError(f"{name} is no file's name for the Hub: rename it; nothing was uploaded")
        if token and token.encode() in content:
            raise UserError(f"{name} holds your Hub token: remove it there, and renew the token; nothing was uploaded")
    return {name: folder / name for name in contents}


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
    copy_files(card, NETWORK_FILES, folder, follow_links=card.parent == hub_cards())
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
    """Copies other files of a run that the user named, and says how many were left out. Hidden ones never go.

    Raises:
        UserError: if a pattern fits none, or a link.
    """
    wanted = [patterns] if isinstance(patterns, str) else patterns
    ours = (RUN_MARK, LOCK)
    others = [name for name in files_below(run) if Path(name).name not in ours and not (folder / name).exists()]
    for pattern in wanted:
        named = [name for name in others if fnmatchcase(name, pattern) and not hidden(name)]
        if not named:
            raise UserError(
                f"--include {pattern} fits no file of {run} that would not go anyway; hidden files are never published"
            )
        for name in named:
            atomic_write_bytes(folder / name, read_inside(run, name))
            others.remove(name)
    if others:
        some = ", ".join(others[:3])
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
        source_datasets=[plain(meta["data"])] if "/" in meta["data"] else None,
        pretty_name=f"Pseudo labels of {plain(meta['data'])}",
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "labels.parquet"}]}],
    )
    template = (hub_cards() / "labels_card.md.jinja").read_text(encoding="utf-8")
    words: Any = {"plain": plain, "markdown": markdown, "code": code, "quote": lambda name: shlex.quote(plain(name))}
    return str(DatasetCard.from_template(data, template_str=template, meta=meta, repo=repo, **words)).rstrip() + "\n"


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
        with limited_waiting():
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
        if isinstance(own, SilentHubError):
            return f"{own}, at {constants.ENDPOINT}: check the network, run the command again later"
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
