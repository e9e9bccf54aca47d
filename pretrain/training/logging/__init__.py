"""What a run tells while it trains.

record    events.jsonl, metrics.jsonl, TensorBoard, environment.json      meter      the numbers of a step
run_log   metrics, progress, alarms and profiler, as the loop calls them  progress, profiling
"""
