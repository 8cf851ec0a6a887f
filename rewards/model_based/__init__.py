"""Rewards that ask a model: a scalar reward model, a judge, and the routing between them and the rules."""
