"""One stage over a set of many rows: `python scale_run.py FOLDER plan|filter|exact|near`; prints JSON."""

import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

from data_pipeline.curation.catalogue import open_catalogue
from data_pipeline.curation.decisions import SetPath, open_settled
from data_pipeline.curation.duplicates import DuplicateRules, dedup_sets
from data_pipeline.curation.filters import FilterRules, filter_set
from data_pipeline.curation.plans import make_plan


def peak_kilobytes() -> int:
    """Of this program alone: ru_maxrss keeps that of the process which started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def main() -> None:
    folder, stage = Path(sys.argv[1]), sys.argv[2]
    begun = time.monotonic()
    if stage == "plan":
        output = folder.parent / "planned"
        output.mkdir(exist_ok=True)
        with open_catalogue([open_settled(SetPath(folder))], scratch=output) as catalogue:
            order = "md5_number_lower('0:' || id::VARCHAR)"
            plan = make_plan(catalogue, output, [""], "0", order, 10_000)
        told = {"units": plan.units}
    elif stage == "filter":
        told = asdict(filter_set(folder, FilterRules(min_side=210, expressions=("row % 100 <> 3",))))
    else:
        told = asdict(dedup_sets([SetPath(folder)], DuplicateRules(near=stage == "near")))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    told |= {
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(peak_kilobytes() / 1e6, 2),
    }
    print(json.dumps(told, default=str))


if __name__ == "__main__":
    main()
