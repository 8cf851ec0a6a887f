"""tests/zygote.py for `python -m recipes.distill`: commands that really die, with the imports paid for once."""

import pyarrow.parquet  # noqa: F401
from zygote import serve

import recipes.distill
import rewards.maths.grade  # noqa: F401
import runtime.models  # noqa: F401
import sampling.attest
import sampling.native  # noqa: F401
from distill.config import DistillConfig

recipes.distill.train = recipes.distill.generate  # what the zygote looks for
serve(recipes.distill, DistillConfig)
