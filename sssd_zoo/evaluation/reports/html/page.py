"""Renders report.html: the results of a run, its curves, and what `gallery` chose of its images."""

import base64
import hashlib
import html
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sssd_zoo.errors.text import plain, plural
from sssd_zoo.evaluation.meanings import AGREEMENT, MEANINGS
from sssd_zoo.evaluation.reports.html.curves import Chart, Series, chart, stage_charts
from sssd_zoo.evaluation.reports.markdown import Results, exact_duration
from sssd_zoo.evaluation.verdict import TRUST
from sssd_zoo.files import atomic_write_text
from sssd_zoo.models.cost import ANSWERS

HERE = Path(__file__).parent

# Titles of a run's trainings, by the folders that hold their metrics.jsonl.
TRAININGS = {
    "pretrain": "Pretraining by MoCo v2: features without labels",
    "distill": "Self distillation: four exits learn the clusters",
    "baseline": "The same on random labels, to compare with",
}


def write_page(
    path: Path, run: str, results: Results, metrics: Mapping[str, Sequence[Mapping[str, Any]]], images: dict[str, Any]
) -> None:
    """Writes the page of a run.

    Args:
        path: file to write.
        run: what the user calls the run's folder, for commands to paste.
        results: of its metrics.json.
        metrics: the lines of each training's metrics.jsonl, by the keys of `TRAININGS`.
        images: see `gallery.gallery`.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    facts: Mapping[str, Any] = results
    name = shlex.quote(plain(run, longest=4096))
    text = environment.get_template("page.html.jinja").render(
        title=plain(Path(results["data"]).name or results["data"]),
        results=facts,
        summary=summary(results),
        verdict=facts.get("verdict"),
        trust=TRUST,
        label_free=label_free(facts.get("label_free") or {}),
        accuracy=accuracy_table(results),
        costs=cost_table(results),
        cost_chart=cost_chart(results),
        trainings=[(TRAININGS[key], stage_charts(lines)) for key, lines in metrics.items() if lines],
        facts=run_facts(results),
        times=[(entry["step"], exact_duration(entry["seconds"])) for entry in results.get("times", [])],
        commands=[f"sssd rename {name} NAMES.csv", f"sssd predict {name} IMAGES"],
        nameable=images["nameable"],
        shown=len(images["images"]["row"]),
        total=images["total"],
        images=images,
        script=Markup(script),
        style=Markup(style),
        hashes={"script": _digest(script), "style": _digest(style)},
    )
    atomic_write_text(path, text)


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def summary(results: Results) -> str:
    """The result in a sentence or two, whatever was measured."""
    sizes = results.get("sizes") or []
    clusters = f"{len(sizes):,} clusters of {min(sizes):,} to {max(sizes):,} images" if sizes else ""
    rows = results.get("accuracy")
    if not rows:
        return f"{clusters}. There are no labels, so no accuracy was measured." if clusters else ""
    best = max([*rows[0]["exits"], rows[0]["ensemble"]])
    found = f"Linear probes reach {best:.2f}% accuracy on {plain(results.get('test', 'held-out images'))}"
    if len(rows) > 1:
        found += f"; after training on random labels they reach {max([*rows[1]['exits'], rows[1]['ensemble']]):.2f}%"
    return f"{found}. {clusters}." if clusters else f"{found}."


def label_free(measured: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """The figures without labels of the network's last exit, and how far the exits agree: name, value, what it says."""
    rows = []
    for key, meaning in {**MEANINGS, **AGREEMENT}.items():
        if key in measured:
            words = f"{meaning.words}; {meaning.better}"
            rows.append((meaning.title[0].upper() + meaning.title[1:], f"{measured[key]:.{meaning.digits}f}", words))
    return rows


def accuracy_table(results: Results) -> list[tuple[str, list[str]]]:
    """The accuracies in percent of each network's exits and ensemble, as text."""
    return [
        (plain(row["name"]), [f"{value:.2f}" for value in (*row["exits"], row["ensemble"])])
        for row in results.get("accuracy", [])
    ]


def cost_table(results: Results) -> list[tuple[str, str, str, int]]:
    """What each answer costs: its name, million MACs, accuracy in percent if measured, and percent of exit 4's MACs."""
    macs, rows = results.get("macs", {}), results.get("accuracy", [])
    accuracies = [*rows[0]["exits"], rows[0]["ensemble"]] if rows else []
    table = []
    for number, name in enumerate(ANSWERS):
        if name in macs:
            measured = f"{accuracies[number]:.2f}" if accuracies else ""
            part = round(100 * macs[name] / macs["4"])
            table.append((name if name == "ensemble" else f"exit {name}", f"{macs[name] / 1e6:,.1f}", measured, part))
    return table


def cost_chart(results: Results) -> Chart | None:
    """Accuracy against cost, exit by exit; None where no accuracy was measured."""
    macs, rows = results.get("macs", {}), results.get("accuracy", [])
    if not rows or not macs:
        return None
    cost = [macs[name] / 1e6 for name in ANSWERS]
    series = [Series(row["name"], cost[:4], row["exits"], True, (cost[4], row["ensemble"])) for row in rows]
    axes = (
        "Across: million multiply-accumulates (MACs) for an image. Up: accuracy in percent. Dots are exits 1 to 4, the "
        "square is the ensemble of all four."
    )
    return chart("Accuracy against cost", series, axes=axes, percent=True, zero=False)


def run_facts(results: Results) -> list[tuple[str, str]]:
    """What was run on what, as names and values."""
    facts = [("Data", f"{results['data']}, split {results.get('split', '?')}, {results.get('images', 0):,} images")]
    if results.get("corrupt"):
        facts.append(("Left out", f"{plural(results['corrupt'], 'image')} that cannot be decoded"))
    if "test" in results:
        facts.append(("Measured on", f"{results['test']}, {results.get('test_images', 0):,} images"))
    if "model" in results:
        facts.append(("Network", f"{results['model']} at {results.get('image_size', '?')} px"))
    if "sizes" in results:
        facts.append(("Clusters", f"{len(results['sizes']):,} ({results.get('k_asked', '?')} asked for)"))
    names = {"nmi": "NMI", "ari": "ARI", "purity": "purity"}
    quality = results.get("quality") or {}
    if quality:
        measured = [f"{name} {quality[key]:.3f}" for key, name in names.items() if key in quality]
        facts.append(("Clusters against the labels", ", ".join(measured)))
    for name, value in results.get("clustered", {}).items():
        facts.append((f"Features that were clustered, {name}", f"{value:.2f}% accuracy"))
    for note in results.get("notes", []):
        if (found := re.fullmatch(r"\*\*(.+?)\*\*: (.+)", note, re.DOTALL)) is not None:
            facts.append((_from_markdown(found[1]), _from_markdown(found[2])))
    for name, key in (("Seed", "seed"), ("Machine", "machine")):
        if key in results:
            facts.append((name, str(results[key])))  # type: ignore[literal-required]
    return [(plain(name), plain(value)) for name, value in facts]


def _from_markdown(text: str) -> str:
    """The words of a line of Markdown that `errors.text` wrote."""
    return html.unescape(re.sub(r"\\(.)", r"\1", text.replace("`", "")))
