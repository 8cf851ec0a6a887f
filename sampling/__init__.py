"""Prompt ids -> groups of sampled completions, from weights that are proven to be the trainer's.

`protocol` says what a sampler is; `native` and `vllm_sampler` are two; `attest` fills and checks one.
"""
