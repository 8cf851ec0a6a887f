r"""A gold answer and a response -> are they the same mathematical object?"""
