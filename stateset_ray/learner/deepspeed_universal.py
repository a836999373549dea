"""An engine state of DeepSpeed's for another number of ranks, by way of its universal format.

The state itself is not touched: what is converted lies beside the checkpoint, on the same storage, under a
name that no reader looks at, and is removed again. Should that fail, the next writer of checkpoints does.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stateset_ray.errors import CheckpointError
from stateset_ray.manifest import MANIFEST

__all__ = ["converted"]

_logger = logging.getLogger(__name__)


@contextmanager
def converted(state: Path, rank: int, ranks: tuple[int, int], timeout: float) -> Iterator[Path]:
    """Convert a state of ZeRO 1 to 3; call it on all ranks.

    Args:
        state: the folder that DeepSpeed wrote.
        rank: rank 0 converts, the others wait.
        ranks: how many wrote the state, and how many will read it; for the log.
        timeout: seconds for the conversion; those who wait do so in a collective, which has a limit too.

    Yields:
        The folder of the converted state, of the same name.

    Raises:
        CheckpointError: on every rank, if it cannot be converted.
    """
    outcome = ["", ""]  # the folder; what went wrong
    started = time.monotonic()
    if rank == 0:
        beside = _beside(state)
        outcome = [str(beside), _convert(state, beside / state.name, timeout)]
    torch.distributed.broadcast_object_list(outcome, src=0)
    folder, problem = Path(outcome[0]), outcome[1]
    try:
        if problem:
            raise CheckpointError(
                f"the engine state cannot be converted from {ranks[0]} ranks to {ranks[1]}: {problem}",
                given=str(state),
                mend=f"set learner.ranks = {ranks[0]}, or start a new run with model.name = the "
                "checkpoint's model folder",
            )
        if rank == 0:
            _logger.info(
                "the engine state of %d ranks was converted for %d in %.0f s: %s",
                *ranks, time.monotonic() - started, state,
            )  # fmt: skip
        yield folder / state.name
        torch.distributed.barrier()  # all have read it
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _beside(state: Path) -> Path:
    """A new name beside the checkpoint that a state belongs to, as `stateset_ray.checkpoint` names what
    is not finished.
    """
    checkpoint = next((p for p in state.parents if (p / MANIFEST).is_file()), state.parent)
    return checkpoint.with_name(f"{checkpoint.name}.tmp-{uuid.uuid4().hex}")


def _convert(state: Path, target: Path, timeout: float) -> str:
    """Let DeepSpeed's own tool write `target`; what went wrong, or nothing."""
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
        "--input_folder", str(state), "--output_folder", str(target),
        "--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state",
    ]  # fmt: skip
    # It needs no GPU and no group, and shall take none.
    alone = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    places = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {k: v for k, v in os.environ.items() if k not in places} | alone
    try:
        target.mkdir(parents=True)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode != 0:
        return "\n".join(["DeepSpeed's converter failed:", *done.stderr.strip().splitlines()[-5:]])
    return ""
