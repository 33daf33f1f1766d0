"""The tables of `sssd compare`'s report: which rows of ours stand beside which of the paper's."""

import json

import pytest

from helpers.markdown import by_name, sections, table
from sssd_zoo.evaluation.reports.comparison import (
    PAPER,
    Result,
    Setting,
    changes_table,
    comparison_table,
    mean_and_range,
    paper_row,
    paper_tables,
    results_csv,
)
from sssd_zoo.evaluation.reports.paper import TABLES, named_rows

SETTING = Setting(
    data="uoft-cs/cifar10",
    images=50_000,
    model="sssd_resnet18_cifar",
    image_size=32,
    k=1000,
    pretext="sssd_resnet18_cifar",
    pretext_epochs=200,
    pretext_data=None,
    pretext_images=None,
    epochs=200,
    seed_epochs=200,
    machine="some GPU",
)


def result(method="sssd", seed=0, accuracy=50.0, **changes):
    plain = method in ("clusterfit", "seed")
    return Result(
        method=method,
        seed=seed,
        exits=[accuracy] if plain else [accuracy + number for number in range(4)],
        ensemble=None if plain else accuracy + 4,
        seconds=60,
        seconds_before=0,
        macs={},
        setting=SETTING._replace(**changes),
        epochs=4,
    )


def paper_table(lines, number):
    """The rows of one of the paper's tables as lists of cells."""
    parts = sections("\n".join(lines))
    return table(next(text for title, text in parts.items() if title.startswith(f"Table {number}")))


def test_mean_and_range_and_rows():
    assert mean_and_range([1.0]) == "1.00"
    assert mean_and_range([1.0, 2.0, 6.0]) == "3.00 (1.00, 6.00)"
    rows = by_name(table("\n".join(comparison_table([result("seed")]))))
    assert rows["SEED"] == ["", "", "", "50.00", "", "1", "", "4", "1 min 00 s"]
    assert sum("not run" in cells for cells in rows.values()) == len(PAPER) - 1


def test_changes_are_differences_seed_by_seed():
    ours = [result(seed=0, accuracy=50), result(seed=1, accuracy=60), result("clusterfit")]
    ours += [
        result("sssd-soft", 0, 51),
        result("sssd-soft", 1, 59),
        result("sssd-warm", 1, 62),
        result("sssd-soft", 7, 0),
    ]
    others = [result(seed=1, accuracy=58.5, pretext_data="tiny", pretext_images=100), result(seed=0, epochs=3)]
    others += [result(seed=0, accuracy=53, pretext="strong", pretext_epochs=None, machine="another"), result("random")]
    rows = by_name(table("\n".join(changes_table(ours, others))))
    differences = {name: (cells[0], cells[4], cells[5]) for name, cells in rows.items()}
    assert differences == {
        "SSSD, soft labels": ("+0.00 (-1.00, +1.00)", "+0.00 (-1.00, +1.00)", "2"),
        "SSSD from M_ssl's weights": ("+2.00", "+2.00", "1"),
        "SSSD, labels from sssd_resnet18_cifar, 200 epochs on tiny": ("-1.50", "-1.50", "1"),
        "SSSD, labels from strong, as it is": ("+3.00", "+3.00", "1"),
    }
    assert changes_table([result("sssd-soft")], []) == changes_table([result()], []) == []


def test_runs_of_other_settings_are_neither_seeds_of_one_row_nor_a_change_of_the_pretext():
    ours, shorter = result(accuracy=80.0), result(seed=1, accuracy=60.0)._replace(epochs=5)
    tuned = result(seed=1, accuracy=70.0)._replace(trained="another learning rate")
    other_pretext = result(seed=1, accuracy=75.0, pretrained="another learning rate")
    rows = [row for row in paper_table(paper_tables([ours, shorter, tuned, other_pretext]), 1) if row[2] == "SSSD"]
    measured = [(row[6], row[-4], row[-3]) for row in rows if row[0] == "ours" and row[6] != "not run"]
    assert measured == [("80.00", "1", "4"), ("60.00", "1", "5"), ("70.00", "1", "4"), ("75.00", "1", "4")]
    assert changes_table([ours], [shorter._replace(seed=0), tuned._replace(seed=0)]) == []
    assert changes_table([ours], [other_pretext._replace(seed=0)])


def test_every_row_of_the_paper_has_ours_below_it_and_what_was_not_run_has_no_number():
    lines = paper_tables([result(pretext_epochs=3, data="photos")])
    for number, rows in TABLES.items():
        found = paper_table(lines, number)
        for theirs, ours, row in zip(found[::2], found[1::2], rows, strict=False):
            assert (theirs[0], ours[0]) == ("paper", "ours")
            assert theirs[1:6] == ours[1:6]
            assert theirs[6 : 6 + len(row.values)] == [f"{value:.2f}" for value in row.values]
            assert ours[6:] == ["not run", *[""] * (len(ours) - 7)]


def test_runs_of_the_papers_setting_stand_under_its_row_and_others_after():
    runs = [result(seed=0, accuracy=80.0), result(seed=1, accuracy=81.0), result(accuracy=30.0, pretext_epochs=12)]
    rows = paper_table(paper_tables(runs), 1)
    place = next(
        place for place, row in enumerate(rows) if row[:5] == ["paper", "CIFAR-10", "SSSD", "ResNet-18", "200"]
    )
    assert rows[place + 1][6] == "80.50 (80.00, 81.00)"
    assert rows[place + 1][-4:] == ["2", "4", "1 min 00 s", "r1"]
    assert rows[-1][:8] == [
        "ours",
        "uoft-cs/cifar10",
        "SSSD",
        SETTING.pretext,
        "12 epochs",
        "the same",
        "30.00",
        "31.00",
    ]
    assert rows[-1][-1] == "r2"


@pytest.mark.parametrize(
    ("run", "row"),
    [
        (result(), ("CIFAR-10", "sssd", "ResNet-18", 200, None)),
        (result("random", pretext_epochs=3), ("CIFAR-10", "random", None, None, None)),
        (result(images=10_000), (None, "sssd", "ResNet-18", 200, None)),
        (result(pretext="sssd_resnet50_cifar"), ("CIFAR-10", "sssd", "ResNet-50", 200, None)),
        (result(pretext="resnet50", pretext_epochs=None), ("CIFAR-10", "sssd", None, None, None)),
        (
            result(pretext_data="ILSVRC/imagenet-1k", pretext_images=1_281_167),
            ("CIFAR-10", "sssd", "ResNet-18", 200, "ImageNet-1K"),
        ),
        (
            result(pretext_data="tiny_imagenet_32", pretext_images=100_000),
            ("CIFAR-10", "sssd", "ResNet-18", 200, "tiny_imagenet_32"),
        ),
        (result(model="sssd_resnet50_cifar"), None),
    ],
)
def test_which_row_of_the_paper_a_run_belongs_to(run, row):
    assert paper_row(run) == row


def test_other_pretext_data_are_for_table_6_alone():
    lines = paper_tables([result(accuracy=77.77, pretext_data="tiny_imagenet_32", pretext_images=100_000)])
    assert ["77.77" in str(paper_table(lines, number)) for number in (1, 2, 3, 6)] == [False, False, False, True]
    assert paper_table(lines, 6)[-1][5] == "tiny_imagenet_32"


def test_table_2_has_the_last_exit_and_results_survive_their_file():
    runs = [result("clusterfit", accuracy=55.5), result(accuracy=50.0)]
    ours = [row[6] for row in paper_table(paper_tables(runs), 2) if row[0] == "ours" and row[6] != "not run"]
    assert ours == ["55.50", "53.00"]
    assert [Result.from_json(json.loads(json.dumps(run.as_json()))) for run in runs] == runs
    lines = results_csv(runs).splitlines()
    assert lines[1].startswith("clusterfit,0,,,,55.5,,60,0,uoft-cs/cifar10,50000,")


def test_named_rows_are_the_papers():
    rows = named_rows()
    assert rows["CIFAR-10: ResNet-18, 200 epochs"] == (78.54, 79.47, 79.71, 80.00, 82.05)
    assert rows["CIFAR-10: ResNet-50, 200 epochs on ImageNet-1K"][-1] == 87.60
    assert rows["ImageNet-1K: DACSD"][0] == 45.59
    assert all(len(values) == 5 for values in rows.values())
