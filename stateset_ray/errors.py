"""Every error of the project: what was wrong, what was given, and what to do about it.

Two families matter to the training loop:

* a `RolloutFault` is *data*: it ends one conversation, is counted, and never becomes a reward;
* everything else stops the run, with the last good checkpoint whole.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "EnvironmentFault",
    "InfrastructureFault",
    "LearnerError",
    "LearnerLost",
    "ModelError",
    "RewardFault",
    "RolloutFault",
    "RunError",
    "StatesetError",
    "TemplateError",
    "WaitTimeout",
]


class StatesetError(Exception):
    """Base of all errors raised on purpose.

    Args:
        problem: one sentence that says what is wrong.
        given: the value that was given, shown as `repr` (omitted when None).
        mend: what to do now.

    Example:
        >>> print(StatesetError("group_size is too small", given=1, mend="set it to 2 or more"))
        group_size is too small
          given: 1
          to mend: set it to 2 or more
    """

    def __init__(self, problem: str, given: object = None, mend: str = "") -> None:
        # Positional args make the error survive pickling between Ray processes.
        super().__init__(problem, given, mend)
        self.problem = problem
        self.given = given
        self.mend = mend

    def __str__(self) -> str:
        lines = [self.problem]
        if self.given is not None:
            text = isinstance(self.given, str) and "\n" in self.given  # a traceback, say
            lines.append(f"  given: {self.given if text else repr(self.given)}")
        if self.mend:
            lines.append(f"  to mend: {self.mend}")
        return "\n".join(lines)


class ConfigError(StatesetError):
    """A configuration that cannot run; raised before anything heavy loads."""


class ModelError(StatesetError):
    """A model or tokenizer that is missing, unreadable or of a kind we cannot drive."""


class TemplateError(ModelError):
    """A chat template that is missing or cannot be continued turn by turn."""


class CheckpointError(StatesetError):
    """A checkpoint that cannot be written, or that is incomplete or damaged."""


class ClusterError(StatesetError):
    """Ray cannot be reached, or cannot place what the configuration asks for."""


class LearnerError(StatesetError):
    """The learner is broken (dead rank, non-finite loss): the run stops."""


class LearnerLost(LearnerError):
    """A learner rank died: all ranks are built anew and continue from the last checkpoint."""


class RunError(StatesetError):
    """A run folder that cannot be opened, created or resumed."""


class WaitTimeout(StatesetError):
    """A wait passed its limit; the message names who waited for whom."""


class RolloutFault(StatesetError):
    """A conversation that failed: excluded from the batch, counted, never a reward."""


class EnvironmentFault(RolloutFault):
    """The environment raised, hung or returned garbage."""


class RewardFault(RolloutFault):
    """A reward that is not a finite number."""


class InfrastructureFault(RolloutFault):
    """The policy or the machine failed under a conversation: retried elsewhere."""
