"""The contract between the two stages: what a shard and a manifest are, and how image bytes become views.

Nothing here imports torch, transformers, ray or deepspeed.
"""
