"""How long the stages of a run take: expected from measured steps, then corrected by what the first ones took."""

from collections.abc import Mapping, Sequence

from sssd_zoo.distributed.progress import duration


class Forecast:
    """The stages of a run in turn, and how long those to come take.

    Args:
        names: of all stages, in turn.
        seconds: that stages are expected to take, by their names; those without an entry are not counted.
    """

    def __init__(self, names: Sequence[str], seconds: Mapping[str, float]) -> None:
        self.names, self.seconds = list(names), dict(seconds)
        self.expected = self.took = 0.0  # of the stages that are finished

    def left(self, name: str) -> float:
        """Seconds from the beginning of a stage to the end of the run, by what the stages before it took."""
        correction = self.took / self.expected if self.expected > 0 else 1.0
        return correction * sum(self.seconds.get(later, 0) for later in self.names[self.names.index(name) :])

    def describe(self, name: str) -> str:
        """Which step a stage is, and about how long it and the rest take, as far as that is known."""
        step = f"step {self.names.index(name) + 1} of {len(self.names)}"
        return f"{step}, about {duration(self.left(name))} left" if self.left(name) > 0 else step

    def finished(self, name: str, seconds: float) -> None:
        """Notes how long a stage took."""
        if name in self.seconds:
            self.expected += self.seconds[name]
            self.took += seconds
