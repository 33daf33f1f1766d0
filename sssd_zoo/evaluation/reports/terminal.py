"""The results of a run in a terminal, and what to do next."""

import shlex
from pathlib import Path

from sssd_zoo.evaluation.reports.markdown import Results, exact_duration


def describe_results(results: Results) -> str:
    """The accuracies in a few lines for the terminal; without labels, what the clusters are."""
    if not results.get("accuracy"):
        sizes = results["sizes"]
        return f"{len(sizes)} clusters of {min(sizes)} to {max(sizes)} images; no labels, so no accuracy was measured"
    names = ["exit 1", "exit 2", "exit 3", "exit 4", "ensemble"]
    width = max(len(row["name"]) for row in results["accuracy"])
    lines = [f"linear-probe accuracy in percent, {results['test']}:", f"{'':{width}}  " + "  ".join(names)]
    for row in results["accuracy"]:
        values = [*row["exits"], row["ensemble"]]
        cells = "  ".join(f"{value:{len(name)}.2f}" for name, value in zip(names, values, strict=True))
        lines.append(f"{row['name']:{width}}  {cells}")
    return "\n".join(lines)


def describe_costs(results: Results) -> str:
    """The MACs of every exit, and the time of every stage: two tables."""
    rows = []
    if macs := results.get("macs"):
        rows += [("answer of", "MACs per image")]
        rows += [
            (name if name == "ensemble" else f"exit {name}", f"{cost / 1e6:,.1f} M") for name, cost in macs.items()
        ]
    if times := results.get("times"):
        rows += [("", ""), ("stage", "time")] if rows else [("stage", "time")]
        rows += [(entry["step"], exact_duration(entry["seconds"])) for entry in times]
    width, number = (max((len(row[place]) for row in rows), default=0) for place in (0, 1))
    return "\n".join(f"{name:{width}}  {value:>{number}}".rstrip() for name, value in rows)


def is_image_folder(path: Path) -> bool:
    """Whether a path is a folder of image files, which `sssd predict` reads, rather than of tables with images."""
    return path.is_dir() and not any(file.suffix in (".parquet", ".arrow", ".tar") for file in path.iterdir())


def next_commands(results: Results, run: Path, data: str | list[str]) -> list[str]:
    """Commands to go on with: those of the verdict, else one that uses the network."""
    if commands := results.get("verdict", {}).get("next"):
        return list(commands)
    network = shlex.quote(str(run / "model"))
    sources = [data] if isinstance(data, str) else data
    if all(is_image_folder(Path(source)) for source in sources):
        return [f"sssd predict {network} {shlex.join(sources)}"]
    return [f"sssd space {shlex.quote(str(run))}"]


def summary(results: Results, run: Path, data: str | list[str]) -> str:
    """What a finished run prints: results, costs, the verdict if there is one, and the next commands.

    Args:
        results: of the run.
        run: its folder.
        data: name of its data, as the user gave it.
    """
    parts = [describe_results(results), describe_costs(results)]
    if verdict := results.get("verdict"):
        parts.append(f"Verdict: {verdict['level']}. {verdict['sentence']}")
    parts.append("\n".join(["Next:", *(f"  {command}" for command in next_commands(results, run, data))]))
    return "\n\n".join(parts)
