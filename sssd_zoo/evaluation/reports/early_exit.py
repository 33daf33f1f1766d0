"""The report of `sssd early-exit`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from sssd_zoo.configs import EarlyExitArgs
from sssd_zoo.data.sources import short_name
from sssd_zoo.errors.text import code, markdown
from sssd_zoo.evaluation.calibration import BINS
from sssd_zoo.models import StageCosts


def answer_cost(name: str, costs: StageCosts) -> float:
    """The cost of the answer of an exit '1' to '4' alone, or of the 'ensemble'."""
    if name == "ensemble":
        return sum(costs.stages) + sum(costs.heads)
    number = int(name)
    return sum(costs.stages[:number]) + costs.heads[number - 1]


def command(args: EarlyExitArgs) -> str:
    """The command line of these arguments, without those at their defaults; paths without the folders above them."""
    words_ = [f"sssd early-exit {Path(args.model).name if Path(args.model).exists() else args.model}"]
    words_ += [f"--data {short_name(args.data)}", "--out OUT"]
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name not in ("model", "data", "out", "overwrite") and value != field.default:
            words_.append(f"--{field.name} {value}")
    return " ".join(words_)


def words(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    table, errors, speedup = results["answers"], results["calibration_error"], results["speedup"]
    ((budget, value),) = results["budget"].items()
    asked = {
        "points_lost": f"at most {value} points lost, with 95 percent confidence",
        "multiply_adds": f"at most {value} million multiply-adds an image",
        "latency": f"at most {value} ms an image, one by one",
    }[budget]
    best = max(table["4"]["accuracy"], table["ensemble"]["accuracy"])
    shares = ", ".join(f"{share:.1%}" for share in results["exits_taken"])
    cells = []
    for name in ("1", "2", "3", "4", "ensemble", "early exit"):
        row = table[name]
        error = [f"{100 * errors[name][when]:.2f}" for when in ("before", "after")] if name in errors else ["", ""]
        cells.append(
            [
                f"exit {name}" if name.isdigit() else name,
                f"{row['accuracy']:.2f}",
                f"{row['multiply_adds'] / 1e6:.1f}",
                *(
                    f"{row['milliseconds'][batch] / table['ensemble']['milliseconds'][batch]:.2f}"
                    for batch in ("1", "128")
                ),
                *error,
            ]
        )
    head = ["answer of", "accuracy (%)", "multiply-adds (million)", "time at batch 1", "time at batch 128"]
    head += ["ECE before (%)", "ECE after (%)"]
    lines = [
        "# Early exit",
        "",
        f"- **Network**: {code(results['model'])}",
        f"- **Calibrated on**: {markdown(results['data'])}, {markdown(results['calibrated_on'])}",
        f"- **Measured on**: {markdown(results['measured_on'])}, on which nothing was calibrated",
        f"- **Budget**: {asked}, on the calibrating images",
        f"- **Temperatures** of the exits, folded into the classifiers: "
        f"{', '.join(f'{value:.3f}' for value in results['temperatures'])}",
        f"- **Thresholds** of the exits 1 to 3: {', '.join(f'{value:.4f}' for value in results['thresholds'])}; images "
        f"that left at exits 1 to 4: {shares}",
        f"- **Accuracy lost** on the measured images against the more accurate of exit 4 and the ensemble: "
        f"{best - table['early exit']['accuracy']:.2f} points",
        *(
            f"- **Throughput at batch {batch}**: {speedup[batch]['ensemble']:.2f} times that of the whole network (all "
            f"exits, the ensemble), {speedup[batch]['4']:.2f} times that of the plain trunk (exit 4 alone)"
            for batch in ("1", "128")
        ),
        f"- **Machine**: {markdown(results['machine'])}; medians of {results['runs']} runs, all networks in turn in "
        "one process",
        f"- **Command**: {code(results['command'])}",
        "",
        "![Accuracy against multiply-adds and against time](figure.png)",
        "",
        *table(head, cells),
        "",
        "An image that no exit is sure of is answered by the ensemble of the exits that it was asked at. Time is for "
        "one image, as a share of the whole network's; exits 1 to 4 are networks of their own (`output=1`...). "
        f"ECE is the expected calibration error over {BINS} bins of confidence, before and after the temperatures; the "
        f"ensemble's accuracy was {results['ensemble_accuracy_before']:.2f} before.",
    ]
    return "\n".join(lines) + "\n"
