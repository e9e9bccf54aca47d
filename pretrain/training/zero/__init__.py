"""All that knows DeepSpeed and the ZeRO stages.

building   the modules before DeepSpeed has them       engine      forward, backward, update, behind one class
partition  ZeRO-3 from the first value on              fragments   what a rank holds of each parameter
ema        the EMA of the weights, by fragments        teacher     the momentum teacher, filled from the EMA
file_memory, deepspeed_config
"""
