"""`sssd pull`: a published network or labels in a folder."""

from huggingface_hub import (
    HfApi,
)

from sssd_zoo.configs import PullArgs
from sssd_zoo.files.run_folder import atomic_dir, open_out
from sssd_zoo.hub.publish import (
    LABEL_FILES,
    NETWORK_FILES,
    TIMEOUT,
    check_name,
    copy_card,
    fetch,
    hub_errors,
    shipped_name,
    verify_labels,
    verify_network,
)
from sssd_zoo.models.networks import hub_cards


def pull(args: PullArgs) -> None:
    """`sssd pull`."""
    kind = "pulled-labels" if args.labels else "card"
    out = open_out(args, kind)
    with atomic_dir(out, kind) as folder:
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
