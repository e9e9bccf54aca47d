"""When a run starts again: the decision by itself, and the loop of launchers without a queue."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import spawn
from launch.restarting import (
    END,
    HISTORY,
    REQUEUE,
    RESTART,
    Budget,
    Decision,
    Ended,
    decide,
    keep_running,
    nodes_to_avoid,
    read_history,
    remember,
)

FAULT = Ended(139)
SAVED = Ended(139, "step-00000004", "step-00000008")


def action(*ends: Ended, budget: Budget = Budget()) -> str:  # noqa: B008  a frozen value
    return decide(ends[-1], ends[:-1], budget).action


@pytest.mark.parametrize("code", [0, 2, 3, 4, 130])
def test_what_would_only_repeat_or_is_done_ends(code: int) -> None:
    assert action(Ended(code)) == END


@pytest.mark.parametrize("code", [1, 5, 134, 137, 139, 143, 255])
def test_faults_start_again_in_the_job_then_by_the_queue(code: int) -> None:
    fault = Ended(code)
    assert [action(*[fault] * n) for n in range(1, 5)] == [RESTART, REQUEUE, REQUEUE, END]
    local = Budget(max_restarts=2, queue=False)
    assert [action(*[fault] * n, budget=local) for n in range(1, 4)] == [RESTART, RESTART, END]


def test_a_new_checkpoint_gives_the_whole_budget_back() -> None:
    assert action(FAULT, FAULT, FAULT, SAVED) == RESTART
    assert action(FAULT, FAULT, FAULT, SAVED, FAULT) == RESTART
    assert action(SAVED, *[FAULT] * 4) == END


def test_a_stop_from_outside_is_queued_and_a_users_stop_ends() -> None:
    assert action(Ended(75)) == REQUEUE
    assert action(Ended(75, by_user=True)) == END
    assert action(Ended(75), budget=Budget(queue=False)) == END
    assert action(*[FAULT, FAULT, FAULT, Ended(75), FAULT]) == END, "a stop between failures forgives none"


def test_pauses_double_up_to_five_minutes() -> None:
    local = Budget(max_restarts=20, pause=10, queue=False)
    assert [decide(FAULT, [FAULT] * n, local).pause for n in (0, 1, 2, 10)] == [10, 20, 40, 300]


def test_a_refused_node_is_avoided_at_once_and_a_failing_one_at_its_second_time() -> None:
    once, other = Ended(139, node="n2", rank=9), Ended(139, node="n1", rank=0)
    assert nodes_to_avoid([once]) == nodes_to_avoid([once, other]) == ()
    assert nodes_to_avoid([once, other, once]) == ("n2",)
    assert nodes_to_avoid([Ended(1, refused=("n7",)), once]) == ("n7",)


def test_the_job_goes_on_without_a_bad_node_where_it_has_a_spare() -> None:
    gate = Ended(1, refused=("n2",))
    assert decide(gate, [], Budget(spares=1)) == decide(gate, [], Budget(spares=2))
    assert (decide(gate, [], Budget(spares=1)).action, decide(gate, [], Budget()).action) == (RESTART, REQUEUE)
    assert decide(gate, [], Budget()).avoid == ("n2",)


def test_the_history_survives_and_begins_afresh_after_an_end(tmp_path: Path) -> None:
    path = tmp_path / "runs" / HISTORY
    ends = [FAULT, Ended(5, "step-00000004", "step-00000004", node="n1", rank=3, refused=("n2",))]
    for end in ends:
        remember(path, end, Decision(RESTART, "why"), "7", ["n1"])
    with path.open("a") as file:
        file.write('{"code": 13')  # a crash
    assert read_history(path) == ends
    with path.open("a") as file:
        file.write("\n")
    remember(path, FAULT, Decision(END, "why"), "7")
    assert read_history(path) == [] == read_history(tmp_path / "none")


def test_ranks_start_again_together_until_the_run_is_done(program: Callable[[str], list[str]], tmp_path: Path) -> None:
    argv = program("""
        with open(out / f'ports-{r}', 'a') as file: file.write(os.environ['MASTER_PORT'] + '\\n')
        starts = len((out / f'ports-{r}').read_text().splitlines())
        if r == 0: (out / 'checkpoints').mkdir(exist_ok=True); (out / 'checkpoints' / 'latest').write_text(str(starts))
        if starts < 4: time.sleep(.1); os.abort() if r else time.sleep(60)
    """)
    said: list[str] = []
    budget = Budget(max_restarts=1, pause=0, queue=False)
    assert keep_running(lambda number: spawn(argv, 2), tmp_path, budget, say=said.append) == 0
    ports = [(tmp_path / f"ports-{rank}").read_text().splitlines() for rank in range(2)]
    assert ports[0] == ports[1] and len(ports[0]) == 4, "one meeting point a start, the same for both"
    lines = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [(line["code"], line["action"]) for line in lines] == [(134, "restart")] * 3 + [(0, "end")]
    assert len(said) == 3


def test_a_run_that_does_not_move_on_ends_with_its_own_code(tmp_path: Path) -> None:
    starts: list[int] = []
    said: list[str] = []

    def attempt(number: int) -> int:
        starts.append(number)
        return 1

    assert keep_running(attempt, tmp_path, Budget(2, 0, queue=False), say=said.append) == 1
    assert starts == [0, 1, 2] and "3 starts in a row brought no new checkpoint" in said[-1]
