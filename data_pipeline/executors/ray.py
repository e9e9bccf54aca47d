"""Runs work units on a Ray cluster: `RAY_ADDRESS` names it, else one is started on this machine. Extra `ray`."""

from collections.abc import Callable, Iterator, Sequence

from data_pipeline.errors import UserError

_UNDER_WAY = 4  # units a core that are handed over at a time


def ray_map(work: Callable[[int], None], units: Sequence[int]) -> Iterator[None]:
    """Maps over the cores of the cluster, in any order; yields once a unit. All machines must see the same folders.

    Raises UserError where Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install 'internimage-pretrain[ray]'") from None
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        remote = ray.remote(max_retries=3)(work_on).remote
        most = max(1, int(_UNDER_WAY * ray.cluster_resources().get("CPU", 1)))
        waiting = iter(units)
        under_way = [remote(work, unit) for unit, _ in zip(waiting, range(most), strict=False)]
        while under_way:
            ready, under_way = ray.wait(under_way)
            ray.get(ready)
            under_way += [remote(work, unit) for unit, _ in zip(waiting, ready, strict=False)]
            yield None
    finally:
        if own:
            ray.shutdown()


def work_on(work: Callable[[int], None], unit: int) -> None:
    work(unit)
