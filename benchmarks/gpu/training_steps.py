"""The training's steps, by value: speed of the models, where a step's time goes, ZeRO, memory, the demo, the compiler.

Likely seconds on an H100 stand beside each; in all under 330.
"""

from __future__ import annotations

from steps import Options, Step, script


def steps(options: Options) -> list[Step]:
    """Each a process of its own; the limits add up to more than the likely times."""
    small = ("--small",) if options.small else ()
    shards = () if options.shards is None else ("--shards", str(options.shards))

    def step(name: str, seconds: float, file: str, *arguments: str) -> Step:
        return Step(name, "training", seconds, script(file, *arguments, *small))

    return [
        step("steps-TB", 80, "model_steps.py", "T", "B"),  # 35
        step("trace", 70, "model_trace.py", "H", "T"),  # 30
        step("zero", 130, "zero_stages.py"),  # 60
        step("steps-H", 70, "model_steps.py", "H"),  # 30
        step("memory", 120, "model_memory.py", "T", "B", "H"),  # 40
        step("layers", 50, "model_layers.py", "H", "B", "T"),  # 20
        step("demo", 110, "demo_scores.py", *shards),  # 75
        step("compiled", 110, "model_steps.py", "T", "H", "B", "--compile", "--seconds", "60"),  # 60
    ]
