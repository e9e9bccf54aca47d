"""Processes that decode for callers that wait: results, errors, deaths. Here they evaluate expressions."""

import asyncio
from typing import Any

import pytest

from data_pipeline.preparation.packing.decoders import decoders

KILL, ABORT = "__import__('os').kill(__import__('os').getpid(), 9)", "__import__('os').abort()"


def evaluated(items: list[str], workers: int) -> list[Any]:
    async def all_of_them() -> list[Any]:
        async with decoders(eval, workers) as processes:
            return await asyncio.gather(*map(processes.do, items), return_exceptions=True)

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("workers", [1, 2])
def test_every_item_gets_its_own_result(workers: int) -> None:
    items = [f"bytes([{number}]) * {number} * 20_000" for number in range(40)]
    assert evaluated(items, workers) == [eval(item) for item in items]


def test_an_item_that_kills_costs_only_itself() -> None:
    items = [{5: KILL, 6: ABORT, 20: KILL}.get(number, f"{number} * 2") for number in range(30)]
    expected = [None if number in (5, 6, 20) else number * 2 for number in range(30)]
    assert evaluated(items, 2) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_work_reaches_its_caller_alone(workers: int) -> None:
    fine, broken, also_fine = evaluated(["1", "1 / 0", "2"], workers)
    assert (fine, also_fine) == (1, 2) and isinstance(broken, ZeroDivisionError)


def test_a_caller_that_gives_up_disturbs_no_other() -> None:
    async def run() -> list[Any]:
        async with decoders(eval, 2) as processes:
            tasks = [asyncio.create_task(processes.do(f"__import__('time').sleep(0.05) or {n}")) for n in range(12)]
            await asyncio.sleep(0.3)
            for task in tasks[::3]:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    assert [found for n, found in enumerate(asyncio.run(run())) if n % 3] == [n for n in range(12) if n % 3]


def test_work_that_no_process_knows_is_an_error_not_a_loss() -> None:
    async def run() -> None:
        async with decoders(only_here, 2) as processes:
            await processes.do(1)

    with pytest.raises(RuntimeError, match="ended before its first image"):
        asyncio.run(run())


def only_here(item: int) -> int:  # pytest's importlib mode: processes cannot import this module
    return item
