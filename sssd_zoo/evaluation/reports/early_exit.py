"""The report of `sssd early-exit`."""

import shlex
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


def network_source(name: str) -> str:
    """What to call where a network came from: a name as it is, a folder without those above its run.

    A folder need not exist any more: names of networks have no separator, but for those of the Hub with their prefix.
    """
    if name.startswith(("hf-hub:", "hf_hub:")):
        return name
    path = Path(name.removeprefix("local-dir:"))
    if path.exists():
        path = path.resolve()
    # Of a person's folder the name is that of the person.
    run = path.parent.name if path.parent.parent.name not in ("home", "Users") and path.parent != Path.home() else ""
    return f"{run}/model" if path.name == "model" and run else path.name


def command_line(args: EarlyExitArgs) -> str:
    """The command with these arguments, without those at their defaults; paths without the folders above them."""
    words = ["sssd", "early-exit", network_source(args.model), "--data", short_name(args.data), "--out", "OUT"]
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name not in ("model", "data", "out", "overwrite") and value != field.default:
            words += [f"--{field.name}", str(value)]
    return shlex.join(words)


def report(results: dict[str, Any]) -> str:
    """report.md, from what report.json holds."""
    lines = [
        "# Early exit",
        "",
        *(f"- {fact}" for fact in _facts(results)),
        "",
        f"![{'Accuracy' if results['labelled'] else 'Agreement'} against MACs and against time](figure.png)",
        "",
        *_answers(results),
        "",
        "If no exit's confidence exceeds its threshold, the prediction is the ensemble of the exits that were "
        "evaluated. Agreement is with the ensemble of all exits. Time is for one image, as a fraction of the whole "
        "network's; exits 1 to 4 are networks of their own (`output=1`...)."
        + (
            f" ECE is the expected calibration error over {BINS} bins of confidence, before and after the "
            f"temperatures; the ensemble's accuracy was {results['ensemble_accuracy_before']:.2f} before."
            if results["labelled"]
            else ""
        ),
    ]
    return "\n".join(lines) + "\n"


def _facts(results: dict[str, Any]) -> list[str]:
    """What was calibrated and what came of it, each a line of Markdown."""
    speedup = results["speedup"]
    thresholds = ", ".join(f"{value:.4f}" for value in results["thresholds"])
    fractions = ", ".join(f"{fraction:.1%}" for fraction in results["exits_taken"])
    source = "" if results["source"] == results["model"] else f", from {code(results['source'])}"
    return [
        f"**Network**: {code(results['model'])}{source}",
        f"**Calibrated on**: {markdown(results['data'])}, {markdown(results['calibrated_on'])}",
        *_measured(results),
        f"**Budget**: {_budget(results['budget'])}",
        _temperatures(results),
        f"**Thresholds** of exits 1 to 3: {thresholds}; images that left at exits 1 to 4: {fractions}",
        *_lost(results),
        *(
            f"**Throughput at batch size {batch}**: {speedup[batch]['ensemble']:.2f} times that of the whole network "
            f"(all exits, the ensemble), {speedup[batch]['4']:.2f} times that of the plain trunk (exit 4 alone)"
            for batch in BATCHES
        ),
        f"**Machine**: {markdown(results['machine'])}; medians of {results['runs']} runs, all networks in turn in one "
        "process. Each throughput is the median of the runs' ratios; on a busy machine this is not quite the ratio of "
        "the medians in the table",
        f"**Command**: {code(results['command'])}",
    ]


def _measured(results: dict[str, Any]) -> list[str]:
    """What the results were measured on, and what that means for other images."""
    use = "which decided only which temperatures stay" if results["labelled"] else "on which nothing was calibrated"
    facts = [f"**Measured on**: {markdown(results['measured_on'])}, {use}"]
    if not results["labelled"] and not results["held_out"]:
        facts.append(
            "**Training images**: if the network was trained on these images, it changes more answers on new ones"
        )
    return facts


def _temperatures(results: dict[str, Any]) -> str:
    """Which temperatures were fitted, and which of them stay."""
    if not results["labelled"]:
        return "**Temperatures**: none, as they need labels"
    fitted = ", ".join(f"{value:.3f}" for value in results["temperatures_fitted"])
    kept = [number for number, value in enumerate(results["temperatures"], start=1) if value != 1]
    stay = f"of exits {', '.join(map(str, kept))}" if kept else "none"
    return (
        f"**Temperatures** fitted to exits 1 to 4: {fitted}. Folded into the classifiers: {stay}. One stays where it "
        "lowers the calibration error (ECE) of its exit on the measured images and does not raise the ensemble's; "
        "elsewhere it is 1"
    )


def _lost(results: dict[str, Any]) -> list[str]:
    """What early exit lost on the measured images."""
    answers, facts = results["answers"], []
    if results["labelled"]:
        exit4, ensemble, early = (answers[name]["accuracy"] for name in ("4", "ensemble", "early exit"))
        facts.append(f"**Accuracy lost** on the measured images, against the ensemble: {ensemble - early:.2f} points")
        if exit4 > ensemble:
            facts.append(
                "**Exit 4 alone** is more accurate than the ensemble on the measured images, by "
                f"{exit4 - ensemble:.2f} points"
            )
    changed = 100 - answers["early exit"]["agreement"]
    facts.append(f"**Answers changed** on the measured images, against the ensemble: {changed:.2f} percent")
    return facts


def _budget(budget: dict[str, float]) -> str:
    ((name, value),) = budget.items()
    return {
        "points_lost": f"at most {value} points lost, with 95 percent confidence on other images",
        "answers_changed": f"at most {value} percent of the ensemble's answers changed, with 95 percent confidence on "
        "other images",
        "multiply_adds": f"at most {value} million MACs per image, on the calibrating images",
        "latency": f"at most {value} ms per image, one at a time, on the calibrating images",
    }[name]


def _answers(results: dict[str, Any]) -> list[str]:
    """The table of every exit, the ensemble and early exit, as lines of Markdown."""
    whole = results["answers"]["ensemble"]["milliseconds"]
    rows = []
    for name in ANSWERS:
        answer, error = results["answers"][name], results.get("calibration_error", {}).get(name)
        rows.append(
            [
                f"exit {name}" if name.isdigit() else name,
                *([f"{answer['accuracy']:.2f}"] if results["labelled"] else []),
                f"{answer['agreement']:.2f}",
                f"{answer['multiply_adds'] / 1e6:.1f}",
                *(f"{answer['milliseconds'][batch] / whole[batch]:.2f}" for batch in BATCHES),
                *(f"{100 * error[when]:.2f}" if error else "" for when in ("before", "after") if results["labelled"]),
            ]
        )
    head = ["answer of", "accuracy (%)", "agreement (%)", "MACs (million)"]
    head += [f"time at batch size {batch}" for batch in BATCHES]
    if not results["labelled"]:
        return table([name for name in head if name != "accuracy (%)"], rows)
    return table([*head, "ECE before (%)", "ECE after (%)"], rows)
