"""Checkpoints: written and restored by all ranks together (checkpointer), read by one process without DeepSpeed (disk),
as one safetensors file a rank (rank_file).
"""
