"""What a finished run says in the terminal, and lines that no terminal breaks within a word."""

import io

import pytest

from sssd_zoo.errors.text import Terminal, fitted, wrapped
from sssd_zoo.evaluation.reports.terminal import describe_costs, describe_results, next_commands, summary

ROW = {"name": "SSSD", "exits": [1.0, 22.5, 33.333, 100.0], "ensemble": 50.0}


def test_accuracies_are_a_table():
    lines = describe_results({"accuracy": [ROW], "test": "split test"}).split("\n")
    assert lines[0] == "linear-probe accuracy in percent, split test:"
    assert lines[1].split() == ["exit", "1", "exit", "2", "exit", "3", "exit", "4", "ensemble"]
    assert lines[2].split() == ["SSSD", "1.00", "22.50", "33.33", "100.00", "50.00"]
    assert len(lines[1]) == len(lines[2])
    assert describe_results({"sizes": [3, 9]}) == "2 clusters of 3 to 9 images; no labels, so no accuracy was measured"


def test_costs_and_times():
    macs = {"1": 5_000_000, "4": 37_040_000, "ensemble": 39_000_000}
    lines = describe_costs({"macs": macs, "times": [{"step": "pretrain", "seconds": 75.0}]}).split("\n")
    assert lines[1].split() == ["exit", "1", "5.0", "M"]
    assert lines[-1].split() == ["pretrain", "1", "min", "15", "s"]
    assert describe_costs({}) == ""


def test_the_verdict_and_its_commands_come_last(tmp_path):
    verdict = {"level": "weak", "sentence": "It is little better than chance.", "next": ["sssd fit --data a --out b"]}
    said = summary({"sizes": [3, 9], "verdict": verdict}, tmp_path / "run", str(tmp_path))
    assert "Verdict: weak. It is little better than chance.\n\nNext:\n  sssd fit --data a --out b" in said
    (tmp_path / "my photos").mkdir()
    local = next_commands({}, tmp_path / "run", str(tmp_path / "my photos"))
    assert local == [f"sssd predict {tmp_path}/run/model '{tmp_path}/my photos'"]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.parquet").touch()  # which `sssd predict` does not read
    for data in ("uoft-cs/cifar10", str(tmp_path / "tables")):
        assert next_commands({}, tmp_path / "run", data) == [f"sssd space {tmp_path}/run"]


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestWrapping:
    TEXT = (
        "a line of many words whose length is more than that of a terminal, with /a/path/that/is-long/and-stays whole"
    )

    @pytest.mark.parametrize("width", [20, 40, 80])
    def test_no_word_is_broken(self, width):
        lines = wrapped(f"short\n  {self.TEXT}", width).split("\n")
        assert lines[0] == "short"
        assert all(len(line) <= width or len(line.split()) == 1 for line in lines)
        assert " ".join(" ".join(lines).split()) == f"short {self.TEXT}"
        assert all(line.startswith("  ") for line in lines[1:])

    def test_a_command_can_still_be_pasted(self):
        command = "  sssd fit --data '/my photos/of the sea' --out /runs/sea --features resnet18 --distill.anchor 4"
        lines = wrapped(command, 60).split("\n")
        assert len(lines) > 1
        assert all(line.endswith(" \\") for line in lines[:-1])
        assert "".join(line.removesuffix("\\").lstrip() for line in lines) == command.strip()

    def test_files_and_pipes_get_lines_as_they_are(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        assert fitted(self.TEXT, io.StringIO()) == self.TEXT
        assert "\n" in fitted(self.TEXT, FakeTerminal())

    def test_messages_are_fitted_and_progress_bars_are_not(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        stream = FakeTerminal()
        terminal = Terminal(stream, messages=True)
        terminal.write(f"warning: {self.TEXT}\n")
        assert max(map(len, stream.getvalue().split("\n"))) <= 40
        written = len(stream.getvalue())
        terminal.write(f"\r{self.TEXT}")
        assert stream.getvalue()[written:] == f"\r{self.TEXT}"
