"""What keeps a run from losing work.

interruption  requests to stop: signals, the stop file        watchdog     a hang, and a save beyond its grace
policy        losses that diverge: skip a step, roll back     bad_samples  data that are too often bad
"""
