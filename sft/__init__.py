"""Supervised fine-tuning: examples -> chat template -> masks -> packed rows -> loss -> train."""
