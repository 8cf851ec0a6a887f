"""Answers that no rule can check -> what people say about them: a queue, a log of decisions, a local page, exports."""
