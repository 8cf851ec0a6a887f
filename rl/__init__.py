"""GRPO: prompts -> rollout -> score -> advantage -> batch -> loss -> step -> sync."""
