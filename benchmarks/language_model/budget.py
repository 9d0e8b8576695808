"""How long the models train: the same number of steps, or of minutes, for every output layer."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field


@dataclass
class Budget:
    """A training in ``rounds``, each with a validation at its end.

    By steps, round k ends at step ``ends[k - 1]``; ``ends`` may grow while the training goes on, so that under a time
    limit each round is as long as the machine's speed so far allows. By time, every round takes ``seconds / rounds``.
    """

    rounds: int
    ends: list[int] = field(default_factory=list)
    seconds: float | None = None

    @classmethod
    def of_steps(cls, steps: int, rounds: int = 1) -> Budget:
        """``steps`` in rounds that are as equal as they can be."""
        return cls(rounds, [-(-steps * current // rounds) for current in range(1, rounds + 1)])

    def progress(self, step: int, seconds: float) -> float:
        """The share of the rounds that is done after so many steps, which took so many seconds."""
        if self.seconds is not None:
            return seconds / self.seconds
        done = bisect_right(self.ends, step)
        if done == len(self.ends):
            return done / self.rounds
        begin = self.ends[done - 1] if done else 0
        return (done + (step - begin) / (self.ends[done] - begin)) / self.rounds

    def plan_round(self, most: int, left: float, step_seconds: float, validation_seconds: float) -> None:
        """Append the end of the next round: its share of what is left, one step at the least.

        Args:
            most: steps that the whole training may have.
            left: seconds for what is left of the training of all models.
            step_seconds: what one step of each of the models takes, summed.
            validation_seconds: what one validation of each of them takes, summed.
        """
        done = self.ends[-1] if self.ends else 0
        rounds = self.rounds - len(self.ends)
        in_time = int((left / rounds - validation_seconds) / step_seconds)
        self.ends.append(done + max(1, min(-(-(most - done) // rounds), in_time)))
