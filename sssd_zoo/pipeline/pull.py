"""`sssd pull`: a published network or labels in a folder."""

from huggingface_hub import (
    HfApi,
)

from sssd_zoo.configs import PullArgs
from sssd_zoo.errors import UserError
from sssd_zoo.files.bundled import cards_folder
from sssd_zoo.files.run_folder import atomic_dir, open_out
from sssd_zoo.hub.publish import (
    CARD_FILES,
    LABEL_FILES,
    TIMEOUT,
    check_name,
    copy_card,
    fetch,
    hub_errors,
    verify_labels,
    verify_network,
)
from sssd_zoo.models.bundled import bundled_name
from sssd_zoo.models.networks import with_current_prefix


def pull(args: PullArgs) -> None:
    """`sssd pull`."""
    name = with_current_prefix(args.name).removeprefix("hf-hub:")
    if args.labels and "/" not in name:
        raise UserError(f"--labels pulls ORG/NAME from the Hub, not '{name}': give ORG/NAME, or remove --labels")
    if args.revision is not None and "/" not in name:
        raise UserError(f"--revision is of a repository on the Hub, and '{name}' is bundled: remove it")
    kind = "pulled-labels" if args.labels else "card"
    out = open_out(args, kind)
    with atomic_dir(out, kind) as folder:
        if "/" not in name:
            copy_card(cards_folder() / bundled_name(name), folder)
            verify_network(folder, name)
        else:
            check_name(name)
            kind, patterns = ("dataset", LABEL_FILES) if args.labels else ("model", CARD_FILES)
            with hub_errors(name, "nothing was written"):
                # Without a network the client retries downloads for half a minute; this request fails at once.
                info = HfApi().repo_info(name, repo_type=kind, revision=args.revision, timeout=TIMEOUT)
                fetch(name, kind, str(info.sha), patterns, folder)
            (verify_labels if args.labels else verify_network)(folder, name)
    what = "pseudo labels" if args.labels else f"for timm.create_model('local-dir:{out}', pretrained=True)"
    print(f"{out}: {name}, sha256 as on its card; {what}")
