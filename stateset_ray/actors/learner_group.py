"""All learner ranks: they step together, save together, and end together.

Who waits for whom: the controller waits for all ranks, each rank waits for the others inside collectives.
A rank never heals alone. If one fails, all are ended at once, so that no collective waits for a dead peer.
`LearnerLost` then says that they can be built anew in the same bundles (`rebuild`) and continue from the last
checkpoint, which is whole; any other error stops the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from stateset_ray.actors.learner_rank import LearnerRank, RankBatch, UpdateBatch
from stateset_ray.actors.placement import Placement
from stateset_ray.actors.publishing.base import PublishedWeights
from stateset_ray.actors.publishing.folder import root_of
from stateset_ray.actors.publishing.transports import results
from stateset_ray.actors.remote import died_with_its_node, get
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, LearnerError, LearnerLost, StatesetError
from stateset_ray.learner.batch import Item, plan
from stateset_ray.learner.learner import LossKind

__all__ = ["LearnerGroup", "learner_group"]

_log = logging.getLogger(__name__)


class LearnerGroup:
    """The ranks as one; created by `learner_group`.

    Args:
        config: of the run.
        make: creates the actor of a rank, in the bundle that belongs to it.

    Attributes:
        fresh: whether the ranks have neither learned nor loaded anything; only then can they load.
    """

    def __init__(self, config: Config, make: Callable[[int], Any]) -> None:
        self._config = config
        self._make = make
        self._ranks: list[Any] = []
        self.pids: list[int] = []
        self.restarts = 0
        self.fresh = True

    def start(self) -> None:
        """Create the ranks and let them meet.

        Raises:
            StatesetError: a rank could not be set up; the cause is passed on.
            WaitTimeout: not ready within `cluster.wait_seconds`.
        """
        deadline, spare = time.monotonic() + self._config.cluster.wait_seconds, True
        while True:
            try:
                return self._meet()
            except (LearnerError, ClusterError) as error:
                # Ray may not have noticed yet that the node of a bundle is dead, and have put the rank there.
                gone = died_with_its_node(error) and time.monotonic() < deadline
                # The port was free when it was chosen, and may have been taken before it was used.
                taken = spare and isinstance(error, LearnerError)
                if not gone and not taken:
                    raise
                spare = gone
                _log.warning("the learner ranks are created once more: %s", error.problem)
                self.end()

    def _meet(self) -> None:
        limit = self._config.cluster.wait_seconds
        self.fresh = True
        self._ranks = [self._make(rank) for rank in range(self._config.learner.ranks)]
        found = get(
            [r.where.remote() for r in self._ranks], timeout=limit,
            waiting_for="the learner ranks to start",
        )  # fmt: skip
        nodes = [node for node, _, _ in found]
        master = (found[0][1], found[0][2])
        self.pids = get(
            [r.set_up.remote(master, nodes.count(node)) for r, node in zip(self._ranks, nodes, strict=True)],
            timeout=limit, waiting_for="the learner ranks to load the model and meet",
        )  # fmt: skip

    def rebuild(self) -> None:
        """End what is left of the ranks and build all anew, in the same bundles; they know nothing yet."""
        self.restarts += 1
        self.end()
        self.start()

    def update(
        self, updates: Sequence[UpdateBatch], step: int, loss: LossKind = "policy",
        kl_coef: float | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Optimizer steps on every rank, one for each batch.

        Args:
            updates: what to learn from, in turn.
            step: decides the learning rate.
            kl_coef: instead of `grpo.kl_coef`, where it is steered.

        Returns:
            The metrics of `Learner.update`.

        Raises:
            LearnerLost: a rank died; all ranks have been ended.
            LearnerError: the ranks cannot learn from this; all ranks have been ended.
        """
        self.fresh = False
        refs = list(dict.fromkeys(s.payload for update in updates for s in update.samples))
        where = {ref: i for i, ref in enumerate(refs)}
        learner = self._config.learner
        parts: list[list[RankBatch]] = [[] for _ in range(learner.ranks)]
        for update in updates:
            # Without its payload, which travels once, beside all of them.
            rows = [(where[s.payload], replace(s, payload=None)) for s in update.samples]
            if not learner.share_prefix:
                rows = [(index, replace(s, prefix=0)) for index, s in rows]
            items = [Item(s.size.tokens, s.group, s.prefix) for _, s in rows]
            planned = plan(items, learner.ranks, learner.micro_batch_tokens)
            for part, mine in zip(parts, planned, strict=True):
                part.append(RankBatch([[rows[i] for i in mb] for mb in mine], update.denominator))
        calls = [
            rank.update.remote(part, {"refs": refs}, step, loss, kl_coef)
            for rank, part in zip(self._ranks, parts, strict=True)
        ]
        return dict(self._all(calls, "an update")[0])

    def secure(self, payloads: Sequence[Any]) -> list[int]:
        """Fetch groups to rank 0's node, where they outlive those that played them until the next call.

        It is asked also where there are none: perhaps they were given up because its weights are lost.

        Args:
            payloads: references to `GroupPayload`.

        Returns:
            Indices of those that are lost already.

        Raises:
            LearnerLost: the rank died.
        """
        return list(self._all([self._ranks[0].secure.remote({"refs": list(payloads)})], "fetching groups")[0])

    def publish(self, version: int, lineage: int = 0) -> PublishedWeights:
        """Make the weights ready to be fetched under their version, through the configured transport."""
        count, root = results(self._config), root_of(self._config)
        calls = [
            rank.publish.options(num_returns=count).remote(version, lineage, root) for rank in self._ranks
        ]
        what = "a publication of the weights"
        if count == 1:
            return PublishedWeights(version, self._all(calls, what)[0], lineage)
        self._all([done for done, *_ in calls], what)
        return PublishedWeights(version, tuple(calls[0][1:]), lineage)

    def write_probe(self, root: str) -> tuple[str, str]:
        """Let rank 0 leave a file in a folder; see `publishing.folder.write_probe`."""
        limit = self._config.cluster.wait_seconds
        token, node = get(
            self._ranks[0].write_probe.remote(root), timeout=limit, waiting_for="the learner to write a file"
        )
        return str(token), str(node)

    def in_force(self) -> list[dict[str, Any]]:
        """What each rank learns with; see `Learner.in_force`."""
        return self._all([rank.in_force.remote() for rank in self._ranks], "asking what is in force")

    def refresh_reference(self) -> None:
        """Make the policy as it is now the reference of the KL."""
        self._all([rank.refresh_reference.remote() for rank in self._ranks], "a new reference")

    def save(self, folder: Path) -> None:
        """Write model and state of all ranks into a folder that all of them see."""
        self._all([rank.save.remote(str(folder.absolute())) for rank in self._ranks], "a checkpoint")

    def check(self, folder: Path) -> None:
        """Ask whether the ranks, built anew, can continue from a checkpoint; they stay as they are.

        Raises:
            CheckpointError: it is of another model, engine, ZeRO stage or dtype.
            ClusterError: the rank that was asked is dead.
        """
        limit = self._config.cluster.wait_seconds
        answer = self._ranks[0].check.remote(str(folder.absolute()))
        get(answer, timeout=limit, waiting_for="the learner to look at a checkpoint")

    def load(self, folder: Path) -> None:
        """Continue all ranks from a checkpoint."""
        self.fresh = False
        self._all([rank.load.remote(str(folder.absolute())) for rank in self._ranks], "a checkpoint's state")

    def end(self) -> None:
        """End all ranks now."""
        for rank in self._ranks:
            ray.kill(rank)

    def _all(self, calls: list[Any], what: str) -> list[Any]:
        pending = list(calls)
        try:
            # One by one as they come: the first failure must end the ranks that wait for the failed one.
            while pending:
                ready, pending = ray.wait(pending, num_returns=1, timeout=self._config.learner.timeout)
                if not ready:
                    raise LearnerError(
                        f"{len(pending)} of {len(calls)} learner ranks did not finish {what} within "
                        f"learner.timeout = {self._config.learner.timeout:.0f} s",
                        mend="raise learner.timeout if the work is really that long",
                    )
                get(ready, timeout=self._config.learner.timeout, waiting_for=what)
        except Exception as error:
            self.end()
            # A ClusterError tells of what a rank did not raise on purpose: the peers of a dead one raise
            # it when their collective breaks, and may be heard before its death is.
            if isinstance(error, StatesetError) and not isinstance(error, ClusterError):
                raise
            raise LearnerLost(
                f"a learner rank failed during {what}; all ranks were ended: {error}",
                mend="the last checkpoint is whole: continue with --resume (out of memory? lower "
                "learner.micro_batch_tokens)",
            ) from error
        return list(get(calls, timeout=self._config.learner.timeout, waiting_for=what))


@contextmanager
def learner_group(config: Config, placement: Placement) -> Iterator[LearnerGroup]:
    """Create the ranks, let them meet, and end them afterwards.

    Raises:
        StatesetError: as in `LearnerGroup.start`.
    """
    cls = ray.remote(max_restarts=0)(LearnerRank)
    group = LearnerGroup(config, lambda rank: cls.options(**placement.learner(rank)).remote(config, rank))
    try:
        group.start()
        yield group
    finally:
        group.end()
