"""`sssd card`: a trained network with its card, metrics, logs and recipe in one folder."""

from pathlib import Path

from sssd_zoo.configs import CardArgs
from sssd_zoo.files import (
    atomic_write_bytes,
    read_json,
)
from sssd_zoo.files.run_folder import atomic_dir, check_replaceable, open_out
from sssd_zoo.hub.cards import check, check_calibrated, is_safetensors, own_copy, write_card
from sssd_zoo.models.networks import load_network


def card(args: CardArgs) -> None:
    """`sssd card`."""
    run, out = Path(args.run), open_out(args, "card")
    calibrated = check_calibrated(run, args.calibrated)
    if args.weights is not None:
        check_replaceable(Path(args.weights), args.overwrite, "a safetensors file", is_safetensors)
    with own_copy(run, calibrated) as (copy, calibrated):
        network = load_network(str(calibrated or copy / "model")).eval()
        # The bundled weights are rounded: what follows is measured on those.
        checked = check(network.half().float())
        with atomic_dir(out, "card") as folder:
            weights = write_card(
                copy,
                folder,
                calibrated=calibrated,
                name=args.name,
                paper=args.paper,
                license_name=args.license,
                checked=checked,
                out=out,
                remarks=args.remarks,
            )
            if args.weights is None:
                atomic_write_bytes(folder / "model.safetensors", weights)
    if args.weights is not None:
        atomic_write_bytes(args.weights, weights)
    model = read_json(out / "config.json")["architecture"]
    print(f"{out}: card of {args.name or model}; weights {len(weights) / 1e6:.1f} MB in half precision")
