"""`sssd space`: a page to try a network on."""

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

from sssd_zoo.configs import SpaceArgs
from sssd_zoo.errors import UserError
from sssd_zoo.hub.page import serve
from sssd_zoo.hub.space import assemble, check_push, push


def space(args: SpaceArgs) -> None:
    """`sssd space`."""
    if args.push is None and (args.dry_run or args.private):
        option = "--dry_run" if args.dry_run else "--private"
        raise UserError(f"{option} is of what --push publishes, which is not given: give --push ORG/NAME, too")
    if args.push is not None:
        check_push(args.push, dry_run=args.dry_run)
    elif importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio, which is not installed: pip install gradio")
    with TemporaryDirectory(prefix="sssd-space-") as scratch:
        folder = Path(scratch)
        run_images = args.push is None if args.run_images is None else args.run_images
        for note in assemble(args.run, folder, run_images=run_images):
            print(note)
        if args.run_images is None and args.push is not None and (Path(args.run) / "model/config.json").is_file():
            print("the run's images stay here; --run_images true publishes thumbnails of them, too")
        if args.push is None:
            serve(folder, args.port)
        else:
            push(folder, args.push, private=args.private, dry_run=args.dry_run)
