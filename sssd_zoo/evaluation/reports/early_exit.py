"""The report of `sssd early-exit`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from sssd_zoo.configs import EarlyExitArgs
from sssd_zoo.data.sources import short_name
from sssd_zoo.errors.text import code, markdown
from sssd_zoo.evaluation.calibration import BINS
from sssd_zoo.evaluation.reports.markdown import table

ANSWERS = ("1", "2", "3", "4", "ensemble", "early exit")
BATCHES = ("1", "128")  # batch sizes that were timed


def command_line(args: EarlyExitArgs) -> str:
    """The command with these arguments, without those at their defaults; paths without the folders above them."""
    words = [f"sssd early-exit {Path(args.model).name if Path(args.model).exists() else args.model}"]
    words += [f"--data {short_name(args.data)}", "--out OUT"]
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name not in ("model", "data", "out", "overwrite") and value != field.default:
            words.append(f"--{field.name} {value}")
    return " ".join(words)


def report(results: dict[str, Any]) -> str:
    """report.md, from what report.json holds."""
    lines = [
        "# Early exit",
        "",
        *(f"- {fact}" for fact in _facts(results)),
        "",
        "![Accuracy against MACs and against time](figure.png)",
        "",
        *_answers(results),
        "",
        "An image that no exit is sure of is answered by the ensemble of the exits that were asked. Time is for one "
        "image, as a fraction of the whole network's; exits 1 to 4 are networks of their own (`output=1`...). ECE is "
        f"the expected calibration error over {BINS} bins of confidence, before and after the temperatures; the "
        f"ensemble's accuracy was {results['ensemble_accuracy_before']:.2f} before.",
    ]
    return "\n".join(lines) + "\n"


def _facts(results: dict[str, Any]) -> list[str]:
    """What was calibrated and what came of it, each a line of Markdown."""
    answers, speedup = results["answers"], results["speedup"]
    temperatures = ", ".join(f"{value:.3f}" for value in results["temperatures"])
    thresholds = ", ".join(f"{value:.4f}" for value in results["thresholds"])
    fractions = ", ".join(f"{fraction:.1%}" for fraction in results["exits_taken"])
    lost = max(answers["4"]["accuracy"], answers["ensemble"]["accuracy"]) - answers["early exit"]["accuracy"]
    return [
        f"**Network**: {code(results['model'])}",
        f"**Calibrated on**: {markdown(results['data'])}, {markdown(results['calibrated_on'])}",
        f"**Measured on**: {markdown(results['measured_on'])}, on which nothing was calibrated",
        f"**Budget**: {_budget(results['budget'])}, on the calibrating images",
        f"**Temperatures** of the exits, folded into the classifiers: {temperatures}",
        f"**Thresholds** of exits 1 to 3: {thresholds}; images that left at exits 1 to 4: {fractions}",
        f"**Accuracy lost** on the measured images against the more accurate of exit 4 and the ensemble: "
        f"{lost:.2f} points",
        *(
            f"**Throughput at batch size {batch}**: {speedup[batch]['ensemble']:.2f} times that of the whole network "
            f"(all exits, the ensemble), {speedup[batch]['4']:.2f} times that of the plain trunk (exit 4 alone)"
            for batch in BATCHES
        ),
        f"**Machine**: {markdown(results['machine'])}; medians of {results['runs']} runs, all networks in turn in one "
        "process",
        f"**Command**: {code(results['command'])}",
    ]


def _budget(budget: dict[str, float]) -> str:
    ((name, value),) = budget.items()
    return {
        "points_lost": f"at most {value} points lost, with 95 percent confidence",
        "multiply_adds": f"at most {value} million MACs per image",
        "latency": f"at most {value} ms per image, one at a time",
    }[name]


def _answers(results: dict[str, Any]) -> list[str]:
    """The table of every exit, the ensemble and early exit, as lines of Markdown."""
    whole = results["answers"]["ensemble"]["milliseconds"]
    rows = []
    for name in ANSWERS:
        answer, error = results["answers"][name], results["calibration_error"].get(name)
        rows.append(
            [
                f"exit {name}" if name.isdigit() else name,
                f"{answer['accuracy']:.2f}",
                f"{answer['multiply_adds'] / 1e6:.1f}",
                *(f"{answer['milliseconds'][batch] / whole[batch]:.2f}" for batch in BATCHES),
                *(f"{100 * error[when]:.2f}" if error else "" for when in ("before", "after")),
            ]
        )
    head = ["answer of", "accuracy (%)", "MACs (million)", *(f"time at batch size {batch}" for batch in BATCHES)]
    return table([*head, "ECE before (%)", "ECE after (%)"], rows)
