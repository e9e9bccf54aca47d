"""When a run that has ended starts again: a pure decision, its history, and the loop of launchers without a queue.

    end                                          then
    0, 2 (configuration), 3 (bad data), 4 (gave up), 130 (killed from the keyboard)      it is over
    75, asked for by the user (stop file, training.stop_after)                           it is over
    75 otherwise: the time limit, preemption     queue again
    5 (a hang), 1, 134, 137, 139, 143, ...       start again from the newest checkpoint, within the budget

The budget is `max_restarts` in a row that brought no new checkpoint. The first of them is made inside the job, on the
nodes at hand, with a new rendezvous; the next ones through the queue, which may give other nodes. A node that the
health gate refused is avoided at once, a node whose rank was the first to fail in two starts likewise.

    RUN/restarts.jsonl    a line an end: when, which job, exit code, rank and node that failed first, what was decided

Imports nothing of this project, for the sbatch script runs this file by itself: `python -I -S restarting.py ...`
prints the decision as assignments of the shell.
"""

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

HISTORY = "restarts.jsonl"
NO_CHECKPOINT = "none"
DONE, STOPPED, INTERRUPTED, HANG = 0, 75, 130, 5
FINAL = (DONE, 2, 3, 4, INTERRUPTED)  # usage, bad data and giving up would only repeat
USERS_REASONS = ("stop file", "training.stop_after")
END, RESTART, REQUEUE = "end", "restart", "requeue"
LONGEST_PAUSE = 300.0
_FAILURES_TO_AVOID_A_NODE = 2
_TAIL_BYTES = 1 << 20  # of events.jsonl: its last events


@dataclass(frozen=True)
class Budget:
    """max_restarts: in a row, without a new checkpoint. pause: seconds before the first of them, doubled for each next.

    spares: nodes of the job beyond those that the run needs. queue: is there a queue to go back to?
    """

    max_restarts: int = 3
    pause: float = 10.0
    spares: int = 0
    queue: bool = True


@dataclass(frozen=True)
class Ended:
    """One start of the ranks and how it ended. before, checkpoint: the newest one at its start and at its end.

    node, rank: of the first that failed by itself. refused: nodes that failed the health gate, or that are down.
    """

    code: int
    before: str = NO_CHECKPOINT
    checkpoint: str = NO_CHECKPOINT
    by_user: bool = False
    node: str | None = None
    rank: int | None = None
    refused: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.code not in (DONE, STOPPED)

    @property
    def fruitless(self) -> bool:
        return self.failed and self.checkpoint == self.before


@dataclass(frozen=True)
class Decision:
    """action: END, RESTART (inside the job) or REQUEUE. avoid: all nodes that the next start should do without."""

    action: str
    why: str
    pause: float = 0.0
    avoid: tuple[str, ...] = field(default=())


def decide(ended: Ended, history: Sequence[Ended], budget: Budget) -> Decision:
    """What comes after `ended`. history: the ends before it, oldest first, of this run."""
    if ended.code in FINAL:
        return Decision(END, f"exit code {ended.code} is final")
    avoid = nodes_to_avoid([*history, ended])
    if ended.code == STOPPED:
        if ended.by_user or not budget.queue:
            return Decision(END, "stopped as asked, after saving")
        return Decision(REQUEUE, "stopped from outside, after saving", avoid=avoid)
    fruitless = fruitless_in_a_row([*history, ended])
    if fruitless > budget.max_restarts:
        if budget.max_restarts == 0:
            return Decision(END, f"exit code {ended.code}, and no restarts are allowed")
        return Decision(END, f"{fruitless} starts in a row brought no new checkpoint")
    what = "a hang" if ended.code == HANG else f"exit code {ended.code}"
    pause = min(LONGEST_PAUSE, budget.pause * 2 ** max(0, fruitless - 1))
    enough = len(avoid) <= budget.spares
    if not budget.queue or (fruitless <= 1 and enough):
        return Decision(RESTART, f"{what}; fruitless starts in a row: {fruitless}", pause, avoid)
    return Decision(REQUEUE, f"{what}; fruitless starts in a row: {fruitless}", pause, avoid)


def fruitless_in_a_row(ends: Sequence[Ended]) -> int:
    """Failures up to the last end that brought no new checkpoint. A stop after saving counts neither way; the end of a
    run, or a new checkpoint, begins afresh.
    """
    count = 0
    for end in reversed(ends):
        if end.code in FINAL or end.checkpoint != end.before:
            break
        count += end.fruitless
    return count


def nodes_to_avoid(ends: Sequence[Ended]) -> tuple[str, ...]:
    """Nodes that a health gate refused once, or on which a rank was twice the first to fail."""
    first_failures: dict[str, int] = {}
    refused: set[str] = set()
    for end in ends:
        refused |= set(end.refused)
        if end.failed and end.node is not None:
            first_failures[end.node] = first_failures.get(end.node, 0) + 1
    often = {node for node, count in first_failures.items() if count >= _FAILURES_TO_AVOID_A_NODE}
    return tuple(sorted(refused | often))


# --- what stands on the disk


def newest_checkpoint(run: Path | None) -> str:
    """The name that RUN/checkpoints/latest holds."""
    try:
        return ((run or Path("/nonexistent")) / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return NO_CHECKPOINT


def stopped_by_user(run: Path | None) -> bool:
    """Does the last `stopped` event of the run say that its user asked for it?"""
    if run is None:
        return False
    for event in reversed(last_events(run)):
        if event.get("kind") == "stopped":
            return event.get("reason") in USERS_REASONS
    return False


def last_events(run: Path) -> list[dict]:  # type: ignore[type-arg]
    """The events in the last part of RUN/events.jsonl."""
    return last_entries(run / "events.jsonl")


def last_entries(path: Path, tail: int = _TAIL_BYTES) -> list[dict]:  # type: ignore[type-arg]
    """The objects in the last `tail` bytes of a file of JSON lines; lines that a crash cut are left out."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - tail))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def read_history(path: Path) -> list[Ended]:
    """The ends since the run was last over (who starts it again has a whole budget), oldest first. Lines that a crash
    cut, or that another version wrote, are left out.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    ends: list[Ended] = []
    names = Ended.__dataclass_fields__
    for line in lines:
        try:
            entry = json.loads(line)
            if entry.get("action") == END:
                ends = []
                continue
            values = {name: value for name, value in entry.items() if name in names}
            ends.append(Ended(**{**values, "refused": tuple(values.get("refused", ()))}))
        except (ValueError, TypeError, AttributeError):
            continue
    return ends


def remember(path: Path, ended: Ended, decision: Decision, job: str | None, nodes: Sequence[str] = ()) -> None:
    """Append one end. A disk that is full loses the line, not the restart."""
    entry = {"time": time.time(), "job": job, "nodes": list(nodes), **asdict(ended), "action": decision.action}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "why": decision.why, "avoid": decision.avoid}) + "\n")
    except OSError as error:
        print(f"{path}: {error}", file=sys.stderr, flush=True)


def keep_running(
    attempt: Callable[[int], int],
    run: Path | None,
    budget: Budget,
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Call `attempt(number)` until its exit code is final, or the budget is spent; the last exit code.

    For launchers without a queue. run: the folder whose checkpoints tell whether the run moves on.
    """
    history: list[Ended] = []
    while True:
        before = newest_checkpoint(run)
        code = attempt(len(history))
        ended = Ended(code, before, newest_checkpoint(run), by_user=stopped_by_user(run))
        decision = decide(ended, history, budget)
        if run is not None and (history or decision.action != END or ended.failed) and run.is_dir():
            remember(run / HISTORY, ended, decision, None)
        if decision.action == END:
            if history and ended.failed:
                say(f"not started again: {decision.why}")
            return code
        history.append(ended)
        say(f"starts again in {decision.pause:g} s from checkpoint {ended.checkpoint}: {decision.why}")
        sleep(decision.pause)


# --- for the sbatch script


def said_by_ranks(word: str, code: int) -> tuple[int, str | None, int | None]:
    """(exit code, node, rank) of the rank whose word counts; `code` alone where no rank left one.

    word: the link `WORD.told` is of a rank with 2, 3 or 4, `WORD.hang` of one with 5, `WORD.first` of the first that
    ended with another code.
    """
    for name in ("told", "hang", "first"):
        try:
            words = os.readlink(f"{word}.{name}").split()
            told = int(words[0]), words[1], int(words[2])
        except (OSError, ValueError, IndexError):
            continue
        # Of a hang the first to notice waits for another; of the others the rank itself is meant.
        return (told[0], None, None) if name == "hang" else told
    return code, None, None


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--word", required=True)
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--run", default="")
    parser.add_argument("--before", default=NO_CHECKPOINT)
    parser.add_argument("--refused", default="")
    parser.add_argument("--nodes", default="")
    parser.add_argument("--job", default=None)
    parser.add_argument("--max-restarts", type=int, default=Budget.max_restarts)
    parser.add_argument("--pause", type=float, default=Budget.pause)
    parser.add_argument("--spares", type=int, default=0)
    given = parser.parse_args(arguments)
    run = Path(given.run) if given.run else None
    code, node, rank = said_by_ranks(given.word, given.code)
    if node is not None and lost_its_partner(run, rank):
        node = None  # the rank failed because another one did
    refused = tuple(name for name in re.split(r"[,\s]+", given.refused) if name)
    ended = Ended(code, given.before, newest_checkpoint(run), stopped_by_user(run), node, rank, refused)
    decision = decide(ended, read_history(given.history), Budget(given.max_restarts, given.pause, given.spares))
    remember(given.history, ended, decision, given.job, re.split(r"[,\s]+", given.nodes.strip()))
    values = {
        "code": code,
        "action": decision.action,
        "pause": f"{decision.pause:g}",
        "avoid": ",".join(decision.avoid),
        "why": decision.why,
        "rank": "" if rank is None else rank,
    }
    print(" ".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items()))


def lost_its_partner(run: Path | None, rank: int | None) -> bool:
    """Does the last `failed` event of this rank say that a connection to another rank broke?"""
    if run is None or rank is None:
        return False
    for event in reversed(last_events(run)):
        if event.get("kind") == "failed" and event.get("rank") == rank:
            return bool(event.get("lost_partner"))
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
