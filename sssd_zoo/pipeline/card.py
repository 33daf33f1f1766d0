"""`sssd card`: a trained network with its card, metrics, logs and recipe in one folder."""

from pathlib import Path

from sssd_zoo.configs import CardArgs
from sssd_zoo.data.inputs import pixels_of
from sssd_zoo.files import (
    atomic_write_bytes,
    read_json,
)
from sssd_zoo.files.run_folder import atomic_dir, open_out
from sssd_zoo.hub.cards import (
    CardOptions,
    check_calibrated,
    check_weights_file,
    copy_sources,
    sample_accuracy,
    write_card,
)
from sssd_zoo.models.backbones import architecture_in
from sssd_zoo.models.networks import load_network


def card(args: CardArgs) -> None:
    """`sssd card`."""
    run, out = Path(args.run), open_out(args, "card")
    if args.weights is not None:
        check_weights_file(Path(args.weights), out, overwrite=args.overwrite)
    calibrated = check_calibrated(run, args.calibrated)
    with copy_sources(run, calibrated) as (copy, calibrated):
        network = load_network(str(calibrated or copy / "model")).eval()
        # The bundled weights are rounded: what follows is measured on those.
        # The bundled images are RGB of 8 bits, which says nothing of networks for others.
        sample = sample_accuracy(network.half().float()) if pixels_of(network) is None else None
        options = CardOptions(args.license, name=args.name, paper=args.paper, remarks=args.remarks)
        with atomic_dir(out, "card") as folder:
            weights = write_card(copy, folder, options, out=out, calibrated=calibrated, sample=sample)
            if args.weights is None:
                atomic_write_bytes(folder / "model.safetensors", weights)
    if args.weights is not None:
        atomic_write_bytes(args.weights, weights, follow_link=True)
    model = architecture_in(read_json(out / "config.json"))
    print(f"{out}: card of {args.name or model}; weights {len(weights) / 1e6:.1f} MB in half precision")
