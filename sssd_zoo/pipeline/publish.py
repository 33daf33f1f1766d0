"""`sssd publish`: a trained network on the Hub."""

from pathlib import Path
from tempfile import TemporaryDirectory

from sssd_zoo.configs import PublishArgs
from sssd_zoo.errors import UserError
from sssd_zoo.files import (
    atomic_write_bytes,
    disk_errors,
    sha256,
)
from sssd_zoo.hub.cards import CardOptions, check_calibrated, copy_sources, write_card
from sssd_zoo.hub.publish import check_repo, copy_card, include, logits_on_noise, send, verify_network


def publish(args: PublishArgs) -> None:
    """`sssd publish`."""
    check_repo(args)
    run = Path(args.run)
    if not run.is_dir():
        raise UserError(f"there is no folder {run}; give a run folder of `sssd fit` or a folder that `sssd card` wrote")
    with TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        folder = Path(scratch)
        is_card = (run / "README.md").is_file() and (run / "config.json").is_file()
        if is_card and not (run / "model" / "config.json").is_file():  # a run's own config.json is a link to that
            if args.calibrated is not None:
                raise UserError(f"{run} was written by `sssd card`: give --calibrated to that command")
            if args.license is not None:
                raise UserError(
                    f"{run} has a card, which states its licence: give --license to `sssd card`, or change `license` "
                    f"at the top of {run / 'README.md'}"
                )
            copy_card(run, folder)
        else:
            with copy_sources(run, check_calibrated(run, args.calibrated)) as (copy, calibrated):
                options = CardOptions(args.license, repo=args.repo)
                weights = write_card(copy, folder, options, out=scratch, calibrated=calibrated)
            atomic_write_bytes(folder / "model.safetensors", weights)
        include(run, folder, args.include)
        verify_network(folder, str(run))

        def compare(fetched: Path, where: str) -> None:
            verify_network(fetched, where)
            if sha256(fetched / "model.safetensors") != sha256(folder / "model.safetensors"):
                raise UserError(f"the weights of {where} differ from those that were sent: publish them again")
            difference = float((logits_on_noise(fetched) - logits_on_noise(folder)).abs().max())
            if not difference <= 1e-5:
                raise UserError(
                    f"the network of {where} gives other logits than the one that was sent, by {difference:.2g}"
                )

        send(args, folder, "model", compare)
