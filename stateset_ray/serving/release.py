"""Which checkpoints of a run answer: held, tried on a share of the conversations, taken back.

It stands in three small files in the run's folder, so that it outlives replicas and is the same for all of
them. Each is replaced in one step, and in an order in which a crash between two of them changes nothing that
clients could notice.

    serve-pin       step-00000010        answers everybody, whatever is newer
    serve-canary    step-00000012 0.1    answers a tenth of the conversations instead
    serve-before    step-00000008        what answered before, the newest last: the way back

A canary holds its run: what it is compared with must not change meanwhile.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from stateset_ray.checkpoint import BEFORE, CANARY, PIN, pointed
from stateset_ray.errors import CheckpointError, ConfigError
from stateset_ray.manifest import replace_whole, verify

__all__ = [
    "STEP", "answering", "falls_to", "pin", "pinned", "promote", "rollback", "start_canary", "tried",
]  # fmt: skip

STEP = re.compile(r"step-\d{8,20}")
"""The name of a checkpoint; not of one that was moved aside."""
_REMEMBERED = 3  # checkpoints to go back to; no training removes them


def pin(run: Path, name: str | None) -> None:
    """Hold a run at one of its checkpoints, or (None) let it go on to the newest; ends a canary.

    Raises:
        ConfigError: this is no checkpoint's name.
        CheckpointError: the checkpoint is not there, or not whole.
    """
    if name is not None:
        _check(run, name)
    (run / CANARY).unlink(missing_ok=True)
    _note(run, name)
    _hold(run, name)


def pinned(run: Path) -> str | None:
    """The checkpoint that a run is held at.

    Raises:
        CheckpointError: the pin is damaged; it is not overruled.
    """
    name = _read(run / PIN)
    if name is not None and not STEP.fullmatch(name):
        raise CheckpointError(
            "the pin of this run names no checkpoint", given=str(run / PIN), mend="remove it"
        )
    return name


def answering(run: Path) -> str:
    """The checkpoint that answers whoever the canary does not; "" if there is none yet.

    Raises:
        CheckpointError: the pin is damaged.
    """
    return pinned(run) or pointed(run / "checkpoints")


def start_canary(run: Path, name: str, share: float) -> str:
    """Let a checkpoint answer a share of the conversations; returns what answers the others.

    The run is held at what answers now. Giving another share keeps the conversations that the canary has.

    Args:
        share: between 0 and 1.

    Raises:
        ConfigError: the share is out of its bounds, this is no checkpoint's name, or it answers already.
        CheckpointError: the checkpoint is not there, or not whole.
    """
    if not 0 < share < 1:
        raise ConfigError("the share of a canary is between 0 and 1", given=share, mend="for example 0.1")
    _check(run, name)
    stable = answering(run)
    if name == stable:
        raise ConfigError(
            "this checkpoint answers everybody already", given=name,
            mend="hold the run at an older one first (--pin), or choose a newer one",
        )  # fmt: skip
    if pinned(run) is None:
        verify(run / "checkpoints" / stable)
        _hold(run, stable)
    _write(run / CANARY, [f"{name} {share!r}"])
    return stable


def tried(run: Path) -> tuple[str, float] | None:
    """The canary of a run and its share.

    Raises:
        CheckpointError: the file is damaged; no canary answers then.
    """
    text = _read(run / CANARY)
    if text is None:
        return None
    name, _, share = text.partition(" ")
    with suppress(ValueError):
        if STEP.fullmatch(name) and 0 < float(share) < 1:
            return name, float(share)
    raise CheckpointError(
        "the canary of this run cannot be read", given=str(run / CANARY), mend="remove it, or start it again"
    )


def promote(run: Path) -> str:
    """Let the canary answer everybody; returns its name.

    Raises:
        ConfigError: there is none.
        CheckpointError: it is damaged, or not whole any more.
    """
    canary = tried(run)
    if canary is None:
        raise ConfigError("there is no canary to promote", given=str(run), mend="start one with --canary")
    _check(run, canary[0])
    _note(run, canary[0])
    # In this order: in between, one checkpoint is both, and nobody is answered by what was there before.
    _hold(run, canary[0])
    (run / CANARY).unlink(missing_ok=True)
    return canary[0]


def rollback(run: Path) -> str:
    """Take back the last change: end the canary, or else hold the run at what answered before.

    Where nothing is known of before (the run has followed its newest checkpoint), that is the checkpoint
    before the one that answers.

    Returns:
        What answers everybody now.

    Raises:
        ConfigError: there is nothing to go back to.
        CheckpointError: the pin is damaged.
    """
    now = answering(run)
    if (run / CANARY).exists():  # a damaged one as well
        (run / CANARY).unlink(missing_ok=True)
        return now
    known = [name for name in _before(run) if name != now]
    while known:
        name = known.pop()
        if _whole(run, name):
            _hold(run, name)
            _write(run / BEFORE, known)
            return name
    older = (p.name for p in (run / "checkpoints").glob("step-*") if STEP.fullmatch(p.name))
    for name in sorted((name for name in older if _step(name) < _step(now)), key=_step, reverse=True):
        if _whole(run, name):
            _hold(run, name)
            return name
    raise ConfigError("there is no version to go back to", given=str(run))


def falls_to(name: str, share: float, key: str) -> bool:
    """Whether a conversation falls to a canary: the same for every replica, and for each of its turns.

    A larger share keeps all that a smaller one had. Another canary gets other conversations.

    Args:
        name: of the canary.
        key: names the conversation.
    """
    place = hashlib.blake2b(f"{name}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(place, "big") < share * 2**64


def _check(run: Path, name: str) -> None:
    if not STEP.fullmatch(name):
        raise ConfigError(
            "this is not the name of a checkpoint", given=name, mend="for example step-00000012"
        )
    if (run / "checkpoints" / name).is_symlink():
        raise CheckpointError("this checkpoint is a link to somewhere else", given=name)
    verify(run / "checkpoints" / name)


def _whole(run: Path, name: str) -> bool:
    try:
        _check(run, name)
    except (CheckpointError, ConfigError):
        return False
    return True


def _step(name: str) -> int:
    return int(name.removeprefix("step-")) if STEP.fullmatch(name) else -1


def _hold(run: Path, name: str | None) -> None:
    if name is None:
        (run / PIN).unlink(missing_ok=True)
    else:
        _write(run / PIN, [name])


def _note(run: Path, name: str | None) -> None:
    """Remember what answers now as what there is to go back to, if that is another one."""
    with suppress(CheckpointError):  # a damaged pin is nothing to go back to
        now = answering(run)
        if STEP.fullmatch(now) and now != name:
            known = [other for other in _before(run) if other != now]
            _write(run / BEFORE, [*known, now][-_REMEMBERED:])


def _before(run: Path) -> list[str]:
    with suppress(CheckpointError):
        return [line for line in (_read(run / BEFORE) or "").splitlines() if STEP.fullmatch(line)]
    return []


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        what = "pin" if path.name == PIN else "canary"
        raise CheckpointError(f"the {what} of this run cannot be read", given=str(path)) from error


def _write(path: Path, lines: Iterable[str]) -> None:
    replace_whole(path, "".join(f"{line}\n" for line in lines).encode())
